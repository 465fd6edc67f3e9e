"""The labels of several datasets as those of one, and the mapping files that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from stunet.errors import LabelError
from stunet.labels.labels import load_vocabulary
from stunet.labels.mappings import dump_mapping, merge_labels, read_mapping

TOTAL = "Dataset101_Total"
KITS = "Dataset004_Kits"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_names_merge_and_leaves_come_first() -> None:
    union = merge_labels({TOTAL: ["kidney_left", "liver", "Left Foot"], KITS: ["Kidneys", "tumour", "Right Kidney"]})
    # "Right Kidney" and "kidney_left" are sides of "Kidneys", whose own source tells it from the right one
    assert union.leaves == ("kidney_left", "liver", "Left Foot", "tumour", "kidney_right")
    assert union.superclasses == {"kidney": ("kidney_left", "kidney_right")}
    assert union.labels == {
        "background": 0, "kidney_left": 1, "liver": 2, "Left Foot": 3, "tumour": 4, "kidney_right": 5, "kidney": 6,
    }  # fmt: skip
    assert union.mapping[KITS] == {"Kidneys": "kidney", "tumour": "tumour", "Right Kidney": "kidney_right"}


def test_without_its_members_a_superclass_is_a_leaf() -> None:
    union = merge_labels({KITS: ["kidneys"], TOTAL: ["liver", "Kidney"]}, has_ignore=True)
    assert (union.leaves, union.superclasses) == (("kidneys", "liver"), {})
    assert union.labels == {"background": 0, "kidneys": 1, "liver": 2, "ignore": 3}


def test_lungs_and_ribs_over_totalsegmentator() -> None:
    total = list(load_vocabulary("totalsegmentator_v2").labels[1:])
    union = merge_labels({TOTAL: total, "Dataset005_A": ["Left Lung", "Right Lung"], KITS: ["lungs", "ribs", "hips"]})
    assert union.leaves == tuple(total)  # with the values that they have in the first source
    lobes = {name: [t for t in total if t.startswith("lung_") and t.endswith(side)] for name, side in
             (("lung_left", "left"), ("lung_right", "right"))}  # fmt: skip
    assert {name: sorted(leaves) for name, leaves in union.superclasses.items()} == {
        **{name: sorted(leaves) for name, leaves in lobes.items()},
        "lung": sorted(lobes["lung_left"] + lobes["lung_right"]),
        "rib": sorted(t for t in total if t.startswith("rib_")),
        "hip": ["hip_left", "hip_right"],
    }
    whole = merge_labels({"Dataset005_A": ["Left Lung", "Right Lung"], KITS: ["lungs"]})
    assert whole.superclasses == {"lung": ("lung_left", "lung_right")}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (["kidney_left"], ["kidney"], r"kidney \(Dataset004_Kits\) contains kidney_left .*no source has kidney_right"),
        (["lung_upper_lobe_left"], ["lung_left"], "contains lung_upper_lobe_left .*no source has lung_lower_lobe_left"),
        (["lung_left", "lung_upper_lobe_right"], ["lung"], "lung .*no source has lung_middle_lobe_right"),
    ],
)
def test_a_part_without_the_others_is_refused(one: list[str], other: list[str], expected: str) -> None:
    with pytest.raises(LabelError, match=expected):
        merge_labels({TOTAL: one, KITS: other})


def test_what_spelling_cannot_tell_apart_stays_apart() -> None:
    union = merge_labels({TOTAL: ["ivc", "postcava"], KITS: ["IVC", "liver"]})
    assert union.leaves == ("ivc", "postcava", "inferior_vena_cava", "liver")
    assert set(union.doubtful) == {("inferior_vena_cava", "ivc"), ("inferior_vena_cava", "postcava")}


def test_doubtful_names() -> None:
    union = merge_labels(
        {TOTAL: ["liver", "kidney_left", "kidney_right", "kidney_cyst"], KITS: ["kidney", "liver_tumour"]}
    )
    assert set(union.doubtful) == {("liver", "liver_tumour"), ("kidney", "kidney_cyst")}


def test_superclasses_of_sources_manifests() -> None:
    union = merge_labels(
        {TOTAL: ["L4", "L5"], KITS: ["vertebrae_L5", "vertebrae_L4", "spine"]},
        declared={KITS: {"spine": ["vertebrae_L4", "vertebrae_L5"]}},
    )
    assert union.superclasses == {"spine": ("vertebrae_L4", "vertebrae_L5")}
    with pytest.raises(LabelError, match=r"spine of unclear meaning"):
        merge_labels(
            {TOTAL: ["L3", "L4", "spine"], KITS: ["vertebrae_L5", "vertebrae_L4", "spine"]},
            declared={KITS: {"spine": ["vertebrae_L4", "vertebrae_L5"]}, TOTAL: {"spine": ["L3", "L4"]}},
        )


def test_a_printed_mapping_gives_the_same_union(tmp_path: Path) -> None:
    sources = {TOTAL: ["kidney_left", "kidney_right", "no", "größe: 1"], KITS: ["kidneys", "off"]}
    union = merge_labels(sources)
    path = write(tmp_path / "m.yaml", dump_mapping(union.mapping, union.superclasses))
    assert merge_labels(sources, overrides=read_mapping(path)) == union


def test_a_mapping_file_goes_first(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.yaml",
        "sources:\n"
        "  4: {kidney: both, cyst: both, tumour: ignore, noise: background}\n"
        "superclasses:\n"
        "  both: [kidney_left, kidney_right]\n"
        "  all: [both, liver]\n",
    )
    union = merge_labels(
        {TOTAL: ["kidney_left", "kidney_right", "liver", "all"], KITS: ["kidney", "cyst", "tumour", "noise", "Liver"]},
        overrides=read_mapping(path),
    )
    assert union.leaves == ("kidney_left", "kidney_right", "liver")
    assert union.superclasses == {
        "all": ("kidney_left", "kidney_right", "liver"),
        "both": ("kidney_left", "kidney_right"),
    }
    assert union.labels["ignore"] == 6
    assert union.mapping[KITS] == {
        "kidney": "both", "cyst": "both", "tumour": "ignore", "noise": "background", "Liver": "liver",
    }  # fmt: skip


def test_an_empty_list_of_superclasses_makes_leaves(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml", "superclasses: {}\n")
    union = merge_labels({TOTAL: ["kidney_left", "kidney_right"], KITS: ["kidney"]}, overrides=read_mapping(path))
    assert (union.leaves, union.superclasses) == (("kidney_left", "kidney_right", "kidney"), {})
    assert set(union.doubtful) == {("kidney", "kidney_left"), ("kidney", "kidney_right")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sources: {4: {kidny: kidney}}", "unknown structure 'kidny': Did you mean kidney"),
        ("sources: {5: {kidney: kidney}}", "unknown source 5"),
        ("sources: {Dataset004_Kit: {}}", "unknown source 'Dataset004_Kit': Did you mean Dataset004_Kits"),
        ("sources: {4: {}, Dataset004_Kits: {}}", "duplicate source 'Dataset004_Kits'"),
        ("superclasses: {kidney: [kidney_left, kidney_rigth]}", "unknown structure 'kidney_rigth': Did you mean"),
        ("superclasses: {spine: [kidney_left, kidney_right]}", "unknown structure 'spine'"),
        ("superclasses: {kidney: [kidney_left]}", "kidney has 1 members"),
        ("superclasses: {kidney: []}", "kidney has 0 members"),
        ("superclasses: {kidney: [kidney_left, kidney_left, kidney_right]}", "a member twice"),
        ("superclasses: {kidney: [kidney, liver]}", "go round, kidney → kidney"),
        ("superclasses: {kidney: [liver, kidney_left], liver: [kidney, kidney_right]}", "kidney → liver → kidney"),
        ("superclasses: {kidney: [kidney_left, background]}", "unknown structure 'background'"),
        ("superclasses: {kidney: [kidney_left, kidney_right], liver: [kidney_left, kidney_right]}", "same members"),
        ("sources: {4: {kidney: [kidney_left, kidney_right]}}", r"sources\[4\]\['kidney'\]: .*got array.*superclasses"),
        ("sources: {4: {kidney: no}}", r"sources\[4\]\['kidney'\]: .*got bool.*quotes"),
        ("sources: {4: {1: kidney}}", r"a key of sources\[4\]: .*got int.*quotes"),
        ("sources: {4: {kidney: a, kidney: b}}", "duplicate key 'kidney'"),
        ("sources: {4: {kidney: A, liver: a}}", "'A' and 'a'"),
        ("sources: {4: {kidney: background, liver: background}, 101: {kidney_left: ignore, kidney_right: ignore}}",
         "all background"),
        ("source: {}", "unknown field source"),
        ("- 1", "got array"),
        ("sources: [1]", "sources: .*got array"),
        ("sources: {4: &a [*a]}", "an alias"),
        ("sources: !!python/object/apply:os.system ['echo']", "could not determine a constructor"),
        ("{", "expected the node content"),
        ("", "got null"),
    ],
)  # fmt: skip
def test_mapping_files_that_cannot_be_used(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "m.yaml", text)
    with pytest.raises(LabelError, match=expected):
        merge_labels({TOTAL: ["kidney_left", "kidney_right"], KITS: ["kidney", "liver"]}, overrides=read_mapping(path))


def test_a_mapping_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="No such file"):
        read_mapping(tmp_path / "nowhere.yaml")
