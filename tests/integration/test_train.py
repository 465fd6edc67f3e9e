"""``stunet train`` as it is typed: by itself, under torchrun, with a process killed, and from two launchers."""

from __future__ import annotations

import json
import shutil
import signal
import time
from typing import Any

import psutil
import pytest
import torch
from commands import Shell
from test_ranks import free_port

from stunet.datasets import write_phantom_dataset

DATASET = "Dataset001_Phantoms"
SETTINGS = (
    "num_epochs=3 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 save_every=1 batch_size=3 "
    "patch_size=[32,32,32] mirroring=none"
)
TRAIN = "stunet train 1 3d_fullres 0 -p STUNetPlans_narrow -device cpu --seed 5"
TORCHRUN = "nnUNet_n_proc_DA=0 torchrun --max-restarts 2"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell.make(tmp_path_factory.mktemp("train"))
    write_phantom_dataset(shell.root / "nnUNet_raw" / DATASET, n_training=5, n_test=0)
    shell.run("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres -npfp 1 -np 1")
    plan = "stunet plan -d 1 -c 3d_fullres --depth 1 --width 4"
    shell.run(f"{plan} --name STUNetPlans_narrow --set {SETTINGS}")
    shell.run(f"{plan} --name STUNetPlans_pieces --set {SETTINGS} parallel=fsdp keep_every=2")
    return shell


def finish(shell: Shell, name: str, plans: str = "STUNetPlans_narrow") -> dict[str, Any]:
    """The final checkpoint and the scores, after moving the model's fold away."""
    fold = shell.model(DATASET, f"STUNetTrainer__{plans}__3d_fullres") / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    checkpoint["dice"] = summary["foreground_mean"]["Dice"]
    assert len(summary["metric_per_case"]) == 1
    logs = "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))
    checkpoint["log"] = logs
    fold.rename(shell.root / name)
    return checkpoint


