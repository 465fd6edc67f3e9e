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
from stunet.reports.ranking_figures import score_bars

__all__ = ["Story", "StoryStep", "write_story"]


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
        steps: The chapters: pre-training, picking, fine-tuning, prediction.
        exports: Variables that the commands need.
        ranking: Content of ``ranking.json``.
        curves: Dice on validation patches by epoch, of each model on the target.
        pretraining: The same of the pre-training.
        dice: Scores of each model on unseen cases.
        picture: PNG with image, truth and prediction.
    """

    steps: Sequence[StoryStep]
    exports: Sequence[tuple[str, str]]
    ranking: Mapping[str, Any]
    curves: Mapping[str, Sequence[float]]
    pretraining: Sequence[float]
    dice: Mapping[str, Sequence[StructureDice]]
    picture: Path


def write_story(story: Story, path: Path) -> Path:
    """Write the page, whole or not at all, and return where it is."""
    candidates = story.ranking["candidates"]
    ranking = score_bars(
        [candidate["name"] for candidate in candidates],
        [candidate["scores"]["ccfv"] for candidate in candidates],
        [candidate["interval"] for candidate in candidates],
        "CC-FV, higher is better",
    )
    pretraining = dice_curves({"pre-training": story.pretraining}, "epoch of pre-training")
    figures = [
        [{"svg": inline_svg(pretraining), "caption": "Mean Dice on validation patches while pre-training."}],
        [{"svg": inline_svg(ranking), "caption": "Scores of the checkpoints, with their intervals over cases (95 %)."}],
        [
            {
                "svg": inline_svg(dice_curves(story.curves, "epoch on the target")),
                "caption": "Mean Dice on validation patches of the target, with the same budget.",
            }
        ],
        [
            {
                "svg": inline_png(story.picture, "image, truth and prediction of three unseen cases"),
                "caption": "Unseen cases: image, truth and the fine-tuned network's prediction.",
            }
        ],
    ]
    write_page(
        "story.html",
        path,
        title="Pre-train, pick, fine-tune",
        lead=_lead(story),
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
        means=[f"{mean_dice(rows):.3f}" for rows in story.dice.values()],
        total=f"{sum(seconds for step in story.steps for _, seconds in step.commands):.0f}",
        versions=[(name, version(name)) for name in ("stunet", "nnunetv2", "torch")],
        cores=os.cpu_count(),
    )
    return path


def _lead(story: Story) -> str:
    scores = {name: mean_dice(rows) for name, rows in story.dice.items()}
    told = ", ".join(f"{value:.2f} {name}" for name, value in scores.items())
    return f"Mean Dice on unseen cases after the same short training on the target: {told}."


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
