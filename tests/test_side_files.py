"""Manifest and folds on their way into the preprocessed folder, and when they have changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stunet.datasets.raw import read_annotations, sync_to_preprocessed
from stunet.errors import DatasetError

NAME = "Dataset101_T"
DATASET = {"labels": {"background": 0, "a": 1, "b": 2}}


@pytest.fixture
def folders(nnunet_folders: dict[str, Path]) -> tuple[Path, Path]:
    raw, preprocessed = nnunet_folders["nnUNet_raw"] / NAME, nnunet_folders["nnUNet_preprocessed"] / NAME
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    write(raw, {"x": ["a"]})
    (raw / "splits_final.json").write_text("[]")
    return raw, preprocessed


def write(folder: Path, cases: dict[str, Any], **json_options: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "annotated_labels.json").write_text(json.dumps({"version": 1, "cases": cases}, **json_options))


def test_what_is_missing_is_carried(folders: tuple[Path, Path]) -> None:
    raw, preprocessed = folders
    assert read_annotations(NAME, DATASET).annotated("x") == (1,)
    for name in ("annotated_labels.json", "splits_final.json"):
        assert (preprocessed / name).read_bytes() == (raw / name).read_bytes()


def test_what_has_changed_since_is_refused_until_it_is_carried(folders: tuple[Path, Path]) -> None:
    raw, preprocessed = folders
    read_annotations(NAME, DATASET)
    write(raw, {"x": ["a", "b"]})
    with pytest.raises(DatasetError, match=r"changed since.*\(cases, x\).*stunet labels carry -d Dataset101_T"):
        read_annotations(NAME, DATASET)
    assert sync_to_preprocessed(raw, preprocessed) == [preprocessed / "annotated_labels.json"]
    assert sync_to_preprocessed(raw, preprocessed, overwrite=True) == []
    assert read_annotations(NAME, DATASET).annotated("x") == (1, 2)
    (raw / "annotated_labels.json").unlink()
    with pytest.raises(DatasetError, match="it was removed"):
        read_annotations(NAME, DATASET)
    sync_to_preprocessed(raw, preprocessed, overwrite=True)
    assert not (preprocessed / "annotated_labels.json").exists()
    assert read_annotations(NAME, DATASET).is_complete


def test_other_bytes_of_the_same_meaning_are_no_change(folders: tuple[Path, Path]) -> None:
    raw, _ = folders
    read_annotations(NAME, DATASET)
    write(raw, {"x": ["a"]}, indent=1)
    assert read_annotations(NAME, DATASET).annotated("x") == (1,)


def test_folds_of_the_users_own_stay(folders: tuple[Path, Path]) -> None:
    _, preprocessed = folders
    preprocessed.mkdir()
    (preprocessed / "splits_final.json").write_text("mine")
    read_annotations(NAME, DATASET)
    assert (preprocessed / "splits_final.json").read_text() == "mine"


def test_training_where_the_raw_data_is_not(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, preprocessed = folders
    write(preprocessed, {"x": ["b"]})
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))
    assert read_annotations(NAME, DATASET).annotated("x") == (2,)
    monkeypatch.delenv("nnUNet_raw")
    assert read_annotations(NAME, DATASET).annotated("x") == (2,)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(DatasetError, match="neither nnUNet_raw nor nnUNet_preprocessed"):
        read_annotations(NAME, DATASET)
