"""What the cells of a study say together: Dice with intervals, gains over training from scratch, and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stunet.errors import UsageError
from stunet.files import read_json
from stunet.ranking.agreement import leave_one_target_out, mean_agreement, top_regret
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
    for cell in study.cells:
        path = study.result(cell)
        if not path.is_file():
            continue
        content = read_json(path)
        if content["status"] == "failed":
            failed[cell.name] = content["error"]
        elif cell.candidate is not None and not any(
            score["Dice"] is not None for scores in content["cases"].values() for score in scores.values()
        ):
            failed[cell.name] = "no test case has a structure that could be scored: correct their labels"
        elif cell.candidate is not None:
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
            n_seeds, n_cases = values.shape
            resamples[values.shape] = Bootstrap(n_seeds, n_cases, n_resamples)
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


EARLY = "pseudo Dice of the fine-tuning after"
CHOSEN = "the best on the other targets"
_CHOOSES = "weighted_kendall"

ByTarget = dict[str, dict[str, float]]
"""Values by target and candidate."""


def scores_and_dice(study: Study, rows: Sequence[Row]) -> tuple[dict[str, ByTarget], ByTarget]:
    """Return scores by metric, target and candidate, and the Dice by target and candidate, means over folds.

    Facts of candidates are scores, too, and so is their Dice after a hundredth of the epochs, or the first one.
    Candidates with weights count, by the first strategy of each, on targets with at least three of them that differ,
    and on folds that all of them are done with.
    """
    folds = shared_folds(study, rows)
    dice: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in _with_weights(study, rows):
        own = [i for i, seed in enumerate(row.seeds) if (row.n_cases, seed) in folds[row.target]]
        dice.setdefault(row.target, {}).setdefault(row.candidate, []).extend(map(np.nanmean, row.dice[own]))
        n_epochs = row.curves.shape[1]
        few = max(1, round(0.01 * n_epochs))
        early = found.setdefault(f"{EARLY} {100 * few / n_epochs:.0f} %", {}).setdefault(row.target, {})
        early.setdefault(row.candidate, []).extend(np.nan_to_num(row.curves[own, few - 1]))
        for fact, value in next(c.facts for c in study.candidates if c.name == row.candidate).items():
            found.setdefault(fact, {}).setdefault(row.target, {}).setdefault(row.candidate, []).append(value)
    for cell in study.rankings:
        if (cell.n_cases, cell.seed) not in folds.get(cell.target.dataset, ()):
            continue
        if (path := study.result(cell)).is_file() and (content := read_json(path))["status"] == "done":
            for candidate, result in content["candidates"].items():
                for metric, score in result["scores"].items():
                    if score is not None and candidate in dice.get(cell.target.dataset, {}):
                        of = found.setdefault(metric, {}).setdefault(cell.target.dataset, {})
                        of.setdefault(candidate, []).append(float(score))
    truth = {target: _means(of) for target, of in dice.items() if folds[target]}
    truth = {target: of for target, of in truth.items() if len(of) > 2 and len({*of.values()}) > 1}
    means = {metric: {t: _means(of[t]) for t in truth if len(of.get(t, ())) > 2} for metric, of in found.items()}
    return {metric: of for metric, of in means.items() if of}, truth


def shared_folds(study: Study, rows: Sequence[Row]) -> dict[str, set[tuple[int, int]]]:
    """Folds of each target, as number of cases and seed, that all candidates are done with of which any is there.

    Means over them can be compared while others are missing.
    """
    done: dict[str, dict[str, set[tuple[int, int]]]] = {}
    for row in _with_weights(study, rows):
        own = done.setdefault(row.target, {}).setdefault(row.candidate, set())
        own.update((row.n_cases, seed) for seed in row.seeds)
    return {target: set.intersection(*of.values()) for target, of in done.items()}


def _with_weights(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Rows of candidates with weights, by the first strategy of each."""
    first = {c.name: c.strategies[0] for c in study.candidates if c.path is not None}
    return [row for row in rows if first.get(row.candidate) == row.strategy]


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(each)) for name, each in values.items()}


def compare_rankers(study: Study, rows: Sequence[Row], *, n_resamples: int) -> list[dict[str, Any]]:
    """Measure how well each score agrees with the Dice after fine-tuning: the best one first, of those that all have.

    One more row is the score that does best on the other targets, out of those that all candidates have before any
    fine-tuning: what trusting this study on a new target comes to.
    """
    scores, dice = scores_and_dice(study, rows)
    complete = {m: of for m, of in scores.items() if all(set(of.get(t, ())) == set(dice[t]) for t in dice)}
    before = {metric: of for metric, of in complete.items() if not metric.startswith(EARLY)}
    rankers = []
    if len(dice) > 1 and before:
        chosen = {t: choice.metric for t, choice in leave_one_target_out(before, dice, by=_CHOOSES).items()}
        by_choice = {target: complete[metric][target] for target, metric in chosen.items()}
        rankers.append(_ranker(CHOSEN, by_choice, dice, n_resamples) | {"chosen": chosen, "complete": True})
    for metric, of in scores.items():
        rankers.append(_ranker(metric, of, dice, n_resamples) | {"complete": metric in complete})
    return sorted(rankers, key=lambda ranker: (not ranker["complete"], -ranker["estimates"][_CHOOSES]["mean"]))


