"""A ranking of checkpoints as JSON, CSV and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from stunet.files import write_json
from stunet.reports.figures import drawing
from stunet.reports.pages import inline_svg, write_page

if TYPE_CHECKING:
    from stunet.ranking import CandidateScores, Ranking

_BEST, _OTHERS = "#0b6e8f", "#9fb3c1"


def write_ranking(ranking: Ranking, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``ranking.json``, ``ranking.csv`` and ``ranking.html``, each atomically.

    Returns:
        The three files.
    """
    paths = [Path(folder) / f"ranking.{ending}" for ending in ("json", "csv", "html")]
    versions = {name: version(name) for name in ("stunet", "nnunetv2", "torch", "numpy", "scipy")}
    write_json(_as_json(ranking, versions), paths[0])
    ranking.to_csv(paths[1])
    write_page("ranking.html", paths[2], **_page(ranking, versions))
    return paths


def _as_json(ranking: Ranking, versions: Mapping[str, str]) -> dict[str, Any]:
    from stunet.ranking import RANKING_FORMAT  # with PyTorch, which the demo's page does without

    target, consensus = ranking.target, ranking.consensus
    candidates = [
        {
            "name": row.name,
            "path": row.path,
            "sha256": row.sha256,
            "scores": row.scores,
            "mean_rank": mean_rank,
            "interval": row.interval,
            "first_is_ahead": None if row is ranking.rows[0] else ranking.ahead(ranking.rows[0], row),
            "network": row.description,
            "ccfv": row.ccfv,
            "zero_shot": row.zero_shot,
            "notes": row.notes,
            "seconds": row.seconds,
        }
        for row, mean_rank in _with_mean_ranks(ranking)
    ]
    return {
        "format": RANKING_FORMAT,
        "date": ranking.date,
        "versions": versions,
        "target": {
            **ranking.about,
            "cases": [points.as_dict() for points in target.points],
            "structures": {str(label): name for label, name in target.dataset.structures.items()},
            "digest": target.digest,
        },
        "settings": ranking.settings,
        "metric": ranking.metric,
        "verdict": ranking.verdict,
        "warnings": ranking.warnings,
        "preferred": {metric: row.name for metric, row in ranking.preferred.items()},
        "consensus": None if consensus is None else consensus.name,
        "tied_with_the_first": [row.name for row in ranking.tied],
        "candidates": candidates,
        "failures": [{"name": row.name, "path": row.path, "error": row.error} for row in ranking.failures],
        "command": (ranking.commands or [""])[0],
        "commands": ranking.commands,
    }


def _with_mean_ranks(ranking: Ranking) -> list[tuple[CandidateScores, float | None]]:
    return list(zip(ranking.rows, ranking.mean_ranks or [None] * len(ranking.rows), strict=True))


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _page(ranking: Ranking, versions: Mapping[str, str]) -> dict[str, Any]:
    target = ranking.target
    scored = [row for row in ranking.rows if row.ccfv]
    return {
        "title": f"Which checkpoint for {ranking.about['dataset']}?",
        "target": {**ranking.about, "cases": [points.case for points in target.points]},
        "metric": ranking.metric,
        "date": ranking.date,
        "verdict": ranking.verdict,
        "commands": ranking.commands,
        "warnings": ranking.warnings,
        "metrics": ranking.metrics,
        "rows": _rows(ranking),
        "has_mean_ranks": bool(ranking.mean_ranks),
        "figures": _figures(ranking, scored) or [],
        "consistency": _consistency(ranking, scored),
        "null": _null(scored) if scored else None,
        "debiased": bool(scored) and scored[0].ccfv["debias"] != "none",
        "failures": ranking.failures,
        "structures": [
            {
                "name": target.structure(label),
                "cases": len(cases),
                "fewest": min(points.voxels[label] for points in target.points if label in points.voxels),
                "asked": target.points[0].per_class,
                "short": sum(label in points.fewer for points in target.points),
            }
            for label, cases in target.shared.items()
        ],
        "settings": [*ranking.settings.items(), *versions.items()],
    }


