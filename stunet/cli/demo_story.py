"""The demo's story: pre-train on partly annotated cases, pick a checkpoint, fine-tune it beside scratch, predict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.cli.console import stdout
from stunet.cli.demo_training import as_options, draw_cases, predict_and_score, print_dice, training_settings
from stunet.cli.demo_workspace import Workspace, batch_settings
from stunet.datasets import PHANTOM_LABELS, write_phantom_dataset, write_phantom_masks
from stunet.files import write_json
from stunet.reports import StructureDice
from stunet.reports.story import Story, StoryStep, write_story

__all__ = ["tell_story"]

_SOURCE, _TARGET = "Dataset001_Phantoms", "Dataset002_PhantomsMR"
_PRETRAINED, _FINE_TUNED, _SCRATCH = "STUNetPlans_pretrained", "STUNetPlans_finetuned", "STUNetPlans_scratch"
_PRETRAINER, _TRAINER = "STUNetTrainer_pretrain", "STUNetTrainer"
_C = "3d_fullres"
_MOST_EPOCHS_ON_TARGET = 4


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
        seed: Of the phantoms.

    Returns:
        The page.
    """
    chapters = _Chapters(workspace, [])
    _pretrain(workspace, network, epochs, device, seed)
    chapters.close(
        "Pre-train on what is annotated",
        "20 generated CT-like phantoms in TotalSegmentator's layout, a third of the masks of the training cases left "
        "out. A missing mask means not annotated, and not background: the loss leaves open what these voxels are. "
        "Checkpoints are kept on the way.",
    )
    checkpoints = _checkpoints(workspace)
    ranking = _pick(workspace, checkpoints, device, seed)
    winner = ranking["candidates"][0]
    chapters.close(
        "Pick the checkpoint that will transfer best",
        "A small dataset of another contrast with other structures: 8 cases to train on, as if from an MR scanner. "
        f"Each checkpoint is scored by its features of them, without training: {ranking['verdict']}",
    )
    few = min(epochs, _MOST_EPOCHS_ON_TARGET)
    _train_both(workspace, winner["path"], network, few, device)
    chapters.close(
        "Fine-tune it, beside training from scratch",
        f"Both with the same {few} epochs of 20 iterations, and the same settings, on the same cases.",
    )
    dice = {
        "fine-tuned": _predict(workspace, _FINE_TUNED, device),
        "from scratch": _predict(workspace, _SCRATCH, device),
    }
    print_dice(dice)
    picture = draw_cases(workspace, _TARGET, workspace.root / "predictions_finetuned", workspace.root / "demo.png")
    chapters.close("Predict unseen cases", "4 phantoms that no training has seen, with nnU-Net's own command.")
    story = Story(
        steps=chapters.steps,
        exports=list(workspace.environment.items()),
        ranking=ranking,
        curves=_curves(workspace),
        pretraining=_curve(workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED, _C)),
        dice=dice,
        picture=picture,
    )
    page = write_story(story, workspace.root / "report.html")
    stdout.print(f"The story:    {page}", highlight=False, soft_wrap=True)
    stdout.print(f"Ranking:      {workspace.root / 'ranking' / 'ranking.html'}", highlight=False, soft_wrap=True)
    return page


def _pretrain(workspace: Workspace, network: Sequence[str], epochs: int, device: str, seed: int) -> None:
    stdout.print("Making 20 phantoms to pre-train on …", highlight=False)
    source, structures = workspace.root / "phantoms", workspace.root / "structures.json"
    write_phantom_masks(source, n_training=20, n_test=0, seed=seed)
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    workspace.run(
        "stunet",
        "import",
        "totalsegmentator",
        source,
        "-d",
        "1",
        "--name",
        "Phantoms",
        "--task",
        structures,
        "-np",
        "2",
    )
    workspace.run("stunet", "labels", "check", "-d", "1", "-np", "2")
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", _C, "-npfp", "2", "-np", "2")
    settings: dict[str, Any] = {
        **training_settings(epochs, batch_settings(workspace, _SOURCE, _C, device)),
        "keep_every": max(1, epochs // 3),
    }
    workspace.run("stunet", "plan", "-d", "1", "-c", _C, *network, "--name", _PRETRAINED, *as_options(settings))
    workspace.run("nnUNetv2_train", "1", _C, "0", "-p", _PRETRAINED, "-tr", _PRETRAINER, "-device", device)


def _checkpoints(workspace: Workspace) -> list[Path]:
    fold = workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED, _C) / "fold_0"
    return [*sorted(fold.glob("checkpoint_epoch_*.pth")), fold / "checkpoint_final.pth"]


def _pick(workspace: Workspace, checkpoints: Sequence[Path], device: str, seed: int) -> dict[str, Any]:
    stdout.print("\nMaking a target dataset of 8 training and 4 test cases …", highlight=False)
    # Other bodies than those of the pre-training: another seed.
    write_phantom_dataset(workspace.raw(_TARGET), n_training=8, n_test=4, seed=seed + 1000, modality="MR")
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "2", "-c", _C, "-npfp", "2", "-np", "2")
    output = workspace.root / "ranking"
    workspace.run("stunet", "rank", "-d", "2", "-device", device, "-o", output, "--checkpoints", *checkpoints)
    ranking: dict[str, Any] = json.loads((output / "ranking.json").read_text(encoding="utf-8"))
    for candidate in ranking["candidates"]:
        stdout.print(f"  CC-FV {candidate['scores']['ccfv']:7.3f}  {candidate['name']}", highlight=False)
    stdout.print(f"  {ranking['verdict']}", highlight=False)
    return ranking


def _train_both(workspace: Workspace, winner: str, network: Sequence[str], epochs: int, device: str) -> None:
    settings = training_settings(epochs, batch_settings(workspace, _TARGET, _C, device))
    workspace.run(
        "stunet", "finetune", "-d", "2", "-c", _C, "-f", "0", "--from", winner, "--name", _FINE_TUNED,
        "-device", device, *as_options(settings),
    )  # fmt: skip
    workspace.run("stunet", "plan", "-d", "2", "-c", _C, *network, "--name", _SCRATCH, *as_options(settings))
    workspace.run("nnUNetv2_train", "2", _C, "0", "-p", _SCRATCH, "-tr", _TRAINER, "-device", device)


def _predict(workspace: Workspace, plans: str, device: str) -> list[StructureDice]:
    predictions = workspace.root / f"predictions_{plans.removeprefix('STUNetPlans_')}"
    return predict_and_score(
        workspace, _TARGET, _TRAINER, plans, configuration=_C, device=device, predictions=predictions
    )


def _curves(workspace: Workspace) -> Mapping[str, Sequence[float]]:
    return {
        "fine-tuned": _curve(workspace.model(_TARGET, _TRAINER, _FINE_TUNED, _C)),
        "from scratch": _curve(workspace.model(_TARGET, _TRAINER, _SCRATCH, _C)),
    }


def _curve(model: Path) -> list[float]:
    """Mean Dice on validation patches, epoch by epoch, as nnU-Net's checkpoints keep it."""
    from stunet.checkpoints import read_checkpoint

    logged = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["logging"]
    return [float(value) for value in logged["mean_fg_dice"]]
