"""Dice scores from the ``summary.json`` that nnU-Net's evaluation writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["StructureDice", "mean_dice", "read_dice"]


@dataclass(frozen=True)
class StructureDice:
    """Scores of one structure over all cases.

    Attributes:
        name: The structure.
        mean: Mean Dice over the cases that have it, NaN where none has.
        lowest: Lowest Dice of a case.
        highest: Highest Dice of a case.
        n_cases: Number of cases with a score.
    """

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
    for name, value in labels.items():
        if name == "ignore" or value in (0, [0]):
            continue
        keys = [str(value)] if isinstance(value, int) else [str(tuple(value)), *map(str, value[:1])]
        scores = []
        for case in cases:
            # A region of one value counts as a region only where others have several.
            score = next((case["metrics"][key]["Dice"] for key in keys if key in case["metrics"]), None)
            if score is not None and not math.isnan(score):
                scores.append(score)
        mean = sum(scores) / len(scores) if scores else math.nan
        rows.append(
            StructureDice(name, mean, min(scores, default=math.nan), max(scores, default=math.nan), len(scores))
        )
    return rows


def mean_dice(rows: Sequence[StructureDice]) -> float:
    """Mean over the structures that have a score, NaN where none has."""
    means = [row.mean for row in rows if not math.isnan(row.mean)]
    return sum(means) / len(means) if means else math.nan
