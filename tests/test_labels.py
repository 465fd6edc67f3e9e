"""Label vocabularies: the published orders, and files that users bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stunet.errors import LabelError
from stunet.labels import list_vocabularies, load_vocabulary, read_label_file, vocabulary_for


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
    with pytest.raises(LabelError, match=r"7 outputs[\s\S]*--labels FILE\.json"):
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
        (["background", "liver"], "2 names[\\s\\S]*3 names, background included"),
        (["background", "a", "b", "c"], "4 names"),
        (["background", "liver", "liver"], "liver twice"),
        (["liver", "spleen", "background"], "label 0 is 'liver'"),
        ({"background": 0, "liver": 1, "spleen": 3}, "no name for label 2"),
        ({"background": 0, "liver": 1, "spleen": 1}, "no name for label 2"),
        ({"background": 0, "organs": [1, 2], "spleen": 2}, "neither"),
        ({"a": "background"}, "neither"),
        (["background", "", "b"], "not text"),
        (["background", 1, 2], "not text"),
        (3, "neither"),
        ("{", "not JSON"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path: Path, content: Any, expected: str) -> None:
    (tmp_path / "l.json").write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(LabelError, match=expected):
        read_label_file(tmp_path / "l.json", 3)


def test_missing_label_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="missing label file"):
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
