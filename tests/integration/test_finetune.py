"""Fine-tuning: stunet finetune, its stock equivalents and refusals, and when it is terminated, on generated data."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import TRAINED, VENOUS
from integration.commands import Shell, edit_json, read_array, rewrite_image

from stunet.datasets.phantoms import write_phantom_dataset
from stunet.weights.read import read_checkpoint

TINY = "num_epochs=2 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 batch_size=2 mirroring=none"
TARGET = "Dataset003_Target"
STEM = "encoder.stages.0.0.conv1.weight"


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Beside the trained model a dataset with a second channel, other spellings and one structure fewer."""
    shell = trained.copy(tmp_path_factory.mktemp("finetune"))
    target = shell.raw / TARGET
    write_phantom_dataset(target, n_training=5, n_test=1, seed=3)
    for image in [*target.glob("imagesT*/*_0000.nii.gz")]:
        rewrite_image(image, np.negative, Path(str(image).replace("_0000", "_0001")))
    for path in (target / "labelsTr").glob("*.nii.gz"):
        rewrite_image(path, lambda labels: np.where(labels == 5, 0, labels))  # no aorta here
    labels = {"background": 0, "Liver": 1, "Spleen": 2, "tumour": 3, "spine": 4}
    edit_json(target / "dataset.json", channel_names={"0": "CT", "1": "negative"}, labels=labels)
    return shell


@pytest.fixture(scope="module")
def source(shell: Shell) -> Path:
    """A checkpoint; the model's other ones are of earlier epochs."""
    return shell.model(VENOUS, TRAINED) / "fold_0" / "checkpoint_final.pth"


@pytest.fixture(scope="module")
def fine_tuned(shell: Shell, source: Path) -> tuple[Path, str]:
    """The whole way in one command, on a dataset that nnU-Net has never seen; and what was printed."""
    output = shell.run(
        f"stunet finetune -d 3 -c 3d_fullres -f 0 --from {source} --strategy frozen-encoder --name P_frozen "
        f"-device cpu -np 1 --set {TINY}"
    )
    return shell.model(TARGET, "STUNetTrainer__P_frozen__3d_fullres"), output


def transfer_report(model: Path, fold: int) -> dict[str, Any]:
    return json.loads((model / f"fold_{fold}" / "weight_transfer.json").read_text())


def test_one_command_plans_preprocesses_and_trains(source: Path, fine_tuned: tuple[Path, str]) -> None:
    model, output = fine_tuned
    assert "$ nnUNetv2_preprocess -d 3 -plans_name P_frozen -c 3d_fullres -np 1" in output
    assert "$ nnUNetv2_train 3 3d_fullres 0 -tr STUNetTrainer -p P_frozen -device cpu" in output
    assert "Learning rates (frozen-encoder): heads 0.001, decoder 0.001" in output
    assert "Mean Validation Dice" in output
    report = transfer_report(model, 0)
    assert report["head"]["structures"] == {
        "background": "background", "Liver": "liver", "Spleen": "spleen", "tumour": None, "spine": "spine",
    }  # fmt: skip
    assert report["stem"] == {"policy": "repeat-scaled", "source": 1, "target": 2}
    before = read_checkpoint(source)["network_weights"]
    after = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    for key, value in after.items():
        if key.startswith("encoder.") and value.shape == before[key].shape:
            assert torch.equal(value, before[key])
    assert torch.equal(after[STEM], before[STEM].repeat(1, 2, 1, 1, 1) / 2)
    assert not torch.equal(after["decoder.stages.0.0.conv1.weight"], before["decoder.stages.0.0.conv1.weight"])


def test_stock_prediction_without_trainers(shell: Shell, fine_tuned: tuple[Path, str]) -> None:
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{TARGET}/imagesTs -o predicted -d 3 -c 3d_fullres -f 0 -tr STUNetTrainer "
        "-p P_frozen -device cpu -npp 0 -nps 0"
    )
    (path,) = (shell.root / "predicted").glob("*.nii.gz")
    assert set(np.unique(read_array(path))) <= set(range(5))


