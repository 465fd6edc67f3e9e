"""A ranking of checkpoints as JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stunet.files import atomic_path, write_json
from stunet.ranking import RANKING_FORMAT, CandidateScores, Ranking, TargetCases
from stunet.reports.figures import drawing
from stunet.reports.pages import inline_svg, write_page
from stunet.reports.ranking_figures import scale_lines, score_bars, short_names

__all__ = ["RankingReport", "write_ranking"]

#: Below it a mean over cases, or over pairs of them, hangs on single cases.
_FEW_CASES = 5
_WHAT_RESAMPLES_SAY = (
    "Resampling shows how much the order depends on the choice of cases; it does not show which checkpoint is better "
    "after fine-tuning."
)


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    """A ranking and all that was asked.

    Attributes:
        ranking: The ranking.
        target: The target's cases and points.
        about: What the target is: ``dataset``, ``configuration`` and ``plans``.
        metrics: Names of the metrics, in the order asked for.
        settings: All options by name.
        commands: How to fine-tune the first candidate, and the one with the lowest mean rank where that is another.
        date: Of the ranking.
    """

    ranking: Ranking
    target: TargetCases
    about: Mapping[str, str]
    metrics: Sequence[str]
    settings: Mapping[str, Any]
    commands: Sequence[str]
    date: str

    @property
    def verdict(self) -> str:
        """The outcome in a few sentences: who comes first, which metrics disagree, what the cases can tell apart."""
        ranking, candidates = self.ranking, self.ranking.candidates
        if not candidates:
            return "None of the candidates could be scored."
        first = candidates[0]
        if first.scores.get(ranking.metric) is None:
            return f"No candidate has a score by {ranking.metric}."
        if len(candidates) == 1:
            return f"{first.name} is the only candidate with a score."
        return " ".join([*self._agreement(first), *self._certainty(first)])

    def _agreement(self, first: CandidateScores) -> list[str]:
        preferences: dict[str, list[str]] = {}
        for metric, candidate in self.ranking.preferred.items():
            preferences.setdefault(candidate.name, []).append(metric)
        if len(preferences) <= 1:
            return [f"{first.name} comes first by {_listed(preferences.get(first.name, [self.ranking.metric]))}."]
        prefer = [f"{_listed(names)} prefer{'s' * (len(names) == 1)} {name}" for name, names in preferences.items()]
        said = [f"The metrics disagree: {'; '.join(prefer)}."]
        if (consensus := self.ranking.consensus) is not None:
            mean = dict(zip((c.name for c in self.ranking.candidates), self.ranking.mean_ranks, strict=True))
            beside = "" if consensus is first else f", {first.name} has {mean[first.name]:.1f}"
            said.append(f"The lowest mean rank has {consensus.name}: {mean[consensus.name]:.1f}{beside}.")
        return [*said, "Fine-tune those that a metric prefers for a short time, and compare."]

    def _certainty(self, first: CandidateScores) -> list[str]:
        if self.ranking.metric != "ccfv" or not first.draws:
            return []
        if tied := self.ranking.tied:
            said = (
                f"ccfv cannot tell {first.name} from {_listed([c.name for c in tied])}: it is ahead in fewer than 95 %"
            )
        else:
            said = f"By ccfv {first.name} is ahead of every other candidate in at least 95 %"
        return [f"{said} of the resamples of these {len(self.target.points)} cases.", _WHAT_RESAMPLES_SAY]

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before trusting the ranking."""
        n = len(self.target.points)
        few = f"Only {n} cases: scores and intervals of fewer than {_FEW_CASES} say little. Take more cases."
        return [few] * (n < _FEW_CASES) + self.shortfalls

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


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


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
    mean_ranks = ranking.mean_ranks or [None] * len(ranking.candidates)
    for candidate, mean_rank in zip(ranking.candidates, mean_ranks, strict=True):
        ahead = ranking.ahead(ranking.candidates[0], candidate) if candidate is not ranking.candidates[0] else None
        candidates.append(
            {
                "name": candidate.name,
                "path": candidate.path,
                "sha256": candidate.sha256,
                "scores": dict(candidate.scores),
                "mean_rank": mean_rank,
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
        "warnings": report.warnings,
        "preferred": {metric: candidate.name for metric, candidate in ranking.preferred.items()},
        "consensus": None if ranking.consensus is None else ranking.consensus.name,
        "tied_with_the_first": [candidate.name for candidate in ranking.tied],
        "candidates": candidates,
        "failures": [{"name": f.name, "path": f.path, "error": f.error} for f in ranking.failures],
        "command": report.commands[0] if report.commands else "",
        "commands": list(report.commands),
    }


def _as_csv(report: RankingReport) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["rank", "name", *report.metrics, "mean_rank", "ccfv_low", "ccfv_high", "parameters", "path", "sha256"]
    )
    mean_ranks = report.ranking.mean_ranks or [None] * len(report.ranking.candidates)
    for place, (candidate, mean) in enumerate(zip(report.ranking.candidates, mean_ranks, strict=True), start=1):
        scores = [candidate.scores.get(metric) for metric in report.metrics]
        low, high = candidate.interval or (None, None)
        parameters = candidate.description["parameters"]
        writer.writerow([place, candidate.name, *scores, mean, low, high, parameters, candidate.path, candidate.sha256])
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
        "commands": list(report.commands),
        "warnings": report.warnings,
        "metrics": list(report.metrics),
        "rows": _rows(report),
        "has_mean_ranks": bool(ranking.mean_ranks),
        "figures": _figures(report, scored) or [],
        "consistency": _consistency(scored, target) if scored else None,
        "null": _null(scored) if scored else None,
        "debiased": debiased,
        "failures": ranking.failures,
        "structures": _structures(target),
        "settings": [*report.settings.items(), *_versions().items()],
    }


