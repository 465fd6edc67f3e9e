"""What is said before work starts: the commands typed on datasets with one thing wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from raw_datasets import AFFINE, SHAPE, write_raw
from weights import tiny_weights

from plans import make_plans
from stunet.cli.main import main
from stunet.datasets.phantoms import write_phantom_dataset
from stunet.errors import LabelError
from stunet.labels.labels import Labels

NAME = "Dataset001_Test"
LABELS = {"background": 0, "liver": 1, "spleen": 2}
TRAIN = "train 1 3d_fullres 0 -device cpu"
RANK = "rank -d 1 --checkpoints w.pth --device cpu"
FINETUNE = "finetune -d 1 --from w.pth -device cpu"


class Dataset:
    """Two cases, raw and preprocessed, and weights: all that the commands need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw = write_raw(root / "nnUNet_raw" / NAME, LABELS, ["a", "b"])
        self.folder = root / "nnUNet_preprocessed" / NAME
        self.folder.mkdir()
        (self.folder / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
        self.copy()
        for case in ("a", "b"):
            self.preprocess(case)
        torch.save({"network_weights": tiny_weights()}, root / "w.pth")

    def copy(self) -> None:
        """What nnU-Net's preprocessing copies."""
        shutil.copyfile(self.raw / "dataset.json", self.folder / "dataset.json")
        shutil.copytree(self.raw / "labelsTr", self.folder / "gt_segmentations", dirs_exist_ok=True)

    def preprocess(self, case: str, shape: tuple[int, ...] = (12, 10, 8)) -> None:
        properties = {"spacing": [2.0, 2.0, 2.0], "shape_after_cropping_and_before_resampling": (6, 5, 4)}
        data = self.folder / "nnUNetPlans_3d_fullres"
        data.mkdir(exist_ok=True)
        for file in data.glob(f"{case}*"):
            file.unlink()
        image, segmentation = np.zeros((1, *shape), np.float32), np.zeros((1, *shape), np.int16)
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(data / case))

    def describe(self, **more: Any) -> None:
        content = json.loads((self.raw / "dataset.json").read_text())
        (self.raw / "dataset.json").write_text(json.dumps({**content, **more}))
        self.copy()


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return Dataset(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_here(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stunet", *shlex.split(line)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out + captured.err

    return run_here


def refused(run: Any, line: str, *expected: str) -> None:
    status, output = run(line)
    assert status == 2, output
    for part in expected:
        assert part in output


@pytest.mark.parametrize("command", ["plan -d 1", "labels check -d 1", TRAIN, RANK, FINETUNE])
def test_labels_with_a_gap(dataset: Dataset, run: Any, command: str) -> None:
    dataset.describe(labels={"background": 0, "liver": 1, "spleen": 3})
    refused(run, command, "0, 1, 3")
    assert not list(dataset.folder.glob("STUNetPlans*"))


@pytest.mark.parametrize("command", ["plan -d 1", TRAIN, RANK, FINETUNE])
def test_a_value_that_is_not_declared(dataset: Dataset, run: Any, command: str) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 3, 3] = 7
    nib.save(nib.Nifti1Image(labels, AFFINE), dataset.raw / "labelsTr" / "b.nii.gz")
    dataset.copy()
    refused(run, command, "dataset.json does not declare 7 in", "b.nii.gz", "stunet labels check -d 1")
    status, output = run("labels check -d 1 -np 1")
    assert status == 1
    assert "b has values that dataset.json does not list: 7" in output


@pytest.mark.parametrize(
    ("dataset_json", "expected"),
    [
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, [0, 1, 2]),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}, [0, 1, 2]),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}, 4),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "labels must be consecutive"),
        ({"labels": {"background": 0, "a": 1, "ignore": 3}}, "labels must be consecutive"),
        ({"labels": {"background": 0, "whole": [1, 3], "core": 3}, "regions_class_order": [1, 3]}, "2 is missing"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions_class_order"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]}, "2 values"),
        ({"labels": {"background": 1, "a": 0}}, "background must be label 0"),
        ({"labels": {"a": 1}}, "missing"),
        ({"labels": {"background": 0, "a": "one"}}, "no label values"),
        ({"labels": None}, "no label values"),
        ({}, "no label values"),
    ],
)
def test_the_rules_for_labels(dataset_json: dict[str, Any], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(LabelError, match=expected):
            Labels(dataset_json).check()
    else:
        assert Labels(dataset_json).check() == (list(range(4)) if expected == 4 else expected)


@pytest.mark.parametrize("command", [TRAIN, RANK])
def test_data_of_other_plans_or_none(dataset: Dataset, run: Any, command: str) -> None:
    elsewhere = command.replace("3d_fullres", "3d_lowres") + (" -c 3d_lowres" if command == RANK else "")
    remedy = "nnUNetv2_preprocess -d 1 -plans_name nnUNetPlans -c 3d_lowres"
    refused(run, elsewhere, remedy)
    dataset.preprocess("a", (9, 10, 8))
    refused(run, command, "(1, 9, 10, 8)", "(1, 12, 10, 8)")


def test_a_damaged_copy_of_the_description(dataset: Dataset, run: Any) -> None:
    (dataset.folder / "dataset.json").write_text("{")
    refused(run, "plan -d 1 --from w.pth", str(dataset.folder / "dataset.json"), "cannot be read")


@pytest.mark.parametrize("command", ["plan -d 1", TRAIN, RANK, FINETUNE])
def test_another_number_of_channels(dataset: Dataset, run: Any, command: str) -> None:
    dataset.describe(channel_names={"0": "CT", "1": "PET"})
    refused(run, command, "2 in dataset.json (CT, PET)", "1 in")


@pytest.mark.parametrize("command", ["plan -d 1", TRAIN, RANK, FINETUNE])
def test_a_full_disk(dataset: Dataset, run: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    refused(run, command, "too little disk space", "1.0 MB free")


def test_checkpoints_that_will_not_fit(dataset: Dataset, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the 58.3 million parameters of base, with momentum, of 4 bytes each."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9 * 10**8))
    refused(run, f"{TRAIN} -tr STUNetTrainer_base", "too little disk space")
    _, output = run(f"{TRAIN} -tr STUNetTrainer_base")
    needed = float(re.search(r"([\d.]+) MB at least", output)[1])
    assert needed == pytest.approx(2 * 2 * 4 * 58.2e6 / 2**20, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("command", [TRAIN, RANK, FINETUNE])
def test_a_device_that_is_not_there(dataset: Dataset, run: Any, command: str) -> None:
    refused(run, command.replace("device cpu", "device cuda"), "a device that PyTorch does not find", "cuda")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{TRAIN} -tr STUNetTrainer_bse", ("unknown trainer", "Did you mean STUNetTrainer_base")),
        (f"{TRAIN} -p nnUNetPlan", ("nnUNetPlan", "Did you mean nnUNetPlans?")),
        (TRAIN.replace("1 3d", "2 3d"), (NAME,)),
        (TRAIN.replace("1 3d", "Dataset001_Tset 3d"), (f"Did you mean {NAME}?",)),
        (TRAIN.replace("fullres", "fulres"), ("Did you mean 3d_fullres",)),
        (TRAIN.replace("3d_fullres", "2d"), ("nnUNetv2_preprocess -d 1",)),
    ],
)
def test_misspelt_arguments_of_train(dataset: Dataset, run: Any, line: str, expected: tuple[str, ...]) -> None:
    refused(run, line, *expected)


def test_errors_come_before_pytorch(dataset: Dataset) -> None:
    code = (
        "import sys; from stunet.cli.main import main\ntry: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'nnunetv2' in sys.modules)"
    )
    for arguments in (f"{TRAIN} -tr STUNetTrainr", f"{TRAIN} -p P", TRAIN.replace("3d_fullres", "2d")):
        command = [sys.executable, "-c", code, *arguments.split()]
        got = subprocess.run(command, capture_output=True, text=True, check=False)
        assert got.stdout.split() == ["2", "False", "False"], got.stderr


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_variables_of_train(dataset: Dataset, run: Any, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable)
    refused(run, TRAIN, f"export {variable}=")


def test_nothing_to_continue(dataset: Dataset, run: Any) -> None:
    refused(run, f"{FINETUNE} --c", "nothing to continue", "fold_0", "Leave --c out")


def test_the_planner_bears_no_augmentation_processes(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_phantom_dataset(tmp_path / "nnUNet_raw" / NAME, n_training=2, n_test=0)
    status, output = run("plan -d 1 --size small -np 1")
    assert status == 0, output
    assert (tmp_path / "nnUNet_preprocessed" / NAME / "STUNetPlans_small.json").is_file()
