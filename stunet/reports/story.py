"""Dice from nnU-Net's ``summary.json``, and the demo's story as one page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.labels.labels import Labels
from stunet.reports.figures import draw_curves, inline_svg

#: Differences of mean Dice below this are called none.
_CLEAR = 0.05
#: A structure with a lower mean Dice was not learned.
_LEARNED = 0.1


@dataclass(frozen=True)
class StructureDice:
    """Mean, lowest and highest Dice of a structure over the ``n_cases`` that have a score; NaN where none has."""

    name: str
    mean: float
    lowest: float
    highest: float
    n_cases: int


def read_dice(summary: str | os.PathLike[str], labels: Mapping[str, Any]) -> list[StructureDice]:
    """Read the Dice of each structure.

    Args:
        summary: nnU-Net's ``summary.json``.
        labels: ``labels`` of ``dataset.json``: a value, or a list of values for a region, by name.

    Returns:
        One row for each structure, in the order of the labels, without background and ignore label.
    """
    cases = json.loads(Path(summary).read_text(encoding="utf-8"))["metric_per_case"]
    rows = []
    described = Labels({"labels": labels})
    for name in described.structures:
        values = described.values[name]
        keys = [str(values), str(values[0])]  # a region of one value counts as a region only where others have several
        found = [case["metrics"][key]["Dice"] for case in cases for key in keys if key in case["metrics"]]
        scores = [score for score in found if score is not None and not math.isnan(score)]
        mean = sum(scores) / len(scores) if scores else math.nan
        lowest, highest = min(scores, default=math.nan), max(scores, default=math.nan)
        rows.append(StructureDice(name, mean, lowest, highest, len(scores)))
    return rows


def mean_dice(rows: Sequence[StructureDice]) -> float:
    """Return the mean over the structures that have a score, NaN where none has."""
    means = [row.mean for row in rows if not math.isnan(row.mean)]
    return sum(means) / len(means) if means else math.nan


def conclude(dice: Mapping[str, Sequence[StructureDice]], *, n_cases: int, iterations: int) -> str:
    """Say what the scores ``from scratch`` and ``fine-tuned`` on unseen cases say, whichever way they fall."""
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


def draw_story(
    ranking: Mapping[str, Any], pretraining: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Draw Dice by epoch of the pre-training, scores, and Dice by epoch of each model on the target, with captions."""
    from stunet.reports.ranking import score_bars

    candidates, styles = ranking["candidates"], [{"color": "#0b6e8f"}, {"color": "#b7791f"}]
    names, logme = [c["name"] for c in candidates], [c["scores"]["logme"] for c in candidates]
    before = draw_curves({"pre-training": pretraining}, "epoch of pre-training", "mean Dice", styles, start=1)
    after = draw_curves(curves, "epoch on the target", "mean Dice", styles, start=1)
    for figure in (before, after):
        figure.axes[0].set_ylim(0, 1)
    figures = {
        "Mean Dice on validation patches during pre-training.": before,
        # Without intervals: those in ranking.json are of CC-FV.
        "Scores of the checkpoints.": score_bars(names, logme, [None] * len(names), "LogME, higher is better"),
        "Mean Dice on validation patches of the target, with the same budget.": after,
    }
    return [{"svg": inline_svg(figure), "caption": caption} for caption, figure in figures.items()]