def compare_seeds(study: Study, rows: Sequence[Row], *, n_resamples: int) -> dict[str, Any] | None:
    """Measure how well the Dice of every second seed agrees with that of the others, as if it were a score.

    It says how certain the order is that scores are compared with. None with one seed, or nothing to compare yet.
    """
    folds, halves = shared_folds(study, rows), tuple[dict[str, dict[str, list[float]]], ...](({}, {}))
    for row in _with_weights(study, rows):
        whole = study.seeds > 1 and folds[row.target] >= {(row.n_cases, seed) for seed in range(study.seeds)}
        for half, of in enumerate(halves if whole else ()):
            of.setdefault(row.target, {}).setdefault(row.candidate, []).append(float(np.nanmean(row.dice[half::2])))
    truth, scores = ({target: _means(each) for target, each in of.items()} for of in halves)
    truth = {target: of for target, of in truth.items() if len(of) > 2 and len({*of.values()}) > 1}
    scores = {target: scores[target] for target in truth}
    return _ranker("the Dice with other seeds", scores, truth, n_resamples) if truth else None


def _ranker(metric: str, scores: ByTarget, dice: ByTarget, n_resamples: int) -> dict[str, Any]:
    truth = {target: {name: dice[target][name] for name in of} for target, of in scores.items()}
    found = mean_agreement(scores, truth, n_resamples=n_resamples)
    choices, by_chance = {}, []
    for target, of in scores.items():
        values, reached = (np.array([each[name] for name in of]) for each in (of, truth[target]))
        chosen = " or ".join(name for name in of if of[name] == values.max())
        regret, of_three = (top_regret(values, reached, first) for first in (1, 3))
        choices[target] = {"first": chosen, "regret": regret, "regret of three": of_three}
        by_chance.append([top_regret(np.zeros(len(of)), reached, first) for first in (1, 3)])
    estimates = {name: {"mean": each.value, "low": each.low, "high": each.high} for name, each in found.items()}
    n_candidates = [len(of) for of in scores.values()]
    of_three = float(np.mean([choice["regret of three"] for choice in choices.values()]))
    return {
        "metric": metric, "candidates": n_candidates, "estimates": estimates, "regret of three": of_three,
        "by chance": np.mean(by_chance, axis=0).tolist(), "choices": choices,
    }  # fmt: skip


# All of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """What is known so far."""

    rows: list[Row]
    failed: dict[str, str]  # why, by the cell's name
    tests: dict[str, tuple[str, ...]]  # test cases of each target
    scratch: str | None  # the candidate without weights
    progress: dict[str, float]
    summary: list[dict[str, Any]]  # of each candidate over its targets, by its gain above that of all others there
    rankers: list[dict[str, Any]]  # of each score, the best one first
    repeats: dict[str, Any] | None  # the same of the Dice with other seeds
    features: list[str]  # that the scores are made of: stages of the decoder, or of the encoder

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON: all but the scores of single cases and the curves."""
        rows = [
            {
                "target": row.target, "cases": row.n_cases, "candidate": row.candidate, "strategy": row.strategy,
                "seeds": len(row.seeds), "seconds": round(row.seconds, 1),
                **{name: [round(v, 5) for v in (i.mean, i.low, i.high)] for name, i in row.mean.items()},
            } for row in self.rows
        ]  # fmt: skip
        about = {key: getattr(self, key) for key in ("progress", "summary", "rankers", "repeats", "features", "failed")}
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
    gains: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    of_all: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if "gain in Dice" in row.mean:
            place, gain = (row.target, row.n_cases), row.mean["gain in Dice"].mean
            gains.setdefault((row.candidate, row.strategy), {})[place] = gain
            of_all.setdefault(place, []).append(gain)
    summary = [
        {
            "candidate": candidate, "strategy": strategy, "mean": float(np.mean([*own.values()])),
            "median": float(np.median([*own.values()])), "wins": sum(gain > 0 for gain in own.values()), "n": len(own),
            "above": float(np.mean([gain - np.mean(of_all[place]) for place, gain in own.items()])),
        } for (candidate, strategy), own in gains.items()
    ]  # fmt: skip
    done = sum(len(row.seeds) for row in rows)
    ranked = [path for cell in study.rankings if (path := study.result(cell)).is_file() and cell.name not in failed]
    hours = sum(row.seconds * len(row.seeds) for row in rows) / 3600
    return StudyResults(
        rows=rows,
        failed=failed,
        tests={target.dataset: target.test for target in study.targets},
        scratch=scratch,
        progress={
            "done": done, "trainings": len(study.trainings), "ranked": len(ranked), "rankings": len(study.rankings),
            "hours": round(hours, 2), "compared": sum(map(len, shared_folds(study, rows).values())),
            "folds": study.seeds * sum(len(target.n_cases) for target in study.targets),
        },
        summary=sorted(summary, key=lambda entry: -entry["above"]),
        rankers=compare_rankers(study, rows, n_resamples=n_resamples),
        repeats=compare_seeds(study, rows, n_resamples=n_resamples),
        features=sorted({content["features"] for content in map(read_json, ranked) if "features" in content}),
    )  # fmt: skip
