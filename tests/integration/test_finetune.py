"""Fine-tuning as it is typed: stunet finetune, its stock equivalents, kills and refusals, on generated data."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from commands import Shell

from stunet.datasets import write_phantom_dataset
from stunet.weights import read_checkpoint

TINY = "num_epochs=2 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 batch_size=2"
SOURCE, TARGET = "Dataset001_Source", "Dataset002_Target"
STEM = "encoder.stages.0.0.conv1.weight"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Two phantom datasets; the second has a second channel, other spellings and one structure fewer."""
    shell = Shell.make(tmp_path_factory.mktemp("finetune"))
    for name in (SOURCE, TARGET):
        write_phantom_dataset(shell.root / "nnUNet_raw" / name, n_training=6, n_test=1, seed=len(name))
    target = shell.root / "nnUNet_raw" / TARGET
    for image in [*target.glob("imagesT*/*_0000.nii.gz")]:
        second = sitk.ReadImage(str(image)) * -1
        sitk.WriteImage(second, str(image).replace("_0000", "_0001"))
    for path in (target / "labelsTr").glob("*.nii.gz"):
        labels = sitk.ReadImage(str(path))
        sitk.WriteImage(sitk.ChangeLabel(labels, {5: 0}), str(path))  # no aorta here
    dataset_json = json.loads((target / "dataset.json").read_text())
    dataset_json["channel_names"] = {"0": "CT", "1": "negative"}
    dataset_json["labels"] = {"background": 0, "Liver": 1, "Spleen": 2, "tumour": 3, "spine": 4}
    (target / "dataset.json").write_text(json.dumps(dataset_json))
    return shell


@pytest.fixture(scope="module")
def source(shell: Shell) -> Path:
    """A model folder with one trained fold."""
    shell.run(f"stunet plan -d 1 -np 1 -c 3d_fullres --depth 1 --width 2 --name P_source --set {TINY}")
    shell.run("nnUNetv2_preprocess -d 1 -plans_name P_source -c 3d_fullres -np 1")
    shell.run("nnUNetv2_train 1 3d_fullres 0 -tr STUNetTrainer -p P_source -device cpu", trainers=True)
    return shell.model(SOURCE, "STUNetTrainer__P_source__3d_fullres")


def transfer_report(shell: Shell, plans_name: str, fold: int = 0) -> dict[str, object]:
    model = shell.model(TARGET, f"STUNetTrainer__{plans_name}__3d_fullres")
    return json.loads((model / f"fold_{fold}" / "weight_transfer.json").read_text())


@pytest.fixture(scope="module")
def fine_tuned(shell: Shell, source: Path) -> tuple[Path, str]:
    """The whole way in one command, on a dataset that nnU-Net has never seen; and what was printed."""
    output = shell.run(
        f"stunet finetune -d 2 -c 3d_fullres -f 0 --from {source} --strategy frozen-encoder --name P_frozen "
        f"-device cpu -np 1 --set {TINY}"
    )
    return shell.model(TARGET, "STUNetTrainer__P_frozen__3d_fullres"), output


def test_one_command_plans_preprocesses_and_trains(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    model, output = fine_tuned
    assert "$ nnUNetv2_preprocess -d 2 -plans_name P_frozen -c 3d_fullres -np 1" in output
    assert "$ nnUNetv2_train 2 3d_fullres 0 -tr STUNetTrainer -p P_frozen -device cpu" in output
    assert "Learning rates (frozen-encoder): heads 0.001, decoder 0.001" in output
    assert "Mean Validation Dice" in output
    report = transfer_report(shell, "P_frozen")
    assert report["head"]["structures"] == {  # type: ignore[index]
        "background": "background", "Liver": "liver", "Spleen": "spleen", "tumour": None, "spine": "spine",
    }  # fmt: skip
    assert report["stem"] == {"policy": "repeat-scaled", "source": 1, "target": 2}
    before = read_checkpoint(source / "fold_0" / "checkpoint_final.pth")["network_weights"]
    after = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    for key, value in after.items():
        if key.startswith("encoder.") and value.shape == before[key].shape:
            assert torch.equal(value, before[key])
    assert torch.equal(after[STEM], before[STEM].repeat(1, 2, 1, 1, 1) / 2)
    assert not torch.equal(after["decoder.stages.0.0.conv1.weight"], before["decoder.stages.0.0.conv1.weight"])


def test_stock_prediction_without_trainers(shell: Shell, fine_tuned: tuple[Path, str]) -> None:
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{TARGET}/imagesTs -o predicted -d 2 -c 3d_fullres -f 0 -tr STUNetTrainer "
        "-p P_frozen -device cpu -npp 1 -nps 1"
    )
    (path,) = (shell.root / "predicted").glob("*.nii.gz")
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) <= set(range(5))


