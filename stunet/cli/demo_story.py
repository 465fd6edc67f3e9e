"""The demo's story: pre-train on partly annotated cases, pick a checkpoint, fine-tune it beside scratch, predict."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.cli.console import stdout
from stunet.cli.demo_training import (
    ITERATIONS_PER_EPOCH,
    as_options,
    draw_cases,
    predict_and_score,
    print_dice,
    train,
    training_settings,
)
from stunet.cli.demo_workspace import Workspace, batch_settings
from stunet.datasets import PHANTOM_LABELS, write_phantom_dataset, write_phantom_masks
from stunet.files import write_json
from stunet.reports import StructureDice
from stunet.reports.story import Story, StoryStep, conclude, write_story

__all__ = ["tell_story"]

_SOURCE, _TARGET = "Dataset001_Venous", "Dataset002_Arterial"
_PRETRAINED, _FINE_TUNED, _SCRATCH = "pretrained", "finetuned", "scratch"
_PRETRAINER, _TRAINER = "STUNetTrainer_pretrain", "STUNetTrainer"
_C = "3d_fullres"
_N_SOURCE, _N_FEW, _N_VALIDATION, _N_UNSEEN = 20, 3, 3, 4
#: Of both trainings on the target; enough for the fine-tuned network.
_EPOCHS_ON_TARGET = 6


@dataclass
class _Chapters:
    """What was done, chapter by chapter."""

    workspace: Workspace
    steps: list[StoryStep]

    def close(self, title: str, text: str) -> None:
        """All commands since the last chapter make this one."""
        told = sum(len(step.commands) for step in self.steps)
        commands = [(done.line, done.seconds) for done in self.workspace.commands[told:]]
        self.steps.append(StoryStep(title, text, commands))


def tell_story(workspace: Workspace, *, network: Sequence[str], epochs: int, device: str, seed: int) -> Path:
    """Do it all, print it, and write ``report.html``.

    Args:
        workspace: Where.
        network: The options of ``stunet plan`` that choose the network.
        epochs: Of pre-training.
        device: For the networks.
        seed: Of the phantoms, of all trainings and of the ranking.

    Returns:
        The page.
    """
    started = time.monotonic()
    chapters = _Chapters(workspace, [])
    _pretrain(workspace, network, epochs, device, seed)
    n_training = _N_SOURCE * 4 // 5
    chapters.close(
        "Pre-train on what is annotated",
        f"{n_training} training cases in TotalSegmentator's layout, with a third of the masks left out. A missing mask "
        "means that the structure is not annotated. It does not mean background, so the loss leaves open what those "
        "voxels are. Checkpoints are kept on the way.",
    )
    ranking = _pick(workspace, device, seed)
    winner = ranking["candidates"][0]
    chapters.close(
        "Pick the checkpoint to start from",
        f"The target is a small dataset: {_N_FEW} labelled cases of another contrast phase with more noise, and two "
        "structures that the pre-training had no labels for. stunet rank scores each checkpoint on the features of "
        f"these cases, without training. LogME ranks here, as it does better than CC-FV on the checkpoints of one "
        f"training (docs/transferability.md). {ranking['verdict']}",
    )
    budget = min(epochs, _EPOCHS_ON_TARGET)
    _train_both(workspace, Path(winner["path"]), network, budget, device, seed)
    chapters.close(
        "Fine-tune it, and train from scratch beside it",
        f"Both get the same {_N_FEW} cases, {budget * ITERATIONS_PER_EPOCH} iterations, settings and seed.",
    )
    dice = {
        "from scratch": _predict(workspace, _SCRATCH, device),
        "fine-tuned": _predict(workspace, _FINE_TUNED, device),
    }
    print_dice(dice)
    predictions = {
        "from scratch": _predictions(workspace, _SCRATCH),
        "fine-tuned": _predictions(workspace, _FINE_TUNED),
    }
    picture = draw_cases(workspace, _TARGET, predictions, workspace.root / "demo.png")
    chapters.close(
        "Predict unseen cases",
        f"{_N_UNSEEN} cases that no training and no ranking has seen, with nnU-Net's own commands.",
    )
    story = Story(
        conclusion=conclude(dice, n_cases=_N_FEW, iterations=budget * ITERATIONS_PER_EPOCH),
        steps=chapters.steps,
        exports=workspace.exports,
        ranking=ranking,
        curves={"from scratch": _curve(workspace, _SCRATCH), "fine-tuned": _curve(workspace, _FINE_TUNED)},
        pretraining=_curve(workspace, _PRETRAINED),
        dice=dice,
        picture=picture,
        seconds=time.monotonic() - started,
    )
    page = write_story(story, workspace.root / "report.html")
    stdout.print(f"\n{story.conclusion}\n", style="bold", highlight=False)
    stdout.print(f"The whole story:  {page}", highlight=False, markup=False, soft_wrap=True)
    stdout.print(
        f"Ranking:          {workspace.root / 'ranking' / 'ranking.html'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return page


def _pretrain(workspace: Workspace, network: Sequence[str], epochs: int, device: str, seed: int) -> None:
    workspace.print_exports()
    source, structures = workspace.root / "phantoms", workspace.root / "structures.json"
    stdout.print(f"\nMaking {_N_SOURCE} cases to pre-train on …", highlight=False)
    with stdout.status("making cases"):
        write_phantom_masks(source, n_training=_N_SOURCE, n_test=0, seed=seed)
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    workspace.run(
        "stunet", "import", "totalsegmentator", source, "-d", "1", "--name", _SOURCE[11:], "--task", structures,
        "-np", "2",
    )  # fmt: skip
    workspace.run("stunet", "labels", "check", "-d", "1", "-np", "2")
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", _C, "-npfp", "1", "-np", "1")
    settings = {
        **training_settings(epochs, batch_settings(workspace, _SOURCE, _C, device)),
        "keep_every": max(1, epochs // 3),
    }
    workspace.run(
        "stunet", "plan", "-d", "1", "-c", _C, *network, "--name", _PRETRAINED, "--set", *as_options(settings)
    )
    train(workspace, "1", _PRETRAINED, _PRETRAINER, configuration=_C, device=device, seed=seed, epochs=epochs)


def _pick(workspace: Workspace, device: str, seed: int) -> dict[str, Any]:
    stdout.print(f"\nMaking a target dataset with {_N_FEW} cases to train on …", highlight=False)
    # Other bodies than those of the pre-training: another seed.
    n_labelled = _N_FEW + _N_VALIDATION
    with stdout.status("making cases"):
        write_phantom_dataset(
            workspace.raw(_TARGET), n_training=n_labelled, n_test=_N_UNSEEN, seed=seed + 1000, contrast="arterial"
        )
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "2", "-c", _C, "-npfp", "1", "-np", "1")
    cases = [f"phantom_{case:03d}" for case in range(n_labelled)]
    split = [{"train": cases[:_N_FEW], "val": cases[_N_FEW:]}]
    write_json(split, workspace.preprocessed(_TARGET) / "splits_final.json")
    fold = workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED, _C) / "fold_0"
    workspace.define("PRETRAINED", str(fold.relative_to(workspace.root)))
    checkpoints = [*sorted(fold.glob("checkpoint_epoch_*.pth")), fold / "checkpoint_final.pth"]
    output = workspace.root / "ranking"
    workspace.run(
        "stunet", "rank", "-d", "2", "-f", "0", "-device", device, "--seed", str(seed), "-o", output,
        "--metrics", "logme,ccfv,transrate,leep,gbc,zero-shot", "--checkpoints", *checkpoints,
    )  # fmt: skip
    ranking: dict[str, Any] = json.loads((output / "ranking.json").read_text(encoding="utf-8"))
    for candidate in ranking["candidates"]:
        stdout.print(f"  LogME {candidate['scores']['logme']:7.3f}  {candidate['name']}", highlight=False, markup=False)
    stdout.print(f"  {ranking['verdict']}", highlight=False, markup=False)
    return ranking


def _train_both(
    workspace: Workspace, winner: Path, network: Sequence[str], epochs: int, device: str, seed: int
) -> None:
    options = as_options(training_settings(epochs, batch_settings(workspace, _TARGET, _C, device)))
    workspace.define("SETTINGS", " ".join(options))
    winner = workspace.root / winner
    workspace.run(
        "stunet", "finetune", "-d", "2", "-c", _C, "-f", "0", "--from", winner, "--name", _FINE_TUNED,
        "-device", device, "--seed", str(seed), "--set", *options, epochs=epochs,
    )  # fmt: skip
    workspace.run("stunet", "plan", "-d", "2", "-c", _C, *network, "--name", _SCRATCH, "--set", *options)
    train(workspace, "2", _SCRATCH, _TRAINER, configuration=_C, device=device, seed=seed, epochs=epochs)


def _predictions(workspace: Workspace, plans: str) -> Path:
    return workspace.root / f"predictions_{plans}"


def _predict(workspace: Workspace, plans: str, device: str) -> list[StructureDice]:
    return predict_and_score(
        workspace, _TARGET, _TRAINER, plans, configuration=_C, device=device,
        predictions=_predictions(workspace, plans),
    )  # fmt: skip


def _curve(workspace: Workspace, plans: str) -> list[float]:
    """Mean Dice on validation patches, epoch by epoch, as nnU-Net's checkpoints keep it."""
    from stunet.weights import read_checkpoint

    model = workspace.model(_TARGET, _TRAINER, plans, _C)
    if plans == _PRETRAINED:
        model = workspace.model(_SOURCE, _PRETRAINER, plans, _C)
    logged = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["logging"]
    return [float(value) for value in logged["mean_fg_dice"]]