def _rows(ranking: Ranking) -> list[dict[str, Any]]:
    preferred, rows = ranking.preferred, list[dict[str, Any]]()
    names = short_names([row.name for row in ranking.rows], 32)
    for name, (row, mean_rank) in zip(names, _with_mean_ranks(ranking), strict=True):
        first, interval = ranking.rows[0], row.interval
        ahead = None if row is first else ranking.ahead(first, row)
        rows.append(
            {
                "place": len(rows) + 1,
                "has_ccfv": bool(row.ccfv),
                "short": name,
                "name": row.name,
                "network": row.description["network"],
                "parameters": f"{row.description['parameters'] / 1e6:.2f} M",
                "scores": [
                    {"text": _number(row.scores.get(metric)), "preferred": preferred.get(metric) is row}
                    for metric in ranking.metrics
                ],
                "mean_rank": _number(mean_rank, 1),
                "consensus": row is ranking.consensus,
                "interval": "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
                "ahead": "-" if ahead is None else f"{100 * ahead:.0f} %",
                "seconds": f"{row.seconds:.1f} s" if row.seconds else "result kept from an earlier run",
                "path": row.path,
                "sha256": row.sha256,
            }
        )
    return rows


def _consistency(ranking: Ranking, scored: Sequence[CandidateScores]) -> list[dict[str, Any]]:
    """Fill a row for each structure: there may be a hundred of them."""
    rows = []
    for label, pairs in scored[0].ccfv["pairs"].items() if scored else ():
        if pairs:
            scales = [[scale[label] for scale in row.ccfv["class_consistency"]] for row in scored]
            cells = [_number(sum(values) / len(values)) for values in scales]
            rows.append({"name": ranking.target.structure(int(label)), "pairs": pairs, "cells": cells})
    return rows


def _null(scored: Sequence[CandidateScores]) -> dict[str, Any]:
    n_scales = max(len(row.ccfv["null"]) for row in scored)
    rows = []
    for row in scored:
        found = zip(row.ccfv["null"], row.ccfv["noise"], strict=True)
        values = [f"{null:.3f}, {100 * noise:.0f} %" for null, noise in found]
        rows.append({"cells": values + ["-"] * (n_scales - len(values))})
    return {"n_scales": n_scales, "rows": rows}


@drawing
def _figures(ranking: Ranking, scored: Sequence[CandidateScores]) -> list[dict[str, Any]]:
    metric, figures = ranking.metric, []
    if shown := [(row, score) for row in ranking.rows if (score := row.scores.get(metric)) is not None]:
        intervals = [row.interval if metric == "ccfv" else None for row, _ in shown]
        bars = score_bars([row.name for row, _ in shown], [score for _, score in shown], intervals, metric)
        caption = "The score of each candidate, with its interval if it has one."
        figures.append({"svg": inline_svg(bars), "caption": caption})
    if scored:
        lines = _scale_lines({row.name: row.ccfv["per_scale"] for row in scored}, "log(variety / consistency)")
        figures.append({"svg": inline_svg(lines), "caption": "CC-FV at each scale; the score is their mean."})
    return figures


def score_bars(
    names: Sequence[str], scores: Sequence[float], intervals: Sequence[tuple[float, float] | None], label: str
) -> Figure:
    """Draw a dot for each checkpoint, best on top, with its interval.

    Args:
        names: Checkpoints, best first.
        scores: Their scores.
        intervals: Lower and upper end, or None.
        label: What the score is.
    """
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    # CC-FV is a logarithm: 0 means nothing, so dots and not bars from 0 on.
    for place, (score, interval) in enumerate(zip(scores, intervals, strict=True)):
        colour = _BEST if place == 0 else _OTHERS
        if interval is not None:
            axes.plot(interval, (place, place), color=colour, linewidth=5, alpha=0.45, solid_capstyle="round")
        axes.plot(score, place, "o", color=colour, markersize=8)
    axes.set_yticks(list(range(len(names))), short_names(names), parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _scale_lines(per_scale: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw a line for each checkpoint, best first, over the decoder's scales, finest first."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(zip(short_names(list(per_scale)), per_scale.values(), strict=True)):
        style = {"color": _BEST, "linewidth": 2.5, "zorder": 3} if place == 0 else {"linewidth": 1.2, "alpha": 0.8}
        axes.plot(range(len(values)), values, marker="o", label=name, **style)
    most = max(map(len, per_scale.values()))
    axes.set_xticks(range(most), ["finest", *map(str, range(1, most))] if most else [])
    axes.set_xlabel("scale of the decoder")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)).get_texts():
        text.set_parse_math(False)
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
