"""A ranking of checkpoints as JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stunet.files import atomic_path, write_json
from stunet.reports.figures import drawing
from stunet.reports.pages import inline_svg, write_page
from stunet.reports.ranking_figures import scale_lines, score_bars
from stunet.transferability import RANKING_FORMAT, CandidateScores, Ranking, TargetCases

__all__ = ["RankingReport", "write_ranking"]


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    """A ranking and all that was asked.

    Attributes:
        ranking: The ranking.
        target: The target's cases and points.
        about: What the target is: ``dataset``, ``configuration`` and ``plans``.
        metrics: Names of the metrics, in the order asked for.
        settings: All options by name.
        command: How to fine-tune the first candidate; empty where there is none.
        date: Of the ranking.
        warnings: What a reader should know.
    """

    ranking: Ranking
    target: TargetCases
    about: Mapping[str, str]
    metrics: Sequence[str]
    settings: Mapping[str, Any]
    command: str
    date: str
    warnings: Sequence[str] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        """The outcome in one or two sentences."""
        candidates = self.ranking.candidates
        if not candidates:
            return "None of the candidates could be scored."
        first = candidates[0]
        if first.scores.get(self.ranking.metric) is None:
            return f"No candidate has a score by {self.ranking.metric}."
        if len(candidates) == 1:
            return f"{first.name} is the only candidate with a score."
        if tied := self.ranking.tied:
            names = ", ".join(candidate.name for candidate in tied)
            return (
                f"{first.name} comes first, but these cases cannot tell it apart from {names}: it is ahead in fewer "
                "than 95 % of the resamples. Take more cases, or fine-tune these and compare."
            )
        if self.ranking.metric == "ccfv":
            return f"{first.name} comes first, ahead of every other candidate in at least 95 % of the resamples."
        return f"{first.name} comes first by {self.ranking.metric}."

    @property
    def shortfalls(self) -> list[str]:
        """Cases of which fewer points than asked for could be drawn, in words."""
        rows = []
        for label, cases in self.target.shared.items():
            few = [p.voxels[label] for p in self.target.points if label in p.fewer]
            if few:
                name = self.target.structures.get(label, f"label {label}")
                rows.append(
                    f"{name}: {len(few)} of {len(cases)} cases have fewer than {self.target.points[0].per_class} "
                    f"voxels of it, the fewest {min(few)}"
                )
        return rows


def write_ranking(report: RankingReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``ranking.json``, ``ranking.csv`` and ``ranking.html``, each whole or not at all.

    Returns:
        The three files.
    """
    folder = Path(folder)
    paths = [folder / f"ranking.{ending}" for ending in ("json", "csv", "html")]
    write_json(_as_json(report), paths[0])
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(_as_csv(report), encoding="utf-8")
    write_page("ranking.html", paths[2], **_page(report))
    return paths


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("stunet", "nnunetv2", "torch", "numpy", "scipy")}


def _as_json(report: RankingReport) -> dict[str, Any]:
    ranking = report.ranking
    candidates = []
    for candidate in ranking.candidates:
        ahead = ranking.ahead(ranking.candidates[0], candidate) if candidate is not ranking.candidates[0] else None
        candidates.append(
            {
                "name": candidate.name,
                "path": candidate.path,
                "sha256": candidate.sha256,
                "scores": dict(candidate.scores),
                "interval": candidate.interval,
                "first_is_ahead": ahead,
                "network": dict(candidate.description),
                "ccfv": dict(candidate.ccfv),
                "zero_shot": dict(candidate.zero_shot),
                "notes": dict(candidate.notes),
                "seconds": candidate.seconds,
            }
        )
    return {
        "format": RANKING_FORMAT,
        "date": report.date,
        "versions": _versions(),
        "target": {
            **report.about,
            "cases": [points.as_dict() for points in report.target.points],
            "structures": {str(label): name for label, name in report.target.structures.items()},
            "digest": report.target.digest,
        },
        "settings": dict(report.settings),
        "metric": ranking.metric,
        "verdict": report.verdict,
        "tied_with_the_first": [candidate.name for candidate in ranking.tied],
        "candidates": candidates,
        "failures": [{"name": f.name, "path": f.path, "error": f.error} for f in ranking.failures],
        "command": report.command,
    }


