"""The demo's story as one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stunet.reports.dice import StructureDice, mean_dice
from stunet.reports.pages import inline_png, inline_svg, write_page
from stunet.reports.ranking import score_bars

__all__ = ["Story", "StoryStep", "conclude", "write_story"]

#: Differences of mean Dice below this are called none.
_CLEAR = 0.05
#: A structure with a lower mean Dice was not learned.
_LEARNED = 0.1


@dataclass(frozen=True)
class StoryStep:
    """One chapter.

    Attributes:
        title: What was done.
        text: Why, and what came of it.
        commands: Each as it is typed, and the seconds that it took.
    """

    title: str
    text: str
    commands: Sequence[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that the page shows.

    Attributes:
        conclusion: In one sentence.
        steps: The chapters: pre-training, picking, fine-tuning, prediction.
        exports: Lines that set the variables that the commands need.
        ranking: Content of ``ranking.json``.
        curves: Dice on validation patches by epoch, of each model on the target.
        pretraining: The same of the pre-training.
        dice: Scores of each model on unseen cases.
        picture: PNG with images, truth and predictions.
        seconds: That all of it took.
    """

    conclusion: str
    steps: Sequence[StoryStep]
    exports: Sequence[str]
    ranking: Mapping[str, Any]
    curves: Mapping[str, Sequence[float]]
    pretraining: Sequence[float]
    dice: Mapping[str, Sequence[StructureDice]]
    picture: Path
    seconds: float


def conclude(dice: Mapping[str, Sequence[StructureDice]], *, n_cases: int, iterations: int) -> str:
    """What the figures say, whichever way they fall.

    Args:
        dice: Scores on unseen cases, ``from scratch`` and ``fine-tuned``.
        n_cases: Labelled cases of both trainings.
        iterations: Of both trainings.
    """
    scratch, tuned = mean_dice(dice["from scratch"]), mean_dice(dice["fine-tuned"])
    gain = tuned - scratch
    verdict = "Pre-training helped" if gain >= _CLEAR else "Pre-training made no clear difference here"
    if gain <= -_CLEAR:
        verdict = "Pre-training did harm here"
    lost = [f"{row.name} ({name})" for name, rows in dice.items() for row in rows if not row.mean >= _LEARNED]
    return (
        f"{verdict}: with {n_cases} labelled cases and {iterations} iterations, the fine-tuned network reaches a mean "
        f"Dice of {tuned:.2f} on unseen cases, and the same network trained from scratch {scratch:.2f}"
        + (f"; not learned: {', '.join(lost)}." if lost else ".")
    )


def write_story(story: Story, path: Path) -> Path:
    """Write the page, whole or not at all, and return where it is."""
    candidates = story.ranking["candidates"]
    ranking = score_bars(
        [candidate["name"] for candidate in candidates],
        [candidate["scores"]["logme"] for candidate in candidates],
        [None] * len(candidates),  # the intervals in ranking.json are those of CC-FV
        "LogME, higher is better",
    )
    pretraining = dice_curves({"pre-training": story.pretraining}, "epoch of pre-training")
    figures = [
        [{"svg": inline_svg(pretraining), "caption": "Mean Dice on validation patches during pre-training."}],
        [{"svg": inline_svg(ranking), "caption": "Scores of the checkpoints."}],
        [
            {
                "svg": inline_svg(dice_curves(story.curves, "epoch on the target")),
                "caption": "Mean Dice on validation patches of the target, with the same budget.",
            }
        ],
        [],
    ]
    means = {name: mean_dice(rows) for name, rows in story.dice.items()}
    write_page(
        "story.html",
        path,
        title="Pre-train, pick, fine-tune",
        lead=story.conclusion,
        picture=inline_png(story.picture, "image, truth and predictions of three unseen cases"),
        exports=story.exports,
        steps=[
            {"title": step.title, "text": step.text, "commands": step.commands, "figures": shown}
            for step, shown in zip(story.steps, figures, strict=True)
        ],
        ranking=[
            {"name": c["name"], "scores": ["-" if v is None else f"{v:.3f}" for v in c["scores"].values()]}
            for c in candidates
        ],
        metrics=list(candidates[0]["scores"]),
        models=list(story.dice),
        dice=[
            {"name": rows[0].name, "means": [f"{row.mean:.3f}" for row in rows]}
            for rows in zip(*story.dice.values(), strict=True)
        ],
        means=[f"{value:.3f}" for value in means.values()],
        total=f"{story.seconds / 60:.1f}",
        versions=[(name, version(name)) for name in ("stunet", "nnunetv2", "torch")],
        cores=os.cpu_count(),
    )
    return path


def dice_curves(curves: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Dice by epoch, one line for each training."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(curves.items(), ("#0b6e8f", "#b7791f"), strict=False):
        axes.plot(range(1, len(values) + 1), values, marker="o", color=colour, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("mean Dice")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure
