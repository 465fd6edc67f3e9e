"""``stunet train``: alone, with settings that save memory, under torchrun, losing a process, from two launchers."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TRAINED, VENOUS
from integration.commands import Shell
from together import free_port

SETTINGS = (
    "num_epochs=3 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 save_every=1 batch_size=3 "
    "patch_size=[32,32,32] mirroring=none"
)
TRAIN = "stunet train 1 3d_fullres 0 -p STUNetPlans_whole -device cpu --seed 5"
SHARDED = TRAIN.replace("STUNetPlans_whole", "STUNetPlans_sharded")
TORCHRUN = "torchrun --max-restarts 2"
PLAN = "stunet plan -d 1 -c 3d_fullres --depth 1 --width 4"


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = trained.copy(tmp_path_factory.mktemp("train"))
    shell.run(f"{PLAN} --name STUNetPlans_whole --set {SETTINGS}")
    shell.run(f"{PLAN} --name STUNetPlans_sharded --set {SETTINGS} parallel=fsdp keep_every=2")
    return shell


@pytest.fixture(scope="module")
def weights(shell: Shell) -> Path:
    return shell.model(VENOUS, TRAINED) / "fold_0" / "checkpoint_final.pth"


def fold_of(shell: Shell, plans: str) -> Path:
    return shell.model(VENOUS, f"STUNetTrainer__{plans}__3d_fullres") / "fold_0"


def finish(shell: Shell, name: str, plans: str = "STUNetPlans_whole") -> dict[str, Any]:
    """The final checkpoint, the scores and the log, after moving the model's fold away."""
    fold = fold_of(shell, plans)
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    checkpoint["dice"] = summary["foreground_mean"]["Dice"]
    checkpoint["log"] = "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))
    fold.rename(shell.root / name)
    return checkpoint


def assert_same(checkpoint: dict[str, Any], expected: dict[str, Any], tolerance: float = 0) -> None:
    torch.testing.assert_close(checkpoint["network_weights"], expected["network_weights"], rtol=0, atol=tolerance)
    # The last gradients tell another order of summation apart by far more than weights do.
    torch.testing.assert_close(checkpoint["optimizer_state"], expected["optimizer_state"], rtol=0, atol=100 * tolerance)
    losses, theirs = (each["logging"]["train_losses"] for each in (checkpoint, expected))
    assert losses == pytest.approx(theirs, rel=tolerance, abs=0)


def test_a_seed_repeats_a_fine_tuning_without_any_variable(shell: Shell, weights: Path) -> None:
    line = f"stunet finetune -d 1 --from {weights} --name STUNetPlans_again -device cpu --seed 5 -np 1 --overwrite"
    runs = []
    for name in ("once", "twice"):
        shell.run(f"{line} --set {SETTINGS}", nnUNet_n_proc_DA=None)
        runs.append(finish(shell, name, "STUNetPlans_again"))
    assert_same(*runs)


