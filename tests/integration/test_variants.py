"""2D, the cascade, region-based labels and the ignore label, trained and predicted with nnU-Net's commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import Shell

from stunet.datasets import make_phantom, write_phantom_dataset

TINY = "num_epochs=1 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 batch_size=2"
REGIONS, IGNORE = "Dataset001_Regions", "Dataset002_Ignore"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Two phantom datasets: one with overlapping regions, one with unlabelled voxels."""
    shell = Shell.make(tmp_path_factory.mktemp("variants"))
    raw = shell.root / "nnUNet_raw"
    for name in (REGIONS, IGNORE):
        write_phantom_dataset(raw / name, n_training=6, n_test=1)
    _edit(
        raw / REGIONS / "dataset.json",
        labels={"background": 0, "soft organs": [1, 2, 3], "kidneys": [3], "spine": [4], "aorta": [5]},
        regions_class_order=[1, 3, 4, 5],
    )
    _edit(
        raw / IGNORE / "dataset.json",
        labels={"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5, "ignore": 6},
    )
    for path in (raw / IGNORE / "labelsTr").glob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        labels = sitk.GetArrayFromImage(image)
        labels[: labels.shape[0] // 3] = 6
        changed = sitk.GetImageFromArray(labels)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(path))
    return shell


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _add_cascade(plans_file: Path) -> None:
    """Phantoms are too small for nnU-Net to plan a cascade, so its two configurations are written by hand."""
    plans = json.loads(plans_file.read_text())
    fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {
        **fullres, "data_identifier": "nnUNetPlans_3d_lowres", "spacing": [s * 1.3 for s in fullres["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }  # fmt: skip
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans_file.write_text(json.dumps(plans))


def _predicted(shell: Shell, folder: str) -> np.ndarray:
    (path,) = (shell.root / folder).glob("*.nii.gz")
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_2d_with_regions(shell: Shell) -> None:
    shell.run("stunet plan -d 1 -c 2d --depth 1 --width 2 --name STUNetPlans_2d --set " + TINY)
    shell.run("nnUNetv2_preprocess -d 1 -plans_name STUNetPlans_2d -c 2d -np 1")
    shell.run("nnUNetv2_train 1 2d 0 -tr STUNetTrainer -p STUNetPlans_2d -device cpu", trainers=True)
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{REGIONS}/imagesTs -o p2d -d 1 -c 2d -f 0 -tr STUNetTrainer "
        "-p STUNetPlans_2d -device cpu -npp 1 -nps 1"
    )
    labels = _predicted(shell, "p2d")
    assert labels.shape == make_phantom(0, 6).image.shape
    assert set(np.unique(labels)) <= {0, 1, 3, 4, 5}


def test_3d_with_ignore_label(shell: Shell) -> None:
    # No plans yet: `stunet plan` has nnU-Net make them first.
    shell.run("stunet plan -d 2 -np 1 -c 3d_fullres --depth 1 --width 2 --name STUNetPlans_3d --set " + TINY)
    shell.run("nnUNetv2_preprocess -d 2 -plans_name STUNetPlans_3d -c 3d_fullres -np 1")
    shell.run("nnUNetv2_train 2 3d_fullres 0 -tr STUNetTrainer -p STUNetPlans_3d -device cpu", trainers=True)
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{IGNORE}/imagesTs -o p3d -d 2 -c 3d_fullres -f 0 -tr STUNetTrainer "
        "-p STUNetPlans_3d -device cpu -npp 1 -nps 1"
    )
    assert set(np.unique(_predicted(shell, "p3d"))) <= {0, 1, 2, 3, 4, 5}


def test_cascade(shell: Shell) -> None:
    shell.run("nnUNetv2_extract_fingerprint -d 2 -np 1 && nnUNetv2_plan_experiment -d 2")
    _add_cascade(shell.root / "nnUNet_preprocessed" / IGNORE / "nnUNetPlans.json")
    shell.run("stunet plan -d 2 --depth 1 --width 2 --name STUNetPlans_cascade --set " + TINY)
    shell.run("nnUNetv2_preprocess -d 2 -plans_name STUNetPlans_cascade -c 3d_lowres 3d_fullres -np 1")
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        shell.run(
            f"nnUNetv2_train 2 {configuration} all -tr STUNetTrainer -p STUNetPlans_cascade -device cpu", trainers=True
        )
    predict = "-f all -tr STUNetTrainer -p STUNetPlans_cascade -device cpu -npp 1 -nps 1"
    shell.run(f"nnUNetv2_predict -i nnUNet_raw/{IGNORE}/imagesTs -o low -d 2 -c 3d_lowres {predict}")
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{IGNORE}/imagesTs -o full -d 2 -c 3d_cascade_fullres {predict} "
        "-prev_stage_predictions low"
    )
    assert _predicted(shell, "full").shape == make_phantom(0, 6).image.shape