@pytest.fixture(scope="module")
def undisturbed(shell: Shell) -> dict[str, Any]:
    """Two processes of one launcher."""
    shell.run(f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python {TRAIN}")
    return finish(shell, "undisturbed")


def test_batch_and_logs_of_two_processes(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["current_epoch"] == 3
    assert undisturbed["log"].count("Epoch 2") == 1  # one process writes
    assert len(undisturbed["logging"]["train_losses"]) == 3


def test_a_killed_process_is_replaced_and_nothing_changes(shell: Shell, undisturbed: dict[str, Any]) -> None:
    # An earlier training has ended in this fold; going on from that would end at once.
    fold = shell.model(DATASET, "STUNetTrainer__STUNetPlans_narrow__3d_fullres") / "fold_0"
    fold.mkdir(parents=True)
    shutil.copy(shell.root / "undisturbed" / "checkpoint_final.pth", fold / "checkpoint_best.pth")
    (fold / "checkpoint_final.pth").write_bytes(b"of an earlier training")
    run_and_lose_one(shell, f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python {TRAIN}", "Epoch 1")
    killed = finish(shell, "killed")
    assert (shell.root / "killed" / "checkpoint_final.pth.previous").read_bytes() == b"of an earlier training"
    assert killed["log"].count("Epoch 2") == 1
    _assert_same(killed, undisturbed)


def run_and_lose_one(shell: Shell, line: str, when: str, plans: str = "STUNetPlans_narrow") -> None:
    """Run a training whose process of rank 1 is killed as soon as the log says something."""
    fold = shell.model(DATASET, f"STUNetTrainer__{plans}__3d_fullres") / "fold_0"
    process = shell.start(line)
    deadline = time.monotonic() + 600
    while not any(when in path.read_text() for path in fold.glob("training_log_*.txt")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (second,) = (p for p in psutil.Process(process.pid).children(recursive=True) if _rank(p) == "1")
    second.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]


def _rank(process: psutil.Process) -> str | None:
    try:
        environment = process.environ()
    except psutil.Error:
        return None
    return environment.get("RANK") if "stunet" in " ".join(process.cmdline()) else None


def test_a_seed_repeats_a_fine_tuning_without_any_variable(shell: Shell, undisturbed: dict[str, Any]) -> None:
    source = shell.root / "undisturbed" / "checkpoint_final.pth"
    line = f"stunet finetune -d 1 --from {source} --name STUNetPlans_again -device cpu --seed 5 -np 1 --overwrite"
    trained = []
    for name in ("once", "twice"):
        shell.run(f"env -u nnUNet_n_proc_DA {line} --set {SETTINGS}")
        trained.append(finish(shell, name, "STUNetPlans_again"))
    _assert_same(*trained)


def test_two_launchers_as_on_two_machines(shell: Shell, undisturbed: dict[str, Any]) -> None:
    end = f"--rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint 127.0.0.1:{free_port()} --no-python {TRAIN}"
    nodes = [shell.start(f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {end}") for _ in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=900)
        assert node.returncode == 0, output[-3000:]
    # Each has a machine's cores to itself, and more threads add up in another order.
    _assert_same(finish(shell, "nodes"), undisturbed, tolerance=1e-4)


def _assert_same(checkpoint: dict[str, Any], expected: dict[str, Any], tolerance: float = 0) -> None:
    for part in ("network_weights", "optimizer_state"):
        torch.testing.assert_close(checkpoint[part], expected[part], rtol=0, atol=tolerance)
    losses, theirs = (each["logging"]["train_losses"] for each in (checkpoint, expected))
    assert losses == pytest.approx(theirs, rel=tolerance, abs=0)


PIECES = TRAIN.replace("STUNetPlans_narrow", "STUNetPlans_pieces")


@pytest.fixture(scope="module")
def in_pieces(shell: Shell) -> dict[str, Any]:
    """Two processes that each have a piece of the network, and a prediction with what they leave."""
    output = shell.run(f"nnUNet_n_proc_DA=0 {PIECES} -num_gpus 2")
    assert "$ torchrun" in output
    model = shell.model(DATASET, "STUNetTrainer__STUNetPlans_pieces__3d_fullres")
    assert sorted(path.name for path in (model / "fold_0").glob("*checkpoint_*")) == [
        "checkpoint_best.pth", "checkpoint_epoch_0002.pth", "checkpoint_final.pth",
    ]  # fmt: skip
    (image, *_) = sorted((shell.root / "nnUNet_raw" / DATASET / "imagesTr").iterdir())
    images = shell.root / "images"
    images.mkdir()
    (images / image.name).symlink_to(image)
    for name in ("final", "best"):
        shell.run(
            f"nnUNetv2_predict_from_modelfolder -i images -o {name} -m {model} -f 0 -chk checkpoint_{name}.pth "
            "-device cpu -npp 1 -nps 1 --disable_tta"
        )
        assert len(list((shell.root / name).glob("*.nii.gz"))) == 1
    return finish(shell, "pieces", "STUNetPlans_pieces")


def test_in_pieces_as_with_the_whole_network(in_pieces: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert "The network is sharded among 2 processes" in in_pieces["log"]
    # Few steps at a high rate, in which other orders of summation show; equality is tested with smaller rates.
    losses, theirs = (each["logging"]["train_losses"] for each in (in_pieces, undisturbed))
    assert losses == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(in_pieces["network_weights"], undisturbed["network_weights"], rtol=0, atol=1e-3)
    assert in_pieces["optimizer_state"]["state"].keys() == undisturbed["optimizer_state"]["state"].keys()
    assert in_pieces["dice"] == pytest.approx(undisturbed["dice"], abs=0.01)


def test_a_killed_process_with_a_piece_is_replaced(shell: Shell, in_pieces: dict[str, Any]) -> None:
    line = f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python {PIECES}"
    run_and_lose_one(shell, line, "Epoch 2", "STUNetPlans_pieces")
    killed = finish(shell, "pieces killed", "STUNetPlans_pieces")
    assert "continuing from checkpoint_" in killed["log"]
    assert killed["log"].count("Epoch 0 ") == 1
    assert killed["current_epoch"] == 3
    _assert_same(killed, in_pieces)


def test_by_itself_with_another_batch(shell: Shell, undisturbed: dict[str, Any]) -> None:
    # As after a restart before the first checkpoint, which begins with what was asked for.
    restarted = "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=x MASTER_PORT=1 "
    weights = shell.root / "undisturbed" / "checkpoint_final.pth"
    line = f"{TRAIN} --global-batch 2 -pretrained_weights {weights}"
    output = shell.run(f"{restarted} TORCHELASTIC_RESTART_COUNT=1 {line}")
    assert f"Starting from the weights in {weights}" in output
    assert "Dice" in output
    alone = finish(shell, "alone")
    assert alone["init_args"]["plans"]["configurations"]["3d_fullres"]["batch_size"] == 2


def test_what_cannot_be_trained_is_said(shell: Shell) -> None:
    few = f"torchrun --standalone --nproc-per-node 2 --no-python {TRAIN} --global-batch 1"
    for line, problem in (
        (f"{TRAIN} --c --val", "two things to do"),
        (
            f"{TRAIN} --c -pretrained_weights {shell.root / 'undisturbed' / 'checkpoint_final.pth'}",
            "two things to start",
        ),
        (f"{TRAIN} -tr nnUNetTrainer", "nnUNetTrainer"),
        (few, "1 samples for 2 processes"),
        (f"{TRAIN} --global-batch 1 -num_gpus 2", "1 samples for 2 processes"),
    ):
        process = shell.start(line)
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert problem in output
        assert "remedy:" in output
    assert output.count("remedy:") == 1  # -num_gpus starts nothing that would say so again and again
    fold = shell.model(DATASET, "STUNetTrainer__STUNetPlans_narrow__3d_fullres") / "fold_0"
    assert not list(fold.glob("checkpoint_*"))
