"""What the cells of a study say together: Dice with intervals, gains over training from scratch, and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stunet.files import read_json
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
    resamples: dict[tuple[int, int], Bootstrap] = {}
    for row in rows:
        of: dict[str, Callable[[Row], Array]] = {"Dice": lambda r: r.dice, "surface Dice": lambda r: r.surface}
        for name, values in of.items():
            row.mean[name] = _bootstrap(resamples, values(row), n_resamples)
            base = baseline.get((row.target, row.n_cases))
            if base is None or base is row:
                continue
            if shared := [seed for seed in row.seeds if seed in base.seeds]:
                mine, theirs = ([each.seeds.index(seed) for seed in shared] for each in (row, base))
                gains = values(row)[mine] - values(base)[theirs]
                row.mean[f"gain in {name}"] = _bootstrap(resamples, gains, n_resamples)


def _bootstrap(resamples: dict[tuple[int, int], Bootstrap], values: Array, n_resamples: int) -> Interval:
    n_seeds, n_cases = values.shape
    if (n_seeds, n_cases) not in resamples:
        resamples[n_seeds, n_cases] = Bootstrap(n_seeds, n_cases, n_resamples)
    return resamples[n_seeds, n_cases].interval(values)
