"""A figure of scores by structure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stunet.evaluation import METRICS, EvaluationResults
from stunet.files import atomic_path
from stunet.reports.figures import drawing

__all__ = ["draw_scores"]

_TITLES = {"Dice": "Dice", "NSD": "normalised surface Dice", "HD95": "95th percentile Hausdorff distance (mm)"}
_ROW = 0.26  # inches
_MOST_CASES_FOR_OPAQUE_DOTS = 20


@drawing
def draw_scores(results: EvaluationResults, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw the scores of each structure: a dot for each case, and a bar at the mean.

    Args:
        results: The scores. Structures that no case has are drawn as empty rows; infinite distances are counted beside
            their row, since they have no place on the axis.
        path: PNG to write, whole or not at all.
        title: Title of the figure.
    """
    n = len(results.structures)
    figure = Figure(figsize=(11, _ROW * n + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, METRICS, strict=True):
        _draw_metric(panel, results, metric)
    panels[0].set_yticks(range(n), [structure.comparison.name for structure in results.structures])
    panels[0].set_ylim(n - 0.5, -0.5)
    if title:
        figure.suptitle(title, fontsize=10)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_metric(panel: Axes, results: EvaluationResults, metric: str) -> None:
    alpha = 0.8 if len(results.cases) <= _MOST_CASES_FOR_OPAQUE_DOTS else 0.3
    for row, (structure, values) in enumerate(zip(results.structures, results.values(metric).values(), strict=True)):
        # Spread over the row's height, in the order of cases, so that equal scores do not hide each other.
        heights = row + np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [float(row)] * len(values)
        panel.scatter(values, heights, s=9, color="tab:blue", alpha=alpha, linewidths=0, zorder=2)
        mean = structure.mean[metric]
        if mean is not None:
            panel.plot([mean, mean], [row - 0.38, row + 0.38], color="tab:red", linewidth=1.6, zorder=3)
        if metric == "HD95" and structure.infinite:
            panel.annotate(
                f"{structure.infinite} infinite", (1, row), xycoords=("axes fraction", "data"), xytext=(-3, 0),
                textcoords="offset points", ha="right", va="center", fontsize=7, color="dimgray",
            )  # fmt: skip
    panel.set_title(_TITLES[metric], fontsize=9)
    if metric == "HD95":
        panel.set_xlim(left=0)
    else:
        panel.set_xlim(-0.02, 1.02)
    panel.grid(visible=True, axis="x", linewidth=0.4)
    panel.tick_params(labelsize=8)