def test_by_itself_with_another_batch(shell: Shell, weights: Path) -> None:
    # As after a restart before the first checkpoint, which begins with what was asked for.
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "x"}
    restarted = {**names, "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    output = shell.run(f"{TRAIN} --global-batch 2 -pretrained_weights {weights}", **restarted)
    assert f"Starting from the weights in {weights}" in output
    assert "Dice" in output
    plans = finish(shell, "alone")["init_args"]["plans"]
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 2


def test_micro_batches_and_small_momentum_train_as_the_whole_batch(shell: Shell) -> None:
    saving = "gradient_accumulation=3 momentum_dtype=bf16 fused_optimizer=true activation_checkpointing=all"
    checkpoints = []
    for name, more in (("STUNetPlans_plain", ""), ("STUNetPlans_low", saving)):
        shell.run(f"{PLAN} --name {name} --set {SETTINGS} num_epochs=2 batch_dice=true {more}")
        shell.run(TRAIN.replace("STUNetPlans_whole", name))
        checkpoints.append(finish(shell, name, name))
    plain, low = checkpoints
    losses = [checkpoint["logging"]["train_losses"] for checkpoint in checkpoints]
    # The first epoch's momentum is rounded once, and not used any more.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    momenta = [state["momentum_buffer"] for state in low["optimizer_state"]["state"].values()]
    assert {momentum.dtype for momentum in momenta} == {torch.bfloat16}
    assert plain["optimizer_state"]["state"].keys() == low["optimizer_state"]["state"].keys()


def test_what_cannot_be_trained_is_refused(shell: Shell, weights: Path) -> None:
    shell.run(f"{PLAN} --name STUNetPlans_many --set {SETTINGS} gradient_accumulation=4")
    for line, words in (
        (f"{TRAIN} --c --val", ("--c", "--val")),
        (f"{TRAIN} --c -pretrained_weights {weights}", ("--c", "-pretrained_weights")),
        (f"{TRAIN} -tr nnUNetTrainer", ("nnUNetTrainer",)),
        (f"{TRAIN} --global-batch 1 -num_gpus 2", ("1 samples for 2 processes",)),
        (TRAIN.replace("STUNetPlans_whole", "STUNetPlans_many"), ("gradient_accumulation=4", "3 samples")),
    ):
        said = shell.refuse(line, *words)
        assert said.lower().count("error:") == 1
        assert "torchrun" not in said
    assert not list(fold_of(shell, "STUNetPlans_whole").glob("checkpoint_*"))


@pytest.fixture(scope="module")
def undisturbed(shell: Shell) -> dict[str, Any]:
    """Two processes of one launcher."""
    shell.type(f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python {TRAIN}")
    return finish(shell, "undisturbed")


@pytest.mark.slow
def test_batch_and_logs_of_two_processes(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["current_epoch"] == 3
    assert undisturbed["log"].count("Epoch 2") == 1  # one process writes
    assert len(undisturbed["logging"]["train_losses"]) == 3


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_nothing_changes(shell: Shell, undisturbed: dict[str, Any]) -> None:
    # An earlier training has ended in this fold; resuming that would end at once.
    fold = fold_of(shell, "STUNetPlans_whole")
    fold.mkdir(parents=True, exist_ok=True)
    shutil.copy(shell.root / "undisturbed" / "checkpoint_final.pth", fold / "checkpoint_best.pth")
    (fold / "checkpoint_final.pth").write_bytes(b"of an earlier training")
    run_and_lose_one(shell, TRAIN, "Epoch 1", "STUNetPlans_whole")
    killed = finish(shell, "killed")
    assert (shell.root / "killed" / "checkpoint_final.pth.previous").read_bytes() == b"of an earlier training"
    assert killed["log"].count("Epoch 2") == 1
    assert_same(killed, undisturbed)


def run_and_lose_one(shell: Shell, line: str, when: str, plans: str) -> None:
    """Run a training in two processes, of which that of rank 1 is killed as soon as the log says something."""
    process = shell.start(f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python {line}")
    deadline = time.monotonic() + 600
    while not any(when in path.read_text() for path in fold_of(shell, plans).glob("training_log_*.txt")):
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


@pytest.mark.slow
def test_two_launchers_as_on_two_machines(shell: Shell, undisturbed: dict[str, Any]) -> None:
    end = f"--rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint 127.0.0.1:{free_port()} --no-python {TRAIN}"
    nodes = [shell.start(f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {end}") for _ in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=900)
        assert node.returncode == 0, output[-3000:]
    # Each has a machine's cores to itself, and more threads add up in another order.
    assert_same(finish(shell, "nodes"), undisturbed, tolerance=1e-4)


@pytest.mark.slow
def test_each_process_refuses_too_small_a_batch(shell: Shell) -> None:
    output = shell.type(f"torchrun --standalone --nproc-per-node 2 --no-python {TRAIN} --global-batch 1", status=1)
    assert "1 samples for 2 processes" in output


@pytest.fixture(scope="module")
def sharded(shell: Shell) -> dict[str, Any]:
    """Two processes that each have a shard of the network, and a prediction with what they leave."""
    assert "$ torchrun" in shell.type(f"{SHARDED} -num_gpus 2")
    fold = fold_of(shell, "STUNetPlans_sharded")
    assert sorted(path.name for path in fold.glob("*checkpoint_*")) == [
        "checkpoint_best.pth", "checkpoint_epoch_0002.pth", "checkpoint_final.pth",
    ]  # fmt: skip
    for name in ("final", "best"):
        shell.run(
            f"nnUNetv2_predict -i nnUNet_raw/{VENOUS}/imagesTs -o {name} -d 1 -c 3d_fullres -tr STUNetTrainer -f 0 "
            f"-p STUNetPlans_sharded -chk checkpoint_{name}.pth -device cpu -npp 0 -nps 0 --disable_tta"
        )
        assert len(list((shell.root / name).glob("*.nii.gz"))) == 1
    return finish(shell, "sharded", "STUNetPlans_sharded")


@pytest.mark.slow
def test_shards_train_as_the_whole_network(sharded: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert "among 2 processes" in sharded["log"]
    # Few steps at a high rate, in which other orders of summation show; equality is tested with smaller rates.
    losses, theirs = (each["logging"]["train_losses"] for each in (sharded, undisturbed))
    assert losses == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(sharded["network_weights"], undisturbed["network_weights"], rtol=0, atol=1e-3)
    assert sharded["optimizer_state"]["state"].keys() == undisturbed["optimizer_state"]["state"].keys()
    assert sharded["dice"] == pytest.approx(undisturbed["dice"], abs=0.01)


@pytest.mark.slow
def test_a_killed_process_with_a_shard_is_replaced(shell: Shell, sharded: dict[str, Any]) -> None:
    run_and_lose_one(shell, SHARDED, "Epoch 2", "STUNetPlans_sharded")
    killed = finish(shell, "sharded killed", "STUNetPlans_sharded")
    assert "continuing from checkpoint_" in killed["log"]
    assert killed["log"].count("Epoch 0 ") == 1
    assert killed["current_epoch"] == 3
    assert_same(killed, sharded)
