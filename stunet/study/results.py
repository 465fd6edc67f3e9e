"""What the cells of a study say together: Dice with intervals, gains over training from scratch, and curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stunet.errors import UsageError
from stunet.files import read_json
from stunet.ranking.agreement import top_regret, weighted_kendall
from stunet.study.definition import Cell, Study

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over resampled test cases and seeds."""

    mean: float
    low: float
    high: float


@dataclass(kw_only=True)
class Row:
    """A candidate, fine-tuned by one strategy on one number of cases of one target."""

    target: str
    n_cases: int
    candidate: str
    strategy: str
    seeds: tuple[int, ...]  # those that are done
    dice: Array  # (seeds, test cases), the mean over structures; NaN where a case has none
    surface: Array  # likewise, normalised surface Dice
    curves: Array  # (seeds, epochs), pseudo Dice on patches of the test cases
    seconds: float  # of a training, on average
    mean: dict[str, Interval] = field(default_factory=dict)  # of dice, surface, and the gain in both over from scratch


def read_results(study: Study) -> tuple[list[Row], dict[str, str]]:
    """Read what is done, and why cells have failed, by their names."""
    groups: dict[tuple[str, int, str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    failed: dict[str, str] = {}
    for cell in study.trainings:
        path = study.result(cell)
        if not path.is_file() or cell.candidate is None:
            continue
        content = read_json(path)
        if content["status"] == "failed":
            failed[cell.name] = content["error"]
        else:
            key = (cell.target.dataset, cell.n_cases, cell.candidate.name, str(cell.strategy))
            groups.setdefault(key, []).append((cell, content))
    rows = []
    for (target, n_cases, candidate, strategy), found in groups.items():
        test = found[0][0].target.test
        dice, surface = (np.array([_of_cases(c["cases"], test, m) for _, c in found]) for m in ("Dice", "NSD"))
        rows.append(
            Row(
                target=target,
                n_cases=n_cases,
                candidate=candidate,
                strategy=strategy,
                seeds=tuple(cell.seed for cell, _ in found),
                dice=dice,
                surface=surface,
                curves=np.array([content["curve"] for _, content in found], dtype=np.float64),
                seconds=float(np.mean([content["seconds"] for _, content in found])),
            )
        )
    return rows, failed


def _of_cases(cases: Mapping[str, Mapping[str, Any]], test: Sequence[str], metric: str) -> list[float]:
    """Mean over the structures of each case."""
    means = []
    for case in test:
        values = [scores[metric] for scores in cases[case].values() if scores[metric] is not None]
        means.append(sum(values) / len(values) if values else np.nan)
    return means


class Bootstrap:
    """Resamples of test cases and of seeds, the same for all that is compared on one target."""

    def __init__(self, n_seeds: int, n_cases: int, n_resamples: int) -> None:
        rng = np.random.default_rng(0)
        self._of_seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_resamples).astype(np.float64)
        self._of_cases = rng.multinomial(n_cases, np.full(n_cases, 1 / n_cases), n_resamples).astype(np.float64)

    def interval(self, values: Array) -> Interval:
        """Return the mean of ``(seeds, cases)`` with the central 95 % of its resamples; NaN counts for nothing."""
        known = np.isfinite(values)
        total = ((self._of_seeds @ np.where(known, values, 0.0)) * self._of_cases).sum(1)
        weight = ((self._of_seeds @ known) * self._of_cases).sum(1)
        low, high = np.quantile(total[weight > 0] / weight[weight > 0], [0.025, 0.975])
        return Interval(float(np.nanmean(values)), float(low), float(high))


def compare(rows: Sequence[Row], scratch: str | None, *, n_resamples: int) -> None:
    """Fill in the means of each row, and its gain over training from scratch with the same cases and seeds."""
    baseline = {(row.target, row.n_cases): row for row in rows if row.candidate == scratch}
    resamples: dict[tuple[int, ...], Bootstrap] = {}

    def interval(values: Array) -> Interval:
        if values.shape not in resamples:
            resamples[values.shape] = Bootstrap(*values.shape, n_resamples)
        return resamples[values.shape].interval(values)

    for row in rows:
        of: dict[str, Callable[[Row], Array]] = {"Dice": lambda r: r.dice, "surface Dice": lambda r: r.surface}
        for name, values in of.items():
            row.mean[name] = interval(values(row))
            base = baseline.get((row.target, row.n_cases))
            shared = [seed for seed in row.seeds if base is not None and base is not row and seed in base.seeds]
            if base is not None and shared:
                mine, theirs = ([each.seeds.index(seed) for seed in shared] for each in (row, base))
                row.mean[f"gain in {name}"] = interval(values(row)[mine] - values(base)[theirs])


def epochs_to_reach(curve: Array, other: Array) -> int | None:
    """Return after how many epochs a curve has reached the other one's last tenth, on average; None for never.

    >>> epochs_to_reach(np.array([0.1, 0.6, 0.7, 0.8]), np.array([0.0, 0.2, 0.4, 0.6]))
    2
    """
    wanted = other[-max(1, len(other) // 10) :].mean()
    above = np.flatnonzero(curve >= wanted)
    return int(above[0]) + 1 if len(above) else None


# Which score would have told ------------------------------------------------------------------------------------------


STATISTICS = ("weighted tau", "Pearson", "Spearman", "regret")
EARLY = "Dice after 1 % of the fine-tuning"

Scores = dict[str, dict[str, float]]
"""By metric and candidate."""


def fold_scores(study: Study, rows: Sequence[Row]) -> dict[tuple[str, int, int], Scores]:
    """Return the scores of each target, number of cases and seed, with what is known without looking at features."""
    of_folds: dict[tuple[str, int, int], Scores] = {}
    for cell in study.rankings:
        if (path := study.result(cell)).is_file() and (content := read_json(path))["status"] == "done":
            scores: Scores = {}
            for candidate, found in content["candidates"].items():
                for metric, score in found["scores"].items():
                    if score is not None:
                        scores.setdefault(metric, {})[candidate] = float(score)
            for candidate in study.candidates:
                for fact, value in candidate.facts.items():
                    scores.setdefault(fact, {})[candidate.name] = float(value)
            of_folds[cell.target.dataset, cell.n_cases, cell.seed] = scores
    for row in rows:
        for seed, curve in zip(row.seeds, row.curves, strict=True):
            if scores := of_folds.get((row.target, row.n_cases, seed), {}):
                scores.setdefault(EARLY, {})[row.candidate] = float(curve[max(0, round(0.01 * len(curve)) - 1)])
    return of_folds


def compare_rankers(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Measure how well each score agrees with the Dice after fine-tuning, the best one first.

    Candidates with weights are compared, by the first strategy of each, with the mean Dice over seeds. Agreement is
    measured for each fold, averaged within each target, and then over targets, with an interval over these.
    """
    first = {c.name: c.strategies[0] for c in study.candidates if c.path is not None}
    dice: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if first.get(row.candidate) == row.strategy:
            dice.setdefault((row.target, row.n_cases), {})[row.candidate] = row.mean["Dice"].mean
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    chosen: dict[str, dict[str, list[str]]] = {}
    for (target, n_cases, _), by_metric in fold_scores(study, rows).items():
        truth = dice.get((target, n_cases), {})
        for metric, scores in by_metric.items():
            names = [name for name in truth if name in scores]
            x, y = (np.array([values[name] for name in names]) for values in (scores, truth))
            if len(names) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
                continue
            estimates = {
                "weighted tau": weighted_kendall(x, y), "Pearson": float(np.corrcoef(x, y)[0, 1]),
                "Spearman": float(stats.spearmanr(x, y).statistic), "regret": top_regret(x, y),
            }  # fmt: skip
            found.setdefault(metric, {}).setdefault(target, []).append(estimates)
            chosen.setdefault(metric, {}).setdefault(target, []).append(names[int(x.argmax())])
    rankers = []
    for metric, targets in found.items():
        means = {t: {s: float(np.mean([e[s] for e in of])) for s in STATISTICS} for t, of in targets.items()}
        rankers.append(
            {
                "metric": metric,
                "targets": len(means),
                "estimates": {s: _over_targets([each[s] for each in means.values()]) for s in STATISTICS},
                "by_target": means,
                "choices": {t: _choice(names, means[t]["regret"]) for t, names in chosen[metric].items()},
            }
        )
    return sorted(rankers, key=lambda ranker: -ranker["estimates"]["weighted tau"]["mean"])


def _over_targets(values: Sequence[float]) -> dict[str, float]:
    of = np.array(values)
    draws = of[np.random.default_rng(0).integers(0, len(of), (2000, len(of)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": float(of.mean()), "low": float(low), "high": float(high)}


def _choice(names: Sequence[str], regret: float) -> dict[str, Any]:
    counts = Counter(names).most_common()
    said = ", ".join(name if len(counts) == 1 else f"{name} {n} of {len(names)} times" for name, n in counts[:2])
    return {"text": f"{said}: {regret:.3f}", "regret": regret, "first": dict(counts)}


# All of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """What is known so far."""

    rows: list[Row]
    failed: dict[str, str]  # why, by the cell's name
    tests: dict[str, tuple[str, ...]]  # test cases of each target
    scratch: str | None  # the candidate without weights
    progress: dict[str, float]
    summary: list[dict[str, Any]]  # of each candidate over all targets, the best one first
    rankers: list[dict[str, Any]]  # of each score, the best one first

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON: all but the scores of single cases and the curves."""
        rows = [
            {
                "target": row.target, "cases": row.n_cases, "candidate": row.candidate, "strategy": row.strategy,
                "seeds": len(row.seeds), "seconds": round(row.seconds, 1),
                **{name: [round(v, 5) for v in (i.mean, i.low, i.high)] for name, i in row.mean.items()},
            } for row in self.rows
        ]  # fmt: skip
        about = {"progress": self.progress, "summary": self.summary, "rankers": self.rankers, "failed": self.failed}
        return {**about, "rows": rows}


def read_study(study: Study, *, n_resamples: int = 1000) -> StudyResults:
    """Read and compare all that is done.

    Raises:
        UsageError: Nothing is.
    """
    rows, failed = read_results(study)
    if not rows:
        raise UsageError(f"nothing is done yet in {study.folder}: run it with stunet study run {study.folder}")
    scratch = next((candidate.name for candidate in study.candidates if candidate.path is None), None)
    compare(rows, scratch, n_resamples=n_resamples)
    gains: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "gain in Dice" in row.mean:
            gains.setdefault((row.candidate, row.strategy), []).append(row.mean["gain in Dice"].mean)
    summary = [
        {
            "candidate": candidate, "strategy": strategy, "mean": float(np.mean(values)),
            "median": float(np.median(values)), "wins": sum(value > 0 for value in values), "n": len(values),
        } for (candidate, strategy), values in gains.items()
    ]  # fmt: skip
    done = sum(len(row.seeds) for row in rows)
    ranked = sum(study.result(cell).is_file() for cell in study.rankings)
    hours = sum(row.seconds * len(row.seeds) for row in rows) / 3600
    return StudyResults(
        rows=rows,
        failed=failed,
        tests={target.dataset: target.test for target in study.targets},
        scratch=scratch,
        progress={
            "done": done, "trainings": len(study.trainings), "ranked": ranked, "rankings": len(study.rankings),
            "hours": round(hours, 2),
        },
        summary=sorted(summary, key=lambda entry: -entry["mean"]),
        rankers=compare_rankers(study, rows),
    )  # fmt: skip
