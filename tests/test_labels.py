"""Label vocabularies: the published orders, and files that users bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from stunet.errors import LabelError
from stunet.labels.labels import Labels, list_vocabularies, load_vocabulary, read_label_file, vocabulary_for


def test_published_orders() -> None:
    assert list_vocabularies() == [
        "abdomenatlas_9",
        "totalsegmentator_104",
        "totalsegmentator_v1",
        "totalsegmentator_v2",
    ]
    labels = vocabulary_for(105).labels
    assert len(set(labels)) == 105
    assert [labels[i] for i in (0, 1, 38, 40, 50, 77, 104)] == [
        "background", "adrenal_gland_left", "kidney_left", "liver", "rib_left_10", "spleen", "vertebrae_T9",
    ]  # fmt: skip
    assert vocabulary_for(10).labels == (
        "background", "aorta", "gallbladder", "IVC", "left kidney", "liver", "pancreas", "right kidney", "spleen",
        "stomach",
    )  # fmt: skip
    assert vocabulary_for(10).as_dataset_labels()["stomach"] == 9
    assert "STU-Net project" in load_vocabulary("totalsegmentator_104").source


@pytest.mark.parametrize(
    ("n", "file"), [(105, "stunet_label_order_104.json"), (10, "stunet_label_order_abdomenatlas.json")]
)
def test_orders_are_the_facts(shared: Path, n: int, file: str) -> None:
    facts = json.loads((shared / "facts" / file).read_text())
    assert {str(i): name for i, name in enumerate(vocabulary_for(n).labels)} == facts


def test_outputs_that_no_published_weights_have() -> None:
    with pytest.raises(LabelError, match=r"7 outputs.*--labels FILE\.json"):
        vocabulary_for(7)
    with pytest.raises(LabelError, match="unknown label vocabulary"):
        load_vocabulary("../labels/abdomenatlas_9")


@pytest.mark.parametrize(
    "content",
    [
        ["background", "liver", "spleen"],
        {"0": "background", "2": "spleen", "1": "liver"},
        {"spleen": 2, "background": 0, "liver": 1},
        {"labels": {"background": 0, "liver": 1, "spleen": 2}, "channel_names": {"0": "CT"}},
        {"name": "mine", "labels": ["background", "liver", "spleen"]},
    ],
)
def test_forms_of_label_files(tmp_path: Path, content: Any) -> None:
    (tmp_path / "l.json").write_text(json.dumps(content))
    assert read_label_file(tmp_path / "l.json", 3).labels == ("background", "liver", "spleen")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["background", "liver"], "2 names for 3 outputs"),
        (["background", "a", "b", "c"], "4 names for 3"),
        (["background", "liver", "liver"], "liver twice"),
        (["liver", "spleen", "background"], "label 0 is 'liver'"),
        ({"background": 0, "liver": 1, "spleen": 3}, "no name for label 2"),
        ({"background": 0, "liver": 1, "spleen": 1}, "no name for label 2"),
        ({"background": 0, "organs": [1, 2], "spleen": 2}, "background"),
        ({"a": "background"}, "a key"),
        (["background", "", "b"], r"\[1\]: Expected str"),
        (["background", 1, 2], r"\[1\]: Expected str, got int"),
        (3, "got int"),
        ("{", "Expecting property name"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path: Path, content: Any, expected: str) -> None:
    (tmp_path / "l.json").write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(LabelError, match=expected):
        read_label_file(tmp_path / "l.json", 3)


def test_missing_label_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="No such file"):
        read_label_file(tmp_path / "l.json", 3)


@pytest.mark.parametrize(("version", "facts"), [(1, "v1_104"), (2, "v2_117")])
def test_official_orders_are_the_facts(shared: Path, version: int, facts: str) -> None:
    expected = json.loads((shared / "facts" / "totalsegmentator_classes.json").read_text())[facts]
    labels = load_vocabulary(f"totalsegmentator_v{version}").labels
    assert {str(i): name for i, name in enumerate(labels) if i} == expected


@pytest.mark.parametrize(("version", "sizes"), [(1, [17, 24, 18, 21, 24]), (2, [24, 26, 18, 23, 26])])
def test_the_five_groups_share_out_all_structures(version: int, sizes: list[int]) -> None:
    vocabulary = load_vocabulary(f"totalsegmentator_v{version}")
    assert list(vocabulary.groups) == ["organs", "vertebrae", "cardiac", "muscles", "ribs"]
    assert [len(names) for names in vocabulary.groups.values()] == sizes
    assert sorted(sum(vocabulary.groups.values(), ())) == sorted(vocabulary.labels[1:])
    assert all("vertebrae" in name or name == "sacrum" for name in vocabulary.groups["vertebrae"])


def test_the_published_order_is_alphabetical() -> None:
    assert tuple(sorted(load_vocabulary("totalsegmentator_v1").labels[1:])) == vocabulary_for(105).labels[1:]


def test_outputs_as_nnunet_counts_them() -> None:
    labels = Labels({"labels": {"background": 0, "spleen": 2, "liver": 1, "ignore": 3}})
    assert labels.outputs == (("background", "liver", "spleen"), True)
    assert (labels.exclusive, labels.ignore) == ({"liver": 1, "spleen": 2}, 3)
    regions = Labels({"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}})
    assert regions.outputs == (("whole", "core"), False)
    assert regions.structures == {"whole": (1, 2, 3), "core": (2, 3)}


def test_truth_of_region_datasets_is_merged_as_nnunet_merges_predictions() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4}
    read = Labels({"labels": labels, "regions_class_order": [2, 1, 3]})
    assert read.predicted == {"whole": 2, "core": 1, "enhancing": 3}
    truth = np.array([[[0, 1, 2, 3, 4]]])
    manager = LabelManager(labels, [2, 1, 3])
    regions = np.stack([np.isin(truth, region) for region in manager.foreground_regions]).astype(np.float32)
    expected = manager.convert_probabilities_to_segmentation(regions)
    assert read.as_predicted(truth).tolist() == expected.tolist()
    plain = Labels({"labels": {"background": 0, "liver": 1, "ignore": 2}})
    assert plain.predicted == {"background": 0, "liver": 1}
    assert plain.as_predicted(truth) is truth


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "liver": 1, "Liver": 2}, "'liver' and 'Liver'"),
        ({"background": 0, "whole": [1, 2], "core": 2}, r"whole is a region, \[1, 2\]"),
        ({"background": 0, "a": 1, "b": 1}, "duplicate values"),
        ({"background": 0}, "no structures"),
        ({"background": 0, "a": True}, r"\['a'\]: Expected int \| array, got bool"),
    ],
)
def test_labels_that_cannot_be_annotated_in_part(labels: dict[str, Any], expected: str) -> None:
    with pytest.raises(LabelError, match=expected):
        _ = Labels({"labels": labels}).exclusive


def test_a_structure_with_the_value_of_the_background_is_refused() -> None:
    with pytest.raises(LabelError, match="liver"):
        _ = Labels({"labels": {"background": 0, "liver": 0, "spleen": 1}}).exclusive


def test_values_written_as_text_are_numbers_as_for_nnunet() -> None:
    assert Labels({"labels": {"background": "0", "liver": "1"}}).structures == {"liver": (1,)}


@pytest.mark.parametrize("name", ["labels", "labels.txt", "labels.yaml"])
def test_label_files_of_any_name_are_json_or_yaml(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in ('{\n\t"background": 0,\n\t"liver": 1\n}\n', "background: 0\nliver: 1\n", "- background\n- liver\n"):
        path.write_text(text)
        assert read_label_file(path, 2).labels == ("background", "liver")
