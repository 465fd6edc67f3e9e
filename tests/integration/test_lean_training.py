"""Training with the settings that save memory, as it is typed, beside training without them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from commands import Shell

from stunet.datasets import write_phantom_dataset

DATASET = "Dataset001_Phantoms"
SETTINGS = (
    "num_epochs=2 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 save_every=1 batch_size=3 "
    "patch_size=[32,32,32] mirroring=none"
)
PLAN = "stunet plan -d 1 -c 3d_fullres --depth 1 --width 2"
TRAIN = "nnUNet_n_proc_DA=0 stunet train 1 3d_fullres 0 -device cpu --seed 5"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell.make(tmp_path_factory.mktemp("lean"))
    write_phantom_dataset(shell.root / "nnUNet_raw" / DATASET, n_training=5, n_test=0)
    shell.run("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres -npfp 1 -np 1")
    return shell


def trained(shell: Shell, name: str, settings: str) -> dict[str, Any]:
    shell.run(f"{PLAN} --name {name} --set {SETTINGS} {settings}")
    shell.run(f"{TRAIN} -p {name}")
    fold = shell.model(DATASET, f"STUNetTrainer__{name}__3d_fullres") / "fold_0"
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    return torch.load(fold / "checkpoint_final.pth", weights_only=False)


def test_pieces_and_lean_momentum_train_as_the_whole_batch(shell: Shell) -> None:
    plain = trained(shell, "STUNetPlans_plain", "batch_dice=true")
    lean = trained(
        shell,
        "STUNetPlans_lean",
        "batch_dice=true gradient_accumulation=3 momentum_dtype=bf16 fused_optimizer=true activation_checkpointing=all",
    )
    losses = [checkpoint["logging"]["train_losses"] for checkpoint in (plain, lean)]
    # The first epoch's momentum is rounded once, and not used any more.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)
    momenta = [state["momentum_buffer"] for state in lean["optimizer_state"]["state"].values()]
    assert {momentum.dtype for momentum in momenta} == {torch.bfloat16}
    assert plain["optimizer_state"]["state"].keys() == lean["optimizer_state"]["state"].keys()


def test_more_pieces_than_samples(shell: Shell) -> None:
    shell.run(f"{PLAN} --name STUNetPlans_pieces --set {SETTINGS} gradient_accumulation=4")
    process = shell.start(f"{TRAIN} -p STUNetPlans_pieces")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "gradient_accumulation=4 for 3 samples" in output
    assert "Traceback" not in output
