"""2D, the cascade, region-based labels and the ignore label, trained and predicted with nnU-Net's commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from integration.commands import Shell, edit_json, read_array, rewrite_image

from stunet.datasets.phantoms import make_phantom, write_phantom_dataset

TINY = "num_epochs=1 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 batch_size=2 mirroring=none"
REGIONS, IGNORE = "Dataset001_Regions", "Dataset002_Ignore"
SHAPE = make_phantom(0, 5).image.shape  # of the test case


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Two phantom datasets: one with overlapping regions, one with unlabelled voxels."""
    shell = Shell.make(tmp_path_factory.mktemp("variants"))
    for name in (REGIONS, IGNORE):
        write_phantom_dataset(shell.raw / name, n_training=5, n_test=1)
    regions = {"background": 0, "soft organs": [1, 2, 3], "kidneys": [3], "spine": [4], "aorta": [5]}
    edit_json(shell.raw / REGIONS / "dataset.json", labels=regions, regions_class_order=[1, 3, 4, 5])
    labels = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5, "ignore": 6}
    edit_json(shell.raw / IGNORE / "dataset.json", labels=labels)
    for path in (shell.raw / IGNORE / "labelsTr").glob("*.nii.gz"):
        rewrite_image(path, lambda labels: np.where(np.arange(len(labels))[:, None, None] < 8, 6, labels))
    return shell


def _add_cascade(plans_file: Path) -> None:
    """Phantoms are too small for nnU-Net to plan a cascade, so its two configurations are written by hand."""
    configurations = json.loads(plans_file.read_text())["configurations"]
    fullres = configurations["3d_fullres"]
    configurations["3d_lowres"] = {
        **fullres, "data_identifier": "nnUNetPlans_3d_lowres", "spacing": [s * 1.3 for s in fullres["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }  # fmt: skip
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    edit_json(plans_file, configurations=configurations)


def _train_and_predict(shell: Shell, dataset: int, configuration: str, fold: str, plans: str, more: str = "") -> Path:
    model = f"-tr STUNetTrainer -p {plans} -device cpu"
    shell.run(f"nnUNetv2_train {dataset} {configuration} {fold} {model}", trainers=True)
    name = (REGIONS, IGNORE)[dataset - 1]
    place = f"-i nnUNet_raw/{name}/imagesTs -o predicted_{configuration}_{fold} -d {dataset} -c {configuration}"
    shell.run(f"nnUNetv2_predict {place} -f {fold} {model} -npp 0 -nps 0 {more}")
    (path,) = (shell.root / f"predicted_{configuration}_{fold}").glob("*.nii.gz")
    return path


def test_2d_with_regions(shell: Shell) -> None:
    # No plans yet: `stunet plan` has nnU-Net make them first.
    shell.run(f"stunet plan -d 1 -np 1 -c 2d --depth 1 --width 2 --name STUNetPlans_2d --set {TINY}")
    shell.run("nnUNetv2_preprocess -d 1 -plans_name STUNetPlans_2d -c 2d -np 1")
    labels = read_array(_train_and_predict(shell, 1, "2d", "0", "STUNetPlans_2d"))
    assert labels.shape == SHAPE
    assert set(np.unique(labels)) <= {0, 1, 3, 4, 5}


def test_3d_with_ignore_label_and_the_cascade(shell: Shell) -> None:
    shell.run("nnUNetv2_extract_fingerprint -d 2 -np 1")
    shell.run("nnUNetv2_plan_experiment -d 2")
    _add_cascade(shell.preprocessed / IGNORE / "nnUNetPlans.json")
    shell.run(f"stunet plan -d 2 --depth 1 --width 2 --name STUNetPlans_3d --set {TINY}")
    shell.run("nnUNetv2_preprocess -d 2 -plans_name STUNetPlans_3d -c 3d_lowres 3d_fullres -np 1")
    for configuration in ("3d_fullres", "3d_lowres"):
        path = _train_and_predict(shell, 2, configuration, "all", "STUNetPlans_3d")
        assert set(np.unique(read_array(path))) <= {0, 1, 2, 3, 4, 5}
    low = f"-prev_stage_predictions {path.parent}"
    assert read_array(_train_and_predict(shell, 2, "3d_cascade_fullres", "all", "STUNetPlans_3d", low)).shape == SHAPE