def test_an_earlier_training_is_not_overwritten(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    process = shell.start(
        f"stunet finetune -d 2 -f 0 --from {source} --strategy frozen-encoder --name P_frozen -device cpu -np 1 "
        f"--set {TINY}"
    )
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "an earlier training that would be overwritten" in output
    assert "Traceback" not in output


def test_a_terminated_fine_tuning_resumes(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    """Nobody else trains in its fold meanwhile, and SIGTERM leaves no process behind."""
    settings = TINY.replace("num_epochs=2", "num_epochs=4") + " save_every=1 warmup_epochs=1 initial_lr=0.004"
    command = (
        f"stunet finetune -d 2 -f 1 --from {source} --strategy warmup --name P_killed -device cpu -np 1 "
        f"--set {settings}"
    )
    process, log = shell.start(f"exec {command} > terminated.log 2>&1"), shell.root / "terminated.log"
    deadline = time.monotonic() + 300
    while "Epoch 2" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    training = psutil.Process(process.pid)
    training.suspend()
    children = training.children(recursive=True)
    assert children
    second = shell.start(command)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 2, output
    assert "another training of the same fold" in output
    assert "Traceback" not in output
    training.terminate()
    training.resume()
    _, alive = psutil.wait_procs([training, *children], timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    model = shell.model(TARGET, "STUNetTrainer__P_killed__3d_fullres")
    epoch = read_checkpoint(model / "fold_1" / "checkpoint_latest.pth")["current_epoch"]
    output = shell.run(f"{command} --c")
    assert "Starting from" not in output  # neither the weights nor the schedule start again
    # decoder first, then all, then decay over the two epochs that are left
    planned = [(0.004, 0.0), (0.004, 0.004), (0.004, 0.004), (0.004 * 0.5**0.9,) * 2]
    rates = re.findall(r"Learning rates \(warmup\): heads (\S+), decoder \S+, encoder (\S+)", output)
    resumed = [(float(heads), float(encoder)) for heads, encoder in rates]
    assert resumed == [pytest.approx(pair, rel=1e-2) for pair in planned[epoch:]]
    assert read_checkpoint(model / "fold_1" / "checkpoint_final.pth")["current_epoch"] == 4


def test_stock_training_with_the_weights_in_the_plans(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    checkpoint = source / "fold_0" / "checkpoint_final.pth"
    output = shell.run(f"stunet plan -d 2 --from {checkpoint} --name P_stock --set {TINY} stem=zero-new head=fresh")
    assert "leading channels copied, the others 0" in output
    shell.run("nnUNetv2_train 2 3d_fullres 2 -tr STUNetTrainer_ft -p P_stock -device cpu", trainers=True)
    model = shell.model(TARGET, "STUNetTrainer_ft__P_stock__3d_fullres")
    report = json.loads((model / "fold_2" / "weight_transfer.json").read_text())
    assert report["source"] == str(checkpoint)
    assert len(report["fresh"]) == 10
    plans = json.loads((shell.root / "nnUNet_preprocessed" / TARGET / "P_stock.json").read_text())
    assert "stunet" not in plans["configurations"]["2d"]  # 3D weights say nothing about it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-c 2d", "a 2D network from 3D weights"),
        ("-c 3d_fullres --size base", "a size that is not that of the weights"),
        ("-c 3d_fullres --strategy gentle", "'gentle' is not one of 'full', 'warmup'"),
        ("-c 3d_fullres --set stem=mean", "one of repeat-scaled, first, zero-new, random"),
    ],
)
def test_refusals_before_anything_is_written(shell: Shell, source: Path, arguments: str, message: str) -> None:
    process = shell.start(f"stunet plan -d 2 -np 1 --from {source} --name P_refused {arguments}")
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert message in output
    assert "Traceback" not in output
    assert not (shell.root / "nnUNet_preprocessed" / TARGET / "P_refused.json").exists()


def test_an_interrupted_preprocessing_is_done_again(shell: Shell, source: Path, fine_tuned: tuple[Path, str]) -> None:
    data = shell.root / "nnUNet_preprocessed" / TARGET / "nnUNetPlans_3d_fullres"
    next(iter(sorted(data.glob("*.pkl")))).unlink()
    command = f"stunet finetune -d 2 -f 3 --from {source} --strategy head-only --name P_head -device cpu -np 1"
    output = shell.run(f"{command} --set {TINY} num_epochs=1")
    assert "$ nnUNetv2_preprocess" in output
    assert len(list(data.glob("*.pkl"))) == 6