def _as_csv(report: RankingReport) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["rank", "name", *report.metrics, "ccfv_low", "ccfv_high", "parameters", "path", "sha256"])
    for place, candidate in enumerate(report.ranking.candidates, start=1):
        scores = [candidate.scores.get(metric) for metric in report.metrics]
        low, high = candidate.interval or (None, None)
        parameters = candidate.description["parameters"]
        writer.writerow([place, candidate.name, *scores, low, high, parameters, candidate.path, candidate.sha256])
    return buffer.getvalue()


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _page(report: RankingReport) -> dict[str, Any]:
    ranking, target = report.ranking, report.target
    scored = [c for c in ranking.candidates if c.ccfv]
    debiased = bool(scored) and scored[0].ccfv["debias"] != "none"
    return {
        "title": f"Which checkpoint for {report.about['dataset']}?",
        "target": {**report.about, "cases": [points.case for points in target.points]},
        "metric": ranking.metric,
        "date": report.date,
        "verdict": report.verdict,
        "command": report.command,
        "warnings": [*report.warnings, *report.shortfalls],
        "metrics": list(report.metrics),
        "rows": [_row(report, candidate) for candidate in ranking.candidates],
        "figures": _figures(report, scored) or [],
        "consistency": _consistency(scored, target) if scored else None,
        "null": _null(scored) if scored else None,
        "debiased": debiased,
        "failures": ranking.failures,
        "structures": _structures(target),
        "settings": [*report.settings.items(), *_versions().items()],
    }


def _row(report: RankingReport, candidate: CandidateScores) -> dict[str, Any]:
    first = report.ranking.candidates[0]
    ahead = None if candidate is first else report.ranking.ahead(first, candidate)
    interval = candidate.interval
    return {
        "name": candidate.name,
        "network": candidate.description["network"],
        "parameters": f"{candidate.description['parameters'] / 1e6:.2f} M",
        "scores": [_number(candidate.scores.get(metric)) for metric in report.metrics],
        "interval": "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        "ahead": "-" if ahead is None else f"{100 * ahead:.0f} %",
        "seconds": f"{candidate.seconds:.1f}" if candidate.seconds else "kept",
        "path": candidate.path,
        "sha256": candidate.sha256,
    }


@drawing
def _figures(report: RankingReport, scored: Sequence[CandidateScores]) -> list[dict[str, Any]]:
    metric = report.ranking.metric
    shown = [(c, c.scores[metric]) for c in report.ranking.candidates if c.scores.get(metric) is not None]
    figures = []
    if shown:
        bars = score_bars(
            [c.name for c, _ in shown],
            [float(score or 0.0) for _, score in shown],
            [c.interval if metric == "ccfv" else None for c, _ in shown],
            metric,
        )
        figures.append(
            {"svg": inline_svg(bars), "caption": "The score of each candidate, with its interval if it has one."}
        )
    if scored:
        lines = scale_lines({c.name: c.ccfv["per_scale"] for c in scored}, "log(variety / consistency)")
        figures.append({"svg": inline_svg(lines), "caption": "CC-FV at each scale; the score is their mean."})
    return figures


def _consistency(scored: Sequence[CandidateScores], target: TargetCases) -> dict[str, Any]:
    pairs = scored[0].ccfv["pairs"]
    labels = [label for label in pairs if pairs[label]]
    header = [f"{target.structures.get(int(label), f'label {label}')} ({pairs[label]})" for label in labels]
    rows = []
    for candidate in scored:
        scales = candidate.ccfv["class_consistency"]
        means = [sum(scale[label] for scale in scales) / len(scales) for label in labels]
        rows.append({"name": candidate.name, "cells": [_number(mean) for mean in means]})
    return {"header": header, "rows": rows}


def _null(scored: Sequence[CandidateScores]) -> dict[str, Any]:
    n_scales = max(len(candidate.ccfv["null"]) for candidate in scored)
    header = [f"scale {d}: null, noise" for d in range(n_scales)]
    rows = []
    for candidate in scored:
        found = list(zip(candidate.ccfv["null"], candidate.ccfv["noise"], strict=True))
        values = [f"{null:.3f}, {100 * noise:.0f} %" for null, noise in found]
        rows.append({"name": candidate.name, "cells": values + ["-"] * (n_scales - len(values))})
    return {"header": header, "rows": rows}


def _structures(target: TargetCases) -> list[dict[str, Any]]:
    rows = []
    for label, cases in target.shared.items():
        voxels = [p.voxels[label] for p in target.points if label in p.voxels]
        rows.append(
            {
                "name": target.structures.get(label, f"label {label}"),
                "cases": len(cases),
                "fewest": min(voxels),
                "asked": target.points[0].per_class,
                "short": sum(label in p.fewer for p in target.points),
            }
        )
    return rows