def test_an_earlier_training_is_not_overwritten(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    options = f"--from {source} --strategy frozen-encoder --name P_frozen -device cpu -np 1 --set {TINY}"
    shell.refuse(f"stunet finetune -d 3 -f 0 {options}", "checkpoint_final.pth", "--overwrite")


@pytest.mark.slow
def test_a_terminated_fine_tuning_resumes(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    """Nobody else trains in its fold meanwhile, and SIGTERM leaves no process behind."""
    settings = TINY.replace("num_epochs=2", "num_epochs=4") + " save_every=1 warmup_epochs=1 initial_lr=0.004"
    options = f"--from {source} --strategy warmup --name P_killed -device cpu -np 1 --set {settings}"
    command, log = f"stunet finetune -d 3 -f 1 {options}", shell.root / "terminated.log"
    process = shell.start(f"exec {command} > {log} 2>&1", nnUNet_n_proc_DA="1")
    deadline = time.monotonic() + 900
    while "Epoch 2" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    training = psutil.Process(process.pid)
    training.suspend()
    children = training.children(recursive=True)
    assert children
    shell.refuse(command, "another training of the same fold")
    training.terminate()
    training.resume()
    _, alive = psutil.wait_procs([training, *children], timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    fold = shell.model(TARGET, "STUNetTrainer__P_killed__3d_fullres") / "fold_1"
    epoch = read_checkpoint(fold / "checkpoint_latest.pth")["current_epoch"]
    output = shell.run(f"{command} --c")
    assert "Starting from" not in output  # neither the weights nor the schedule start again
    # decoder first, then all, then decay over the two epochs that are left
    planned = [(0.004, 0.0), (0.004, 0.004), (0.004, 0.004), (0.004 * 0.5**0.9,) * 2]
    rates = re.findall(r"Learning rates \(warmup\): heads (\S+), decoder \S+, encoder (\S+)", output)
    resumed = [(float(heads), float(encoder)) for heads, encoder in rates]
    assert resumed == [pytest.approx(pair, rel=1e-2) for pair in planned[epoch:]]
    assert read_checkpoint(fold / "checkpoint_final.pth")["current_epoch"] == 4


def test_stock_training_with_the_weights_in_the_plans(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    output = shell.run(f"stunet plan -d 3 --from {source} --name P_stock --set {TINY} stem=zero-new head=fresh")
    assert "leading channels copied, the others 0" in " ".join(output.split())
    shell.run("nnUNetv2_train 3 3d_fullres 2 -tr STUNetTrainer_ft -p P_stock -device cpu", trainers=True)
    report = transfer_report(shell.model(TARGET, "STUNetTrainer_ft__P_stock__3d_fullres"), 2)
    assert report["source"] == str(source)
    assert len(report["fresh"]) == 10
    plans = json.loads((shell.preprocessed / TARGET / "P_stock.json").read_text())
    assert "stunet" not in plans["configurations"]["2d"]  # 3D weights say nothing about it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-c 2d", ("2D", "3D weights")),
        ("-c 3d_fullres --size base", ("size", "base")),
        ("-c 3d_fullres --strategy gentle", ("'gentle' is not one of 'full', 'warmup'",)),
        ("-c 3d_fullres --set stem=mean", ("mean", "repeat-scaled, first, zero-new, random")),
    ],
)
def test_refusals_before_anything_is_written(
    shell: Shell, source: Path, arguments: str, words: tuple[str, ...], fine_tuned: tuple[Path, str]
) -> None:
    shell.refuse(f"stunet plan -d 3 -np 1 --from {source} --name P_refused {arguments}", *words)
    assert not (shell.preprocessed / TARGET / "P_refused.json").exists()


def test_an_interrupted_preprocessing_is_done_again(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    data = shell.preprocessed / TARGET / "nnUNetPlans_3d_fullres"
    min(data.glob("*.pkl")).unlink()
    command = f"stunet finetune -d 3 -f 3 --from {source} --strategy head-only --name P_head -device cpu -np 1"
    assert "$ nnUNetv2_preprocess" in shell.run(f"{command} --set {TINY} num_epochs=1")
    assert len(list(data.glob("*.pkl"))) == 5
