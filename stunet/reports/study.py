"""The page of a study: what each candidate is worth, how soon, and which score would have chosen it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.figure import Figure

from stunet.files import atomic_path, write_json
from stunet.reports.figures import drawing, inline_svg, write_page
from stunet.study.definition import Study
from stunet.study.results import CHOSEN, Row, StudyResults, epochs_to_reach, read_study

#: In one figure, of the best candidates: more can neither be told apart nor named beside it.
_MOST_CURVES = 20
_STATISTICS = {
    "weighted_kendall": "weighted tau", "pairwise_kendall": "tau by pairs", "pearson": "Pearson",
    "spearman": "Spearman", "regret": "regret",
}  # fmt: skip


def write_study(study: Study, *, n_resamples: int = 1000) -> Path:
    """Write ``results.json``, ``cells.csv`` and the page ``index.html`` of what is done, each atomically.

    Raises:
        UsageError: Nothing is done yet.
    """
    results = read_study(study, n_resamples=n_resamples)
    folder = study.folder
    write_json(results.as_dict(), folder / "results.json")
    with atomic_path(folder / "cells.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "cases", "candidate", "strategy", "seed", "test case", "Dice", "surface Dice"])
        for row in results.rows:
            test = results.tests[row.target]
            for seed, dice, surface in zip(row.seeds, row.dice, row.surface, strict=True):
                for case, *values in zip(test, dice, surface, strict=True):
                    scores = ["" if np.isnan(value) else round(float(value), 6) for value in values]
                    writer.writerow([row.target, row.n_cases, row.candidate, row.strategy, seed, case, *scores])
    page = folder / "index.html"
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.target, row.n_cases), []).append(row)
    write_page(
        "study.html",
        page,
        title="What checkpoints are worth",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        progress=results.progress,
        verdict=_verdict(results),
        summary=results.summary,
        tables=[_table(target, n, rows, results) for (target, n), rows in groups.items()],
        learning_curves=_learning_curves(results.rows),
        most_curves=_MOST_CURVES,
        rankers=results.rankers,
        repeats=results.repeats,
        statistics=_STATISTICS,
        features=results.features,
        targets=[target.dataset for target in study.targets],
        failed=results.failed,
        definition=json.dumps({k: v for k, v in study.content.items() if k != "targets"}, indent=2),
    )
    return page


def _verdict(results: StudyResults) -> str:
    said = "No candidate can be compared with training from scratch"
    said += " yet." if results.scratch else ": there is none in the study."
    if results.summary:
        best = results.summary[0]
        said = (
            f"{best['candidate']} ({best['strategy']}) came out best: its Dice is {best['mean']:+.3f} compared with "
            f"training from scratch on average, {best['median']:+.3f} in the median, with {best['wins']} of "
            f"{best['n']} comparisons won; this is {best['above']:+.3f} compared with the mean of all candidates there."
        )
    if results.rankers:
        ranker = min(results.rankers, key=lambda each: (each["metric"] == CHOSEN, not each["complete"]))
        said += f" {ranker['metric']} would have ranked the candidates best: {_in_words(ranker)}."
        said += "".join(
            f" {r['metric'][0].upper()}{r['metric'][1:]} comes to {_in_words(r)}." for r in _references(results)
        )
    return said


def _references(results: StudyResults) -> list[dict[str, Any]]:
    """What can be had without having seen the target, and what another training would tell."""
    chosen = [ranker for ranker in results.rankers if ranker["metric"] == CHOSEN]
    return [*chosen, results.repeats] if results.repeats else chosen


def _in_words(ranker: Mapping[str, Any]) -> str:
    tau, regret = (ranker["estimates"][name] for name in ("weighted_kendall", "regret"))
    return f"weighted tau {tau['mean']:.2f} ({tau['low']:.2f} to {tau['high']:.2f}), regret {regret['mean']:.3f}"


def _table(target: str, n_cases: int, rows: Sequence[Row], results: StudyResults) -> dict[str, Any]:
    ordered = sorted(rows, key=lambda row: -row.mean["Dice"].mean)
    base = next((row for row in rows if row.candidate == results.scratch), None)
    return {
        "target": target,
        "n_cases": n_cases,
        "n_test": len(results.tests[target]),
        "rows": ordered,
        "names": [_name(row) for row in ordered],
        "sooner": [_sooner(row, base) for row in ordered],
        "figure": _lines({_name(row): row.curves.mean(0) for row in ordered}, "epoch") or "",
    }


def _name(row: Row) -> str:
    return row.candidate if row.strategy == "full" else f"{row.candidate}, {row.strategy}"


def _sooner(row: Row, base: Row | None) -> str:
    if base is None or base is row:
        return "-"
    epochs = epochs_to_reach(row.curves.mean(0), base.curves.mean(0))
    return "never" if epochs is None else f"{epochs} of {row.curves.shape[1]}"


def _learning_curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Dice by number of cases, for each target with several: the best with the most cases first."""
    figures = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        own.sort(key=lambda row: (-row.n_cases, -row.mean["Dice"].mean))
        if len(numbers := sorted({row.n_cases for row in own})) < 2:
            continue
        curves: dict[str, Any] = {}
        for row in own:
            curve = curves.setdefault(_name(row), np.full(len(numbers), np.nan))
            curve[numbers.index(row.n_cases)] = row.mean["Dice"].mean
        figure = _lines(curves, "labelled cases", numbers)
        best = f", of the best {_MOST_CURVES} with {numbers[-1]}" * (len(curves) > _MOST_CURVES)
        figures.append({"svg": figure or "", "caption": f"Dice by number of labelled cases{best}: {target}."})
    return figures


@drawing()
def _lines(curves: Mapping[str, Any], x: str, values: Sequence[int] | None = None) -> Markup:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes, colours = figure.subplots(), colormaps["tab20"]
    for number, (name, curve) in enumerate(islice(curves.items(), _MOST_CURVES)):
        places = values or range(1, len(curve) + 1)
        axes.plot(places, curve, color=colours(number % 20), linewidth=1.3, label=name, marker="o" if values else None)
    axes.set(xlabel=x, ylabel="Dice")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return inline_svg(figure)
