"""The same structure under different names."""

from __future__ import annotations

import pytest

from stunet.labels.labels import canonical_name, load_vocabulary, match_names

# As the datasets of STU-Net's direct evaluation write them, and TotalSegmentator.
PAIRS = [
    ("left kidney", "kidney_left"),
    ("Kidney_L", "kidney_left"),
    ("LeftKidney", "kidney_left"),
    ("rt. kidney", "kidney_right"),
    ("IVC", "inferior_vena_cava"),
    ("inferior vena cava", "inferior_vena_cava"),
    ("postcava", "inferior_vena_cava"),
    ("RAG", "adrenal_gland_right"),
    ("LAG", "adrenal_gland_left"),
    ("right adrenal gland", "adrenal_gland_right"),
    ("Left adrenal", "adrenal_gland_left"),
    ("bladder", "urinary_bladder"),
    ("oesophagus", "esophagus"),
    ("Gall bladder", "gallbladder"),
    ("LV", "heart_ventricle_left"),
    ("LA", "heart_atrium_left"),
    ("left atrium", "heart_atrium_left"),
    ("L1", "vertebrae_L1"),
    ("vertebra T12", "vertebrae_T12"),
    ("left rib 1", "rib_left_1"),
    ("Portal vein and splenic vein", "portal_vein_and_splenic_vein"),
    ("left iliac vein", "iliac_vena_left"),
    ("clavicle left", "clavicula_left"),
    ("small intestine", "small_bowel"),
    ("large intestine", "colon"),
    ("left femur", "femur_left"),
]


@pytest.mark.parametrize(("spelling", "name"), PAIRS)
def test_usual_spellings(spelling: str, name: str) -> None:
    assert canonical_name(spelling) == canonical_name(name)


def test_no_two_structures_of_a_vocabulary_become_one() -> None:
    for vocabulary in ("totalsegmentator_104", "abdomenatlas_9"):
        labels = load_vocabulary(vocabulary).labels
        assert len({canonical_name(name) for name in labels}) == len(labels)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("kidney_left", "kidney_right"),
        ("kidney", "kidney_left"),
        ("rib_left_1", "rib_left_11"),
        ("vertebrae_L1", "vertebrae_T1"),
        ("Left-Lateral-Ventricle", "heart_ventricle_left"),
        ("lung_upper_lobe_left", "lung_lower_lobe_left"),
        ("superior vena cava", "inferior vena cava"),
    ],
)
def test_what_must_stay_apart(one: str, other: str) -> None:
    assert canonical_name(one) != canonical_name(other)


def test_unknown_names_are_only_normalised() -> None:
    assert canonical_name("Tumour Core") == canonical_name("tumour_core") == "tumour_core"
    assert canonical_name("L") == "l"


def test_published_weights_know_the_structures_of_other_datasets() -> None:
    btcv = ["background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "tumour", "IVC"]
    matches = match_names(load_vocabulary("totalsegmentator_104").labels, btcv)
    assert matches == {
        "background": "background", "spleen": "spleen", "right kidney": "kidney_right", "left kidney": "kidney_left",
        "gallbladder": "gallbladder", "esophagus": "esophagus", "liver": "liver", "tumour": None,
        "IVC": "inferior_vena_cava",
    }  # fmt: skip


def test_equal_names_go_before_spellings_and_none_is_used_twice() -> None:
    assert match_names(["IVC", "inferior_vena_cava"], ["inferior_vena_cava"]) == {
        "inferior_vena_cava": "inferior_vena_cava"
    }
    # "ivc" and "postcava" mean the same: spelling cannot tell which of the two is meant
    assert match_names(["ivc", "postcava"], ["inferior_vena_cava"]) == {"inferior_vena_cava": None}
    assert match_names(["liver"], ["liver", "Liver"]) == {"liver": "liver", "Liver": None}
