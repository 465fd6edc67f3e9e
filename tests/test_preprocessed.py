"""Preprocessed cases through nnU-Net's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from plans import DATASET_JSON, make_plans
from stunet.errors import DatasetError, PlansError, UsageError
from stunet.planning.preprocessed import open_preprocessed

CASES = [f"case_{i}" for i in range(6)]


@pytest.fixture
def folder(nnunet_folders: dict[str, Path]) -> Path:
    """Six cases as nnU-Net's preprocessor saves them."""
    folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset001_Test"
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    labels = {**DATASET_JSON["labels"], "ignore": 3}
    (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": labels}))
    for i, case in enumerate(CASES):
        image, segmentation = _arrays(i)
        nnUNetDatasetBlosc2.save_case(image, segmentation, {"spacing": [1, 1, 1]}, str(data / case))
    return folder


def _arrays(i: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(i)
    return rng.normal(size=(1, 7, 8, 9)).astype(np.float32), rng.integers(-1, 4, (1, 7, 8, 9)).astype(np.int16)


def test_cases_are_read_as_they_were_saved(folder: Path) -> None:
    dataset = open_preprocessed("1", "nnUNetPlans", "3d_fullres")
    assert dataset.cases == CASES
    assert (dataset.input_channels, dataset.ignore_label) == (1, 3)
    assert dataset.structures == {1: "liver", 2: "spleen"}
    image, segmentation = _arrays(4)
    case = dataset.load("case_4")
    np.testing.assert_array_equal(case.image, image)
    np.testing.assert_array_equal(case.segmentation, segmentation[0])
    assert dataset.annotated("case_4") == {1, 2}


def test_partly_annotated(folder: Path) -> None:
    content = {"version": 1, "groups": {"g": ["liver"]}, "default": "g", "cases": {"case_2": ["liver", "spleen"]}}
    (folder / "annotated_labels.json").write_text(json.dumps(content))
    dataset = open_preprocessed("1", "nnUNetPlans", "3d_fullres")
    assert dataset.annotated("case_1") == {1}
    assert dataset.annotated("case_2") == {1, 2}


def test_folds_and_choices(folder: Path) -> None:
    dataset = open_preprocessed("1", "nnUNetPlans", "3d_fullres")
    with pytest.raises(DatasetError, match="splits_final"):
        dataset.training_cases("0")
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES[:4], "val": CASES[4:]}]))
    assert dataset.training_cases("0") == CASES[:4]
    assert dataset.training_cases("all") == CASES
    with pytest.raises(UsageError, match="0 to 0"):
        dataset.training_cases("1")
    chosen = dataset.choose(CASES, 3, seed=1)
    assert len(set(chosen)) == 3
    assert chosen == dataset.choose(CASES, 3, seed=1) == sorted(chosen)
    assert len({tuple(dataset.choose(CASES, 3, seed=seed)) for seed in range(8)}) > 1
    assert dataset.choose(CASES, 9, seed=1) == CASES


def test_what_is_missing_is_said_with_the_command(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"nnUNetv2_preprocess -d 1 -plans_name nnUNetPlans -c 3d_lowres"):
        open_preprocessed("1", "nnUNetPlans", "3d_lowres")
    with pytest.raises(PlansError, match=r"one of nnUNetPlans"):
        open_preprocessed("1", "OtherPlans", "3d_fullres")
    (folder.parent / "Dataset002_New").mkdir()
    with pytest.raises(PlansError, match=r"nnUNetv2_plan_and_preprocess -d 2"):
        open_preprocessed("2", "nnUNetPlans", "3d_fullres")
    (folder / "nnUNetPlans_3d_fullres" / "case_1.b2nd").write_bytes(b"no array")
    with pytest.raises(DatasetError, match="case_1"):
        open_preprocessed("1", "nnUNetPlans", "3d_fullres").load("case_1")
