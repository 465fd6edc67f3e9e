"""A ranking of checkpoints as JSON, CSV and a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from stunet.files import write_json
from stunet.reports.figures import draw_curves, drawing, inline_svg, write_page

if TYPE_CHECKING:
    from stunet.ranking import CandidateScores, Ranking

_BEST, _OTHERS = "#0b6e8f", "#9fb3c1"


def write_ranking(ranking: Ranking, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``ranking.json``, ``ranking.csv`` and ``ranking.html``, each atomically, and return their paths."""
    paths = [Path(folder) / f"ranking.{ending}" for ending in ("json", "csv", "html")]
    write_json(ranking.as_dict(), paths[0])
    ranking.to_csv(paths[1])
    scored = [row for row in ranking.rows if row.ccfv]
    write_page(
        "ranking.html",
        paths[2],
        title=f"Which checkpoint for {ranking.about['dataset']}?",
        ranking=ranking,
        names=short_names([row.name for row in ranking.rows], 32),
        scored=scored,
        figures=_figures(ranking, scored) or [],
        mean_consistency=_mean_consistency,
    )
    return paths


def _mean_consistency(row: CandidateScores, label: str) -> float:
    values: list[float] = [scale[label] for scale in row.ccfv["class_consistency"]]
    return sum(values) / len(values)


@drawing()
def _figures(ranking: Ranking, scored: Sequence[CandidateScores]) -> list[dict[str, Any]]:
    metric, figures = ranking.metric, []
    if shown := [(row, score) for row in ranking.rows if (score := row.scores.get(metric)) is not None]:
        intervals = [row.interval if metric == "ccfv" else None for row, _ in shown]
        bars = score_bars([row.name for row, _ in shown], [score for _, score in shown], intervals, metric)
        caption = "The score of each candidate, with its interval if it has one."
        figures.append({"svg": inline_svg(bars), "caption": caption})
    if scored:
        names = short_names([row.name for row in scored])
        curves = {name: row.ccfv["per_scale"] for name, row in zip(names, scored, strict=True)}
        styles: list[dict[str, Any]] = [
            {"color": _BEST, "linewidth": 2.5, "zorder": 3},
            *[{"linewidth": 1.2, "alpha": 0.8}] * len(curves),
        ]
        lines = draw_curves(curves, "scale of the decoder, 0 is the finest", "log(variety / consistency)", styles)
        figures.append({"svg": inline_svg(lines), "caption": "CC-FV at each scale; the score is their mean."})
    return figures


def score_bars(
    names: Sequence[str], scores: Sequence[float], intervals: Sequence[tuple[float, float] | None], label: str
) -> Figure:
    """Draw a dot for the score of each checkpoint, best on top, with the lower and upper end of its interval."""
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    # CC-FV is a logarithm: 0 means nothing, so dots and not bars from 0 on.
    for place, (score, interval) in enumerate(zip(scores, intervals, strict=True)):
        colour = _BEST if place == 0 else _OTHERS
        if interval is not None:
            axes.plot(interval, (place, place), color=colour, linewidth=5, alpha=0.45, solid_capstyle="round")
        axes.plot(score, place, "o", color=colour, markersize=8)
    axes.set_yticks(list(range(len(names))), short_names(names))
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def short_names(names: Sequence[str], most: int = 40) -> list[str]:
    """Shorten names to ``most`` characters that still differ: ends of long ones, else beginnings with a number.

    >>> short_names(["a", "models/liver/checkpoint_final", "models/heart/checkpoint_final"], 12)
    ['a', '…liver/final', '…heart/final']
    """
    short = [name if len(name) <= most else name.replace("checkpoint_", "") for name in names]
    short = [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]
    if len(set(short)) == len(short):
        return short
    return [f"{n} {name}"[: most - 1] + "…" if len(name) > most else name for n, name in enumerate(names, start=1)]
