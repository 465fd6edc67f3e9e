"""Real MR images through the commands that a user of nnU-Net calls, with trainings that are killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from integration.commands import Shell, edit_json, read_array

from stunet.weights.read import read_checkpoint

pytestmark = pytest.mark.slow

DATASET = "Dataset004_Hippocampus"
SETTINGS = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "batch_size": 2}
TINY = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
SMALL = "-tr STUNetTrainer_small -p STUNetPlans_small -device cpu"


@pytest.fixture(scope="module")
def shell(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Ten real cases, planned and preprocessed by nnU-Net."""
    shell = Shell.make(tmp_path_factory.mktemp("real"))
    source, target = shared / "data" / DATASET, shell.raw / DATASET
    labels = sorted((source / "labelsTr").glob("*.nii.gz"))[:10]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for label in labels:
        shutil.copy(label, target / "labelsTr")
        shutil.copy(source / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz"), target / "imagesTr")
    shutil.copy(source / "dataset.json", target)
    edit_json(target / "dataset.json", numTraining=len(labels))
    shell.type("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 1 -np 1", nnUNet_n_proc_DA="1")
    return shell


@pytest.fixture(scope="module")
def small_model(shell: Shell) -> Path:
    """A small STU-Net after ``nnUNetv2_train -tr STUNetTrainer_small``, shortened through the plans."""
    shell.run(f"stunet plan -d 4 --size small -c 3d_fullres --set {TINY}")
    output = shell.type(f"nnUNetv2_train 4 3d_fullres 0 {SMALL}", trainers=True, nnUNet_n_proc_DA="1")
    assert "STU-Net small" in output
    assert "Epoch 1" in output
    assert "Epoch 2" not in output
    assert "Mean Validation Dice" in output
    return shell.model(DATASET, "STUNetTrainer_small__STUNetPlans_small__3d_fullres")


def images(shell: Shell, model: Path) -> Path:
    """The validation cases as input for prediction, and nothing else."""
    folder = shell.root / f"input_{model.name}"
    folder.mkdir(exist_ok=True)
    for case in (model / "fold_0" / "validation").glob("*.nii.gz"):
        shutil.copy(shell.raw / DATASET / "imagesTr" / case.name.replace(".nii.gz", "_0000.nii.gz"), folder)
    return folder


def assert_same_as_validation(predictions: Path, model: Path) -> None:
    """The network in memory after training and the one loaded from the model folder segment alike."""
    cases = sorted((model / "fold_0" / "validation").glob("*.nii.gz"))
    assert len(cases) == 2
    for case in cases:
        assert np.mean(read_array(case) == read_array(predictions / case.name)) > 0.999


def test_the_model_folder_describes_itself(small_model: Path) -> None:
    plans = json.loads((small_model / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["network_class_name"] == "stunet.network.STUNet"
    checkpoint = read_checkpoint(small_model / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["current_epoch"] == 2
    assert checkpoint["init_args"]["plans"] == plans
    assert not list(small_model.rglob("*.tmp")) + list(small_model.rglob(".*.tmp"))


def test_prediction_needs_no_trainer(shell: Shell, small_model: Path) -> None:
    folder = images(shell, small_model)
    shell.run(f"nnUNetv2_predict -i {folder} -o predicted -d 4 -c 3d_fullres -f 0 {SMALL} -npp 0 -nps 0")
    assert_same_as_validation(shell.root / "predicted", small_model)
    by_folder = f"nnUNetv2_predict_from_modelfolder -i {folder} -o again -m {small_model} -f 0 -device cpu"
    shell.type(f"{by_folder} -npp 1 -nps 1")
    assert_same_as_validation(shell.root / "again", small_model)


def test_ordinary_plans_with_settings_of_ones_own(shell: Shell) -> None:
    """Nothing but a block in nnUNetPlans.json, as a user would write it by hand."""
    path = shell.preprocessed / DATASET / "nnUNetPlans.json"
    before = path.read_text()
    configurations = json.loads(before)["configurations"]
    configurations["3d_fullres"]["stunet"] = SETTINGS
    edit_json(path, configurations=configurations)
    try:
        shell.run("nnUNetv2_train 4 3d_fullres 1 -tr STUNetTrainer_small_ft -device cpu", trainers=True)
    finally:
        path.write_text(before)
    model = shell.model(DATASET, "STUNetTrainer_small_ft__nnUNetPlans__3d_fullres")
    log = next((model / "fold_1").glob("training_log*.txt")).read_text()
    assert "Current learning rate: 0.001" in log
    saved = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert saved["batch_size"] == 2
    assert saved["architecture"]["arch_kwargs"]["features_per_stage"][0] == 16


def test_stock_trainer_with_our_plans_and_no_trainers_folder(shell: Shell) -> None:
    shell.run("stunet plan -d 4 --depth 1 --width 2 -c 3d_fullres --set batch_size=2 --name STUNetPlans_narrow")
    # nnU-Net's shortest trainer that is not a benchmark: one epoch of 250 iterations.
    options = "-tr nnUNetTrainer_1epoch -p STUNetPlans_narrow -device cpu"
    shell.run(f"nnUNetv2_train 4 3d_fullres 0 {options}")
    model = shell.model(DATASET, "nnUNetTrainer_1epoch__STUNetPlans_narrow__3d_fullres")
    folder = images(shell, model)
    shell.run(f"nnUNetv2_predict -i {folder} -o stock -d 4 -c 3d_fullres -f 0 {options} -npp 0 -nps 0")
    assert_same_as_validation(shell.root / "stock", model)


def test_pretrained_weights_of_nnunet(shell: Shell, small_model: Path) -> None:
    weights = small_model / "fold_0" / "checkpoint_final.pth"
    output = shell.run(f"nnUNetv2_train 4 3d_fullres 2 {SMALL} -pretrained_weights {weights}", trainers=True)
    assert "encoder.stages.0.0.conv1.weight shape" in output
    assert "decoder.seg_layers.4.weight shape" not in output


def test_killed_in_mid_epoch_and_in_mid_checkpoint(shell: Shell) -> None:
    """SIGKILL twice; in the end the run has all its epochs, and those that were saved are untouched."""
    settings = TINY.replace("num_epochs=2", "num_epochs=4") + " save_every=1"
    shell.run(f"stunet plan -d 4 --size small -c 3d_fullres --name STUNetPlans_killed --set {settings}")
    train = "nnUNetv2_train 4 3d_fullres 0 -tr STUNetTrainer_small -p STUNetPlans_killed -device cpu"
    fold = shell.model(DATASET, "STUNetTrainer_small__STUNetPlans_killed__3d_fullres") / "fold_0"
    latest = fold / "checkpoint_latest.pth"

    shell.type_and_kill(train, lambda log: "Epoch 1\n" in log.replace(" \n", "\n") and latest.exists())
    saved = read_checkpoint(latest)
    assert saved["current_epoch"] == 1

    # A file of 120 MB takes long enough to write to be caught at it.
    shell.type_and_kill(f"{train} --c", lambda log: "Epoch 2" in log and any(fold.glob(".checkpoint_latest.pth.*.tmp")))
    assert any(fold.glob(".checkpoint_latest.pth.*.tmp")), "killed too late to interrupt the checkpoint"
    complete = read_checkpoint(latest)
    assert complete["current_epoch"] == 2
    assert complete["logging"]["train_losses"][:1] == saved["logging"]["train_losses"]

    output = shell.run(f"{train} --c", trainers=True)
    assert "Epoch 3" in output
    assert "Epoch 0" not in output
    final = read_checkpoint(fold / "checkpoint_final.pth")
    assert final["current_epoch"] == 4
    assert final["logging"]["train_losses"][:2] == complete["logging"]["train_losses"]
    assert all(len(values) == 4 for values in final["logging"].values())
    assert not any(fold.glob(".*.tmp"))


def test_a_truncated_checkpoint_is_explained(shell: Shell, small_model: Path) -> None:
    final = small_model / "fold_0" / "checkpoint_final.pth"
    content = final.read_bytes()
    final.write_bytes(content[: len(content) // 2])
    try:
        output = shell.run(f"nnUNetv2_train 4 3d_fullres 0 {SMALL} --c", trainers=True, status=1)
    finally:
        final.write_bytes(content)
    assert "truncated or damaged" in output
    assert str(final) in output