def _rows(report: RankingReport) -> list[dict[str, Any]]:
    ranking = report.ranking
    preferred = ranking.preferred
    names = short_names([candidate.name for candidate in ranking.candidates], 32)
    mean_ranks = ranking.mean_ranks or [None] * len(names)
    rows = []
    for place, (name, candidate, mean_rank) in enumerate(
        zip(names, ranking.candidates, mean_ranks, strict=True), start=1
    ):
        first, interval = ranking.candidates[0], candidate.interval
        ahead = None if candidate is first else ranking.ahead(first, candidate)
        rows.append(
            {
                "place": place,
                "has_ccfv": bool(candidate.ccfv),
                "short": name,
                "name": candidate.name,
                "network": candidate.description["network"],
                "parameters": f"{candidate.description['parameters'] / 1e6:.2f} M",
                "scores": [
                    {"text": _number(candidate.scores.get(metric)), "preferred": preferred.get(metric) is candidate}
                    for metric in report.metrics
                ],
                "mean_rank": _number(mean_rank, 1),
                "consensus": candidate is ranking.consensus,
                "interval": "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
                "ahead": "-" if ahead is None else f"{100 * ahead:.0f} %",
                "seconds": f"{candidate.seconds:.1f} s" if candidate.seconds else "result kept from an earlier run",
                "path": candidate.path,
                "sha256": candidate.sha256,
            }
        )
    return rows


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


def _consistency(scored: Sequence[CandidateScores], target: TargetCases) -> list[dict[str, Any]]:
    """A row for each structure: there may be a hundred of them."""
    rows = []
    for label, pairs in scored[0].ccfv["pairs"].items():
        if pairs:
            scales = [[scale[label] for scale in candidate.ccfv["class_consistency"]] for candidate in scored]
            means = [_number(sum(values) / len(values)) for values in scales]
            rows.append({"name": target.structures.get(int(label), f"label {label}"), "pairs": pairs, "cells": means})
    return rows


def _null(scored: Sequence[CandidateScores]) -> dict[str, Any]:
    n_scales = max(len(candidate.ccfv["null"]) for candidate in scored)
    rows = []
    for candidate in scored:
        found = list(zip(candidate.ccfv["null"], candidate.ccfv["noise"], strict=True))
        values = [f"{null:.3f}, {100 * noise:.0f} %" for null, noise in found]
        rows.append({"cells": values + ["-"] * (n_scales - len(values))})
    return {"n_scales": n_scales, "rows": rows}


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
