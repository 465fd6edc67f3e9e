"""How well scores predict the order of fine-tuned Dice: weighted Kendall tau, correlations, regret; with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stunet.errors import TransferabilityError

__all__ = ["STATISTICS", "Agreement", "Estimate", "agreement", "check_scores", "top_regret", "weighted_kendall"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic with its percentile bootstrap interval.

    Attributes:
        value: Over all checkpoints.
        low: Lower end, NaN where no resample has a value.
        high: Upper end.
        degenerate: Resamples without a value, which the interval leaves out: all scores or all Dice equal.
    """

    value: float
    low: float
    high: float
    degenerate: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Scores of one metric beside the Dice after fine-tuning.

    Attributes:
        estimates: By name of the statistic; see :data:`STATISTICS`.
        top: The checkpoint with the highest score, the first of equal ones.
        best: The checkpoint with the highest Dice.
        n_checkpoints: Number of checkpoints.
        n_resamples: Number of resamples behind each interval.
        confidence: Share of the resamples that the intervals span.
    """

    estimates: Mapping[str, Estimate]
    top: str
    best: str
    n_checkpoints: int
    n_resamples: int
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where NaN is null."""
        content = asdict(self)
        for estimate in content["estimates"].values():
            estimate.update({k: None for k in ("value", "low", "high") if math.isnan(estimate[k])})
        return content


def weighted_kendall(scores: Array, dice: Array) -> float:
    """Kendall's tau that weighs exchanges by rank, hyperbolically: those among the best count most (scipy)."""
    return float(stats.weightedtau(scores, dice).statistic)


def top_regret(scores: Array, dice: Array) -> float:
    """Best Dice minus that of the checkpoint with the highest score, or their mean Dice where several have it."""
    return float(dice.max() - dice[scores == scores.max()].mean())


def _kendall_of_rows(x: Array, y: Array) -> Array:
    return np.array([weighted_kendall(*row) for row in zip(x, y, strict=True)])


def _pearson_of_rows(x: Array, y: Array) -> Array:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return np.asarray((x * y).sum(1) / np.sqrt(np.square(x).sum(1) * np.square(y).sum(1)), dtype=np.float64)


def _spearman_of_rows(x: Array, y: Array) -> Array:
    return _pearson_of_rows(stats.rankdata(x, axis=1), stats.rankdata(y, axis=1))


def _regret_of_rows(x: Array, y: Array) -> Array:
    return np.array([top_regret(*row) for row in zip(x, y, strict=True)])


# Of all resamples at once, where scipy would be called for each.
_OF_ROWS: Mapping[str, Callable[[Array, Array], Array]] = {
    "weighted_kendall": _kendall_of_rows,
    "pearson": _pearson_of_rows,
    "spearman": _spearman_of_rows,
    "regret": _regret_of_rows,
}

STATISTICS = tuple(_OF_ROWS)
"""Names of the statistics. All but the regret, a difference of Dice, are 1 at best; the regret is 0."""


def agreement(
    scores: Mapping[str, float],
    dice: Mapping[str, float],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare a metric's scores with the Dice after fine-tuning.

    Intervals come from resampling checkpoints with replacement, and say how far the result hangs on which checkpoints
    happened to be compared. With few checkpoints they are wide, and rightly so.

    Args:
        scores: Score by checkpoint, higher is better.
        dice: Dice after fine-tuning by checkpoint, the same names.
        n_resamples: Resamples for the intervals.
        confidence: Share of the resamples that an interval spans, in equal tails.
        seed: Seed of the resamples. Equal seeds draw the same checkpoints for every metric.

    Raises:
        TransferabilityError: Names differ, a value is not finite, all are equal, or there are fewer than 3 checkpoints.
    """
    if n_resamples < 1 or not 0 < confidence < 1:
        raise TransferabilityError(
            "an interval that is not defined",
            got=f"{n_resamples} resamples, confidence {confidence:g}",
            expected="at least 1 resample and a confidence between 0 and 1",
            remedy="Correct them.",
        )
    check_scores(scores, dice)
    names = sorted(scores)
    x, y = (np.array([values[name] for name in names], dtype=np.float64) for values in (scores, dice))
    draws = np.random.default_rng(seed).integers(0, len(names), size=(n_resamples, len(names)))
    return Agreement(
        estimates={name: _estimate(name, x, y, draws, confidence) for name in STATISTICS},
        top=names[int(x.argmax())],
        best=names[int(y.argmax())],
        n_checkpoints=len(names),
        n_resamples=n_resamples,
        confidence=confidence,
    )


def _estimate(name: str, x: Array, y: Array, draws: NDArray[np.int64], confidence: float) -> Estimate:
    of_rows = _OF_ROWS[name]
    # A resample may draw one value only. The regret is defined even then.
    varied = (np.ptp(x[draws], axis=1) > 0) & (np.ptp(y[draws], axis=1) > 0)
    kept = draws if name == "regret" else draws[varied]
    found = of_rows(x[kept], y[kept])
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail]).tolist() if found.size else (math.nan, math.nan)
    return Estimate(float(of_rows(x[None], y[None])[0]), low, high, len(draws) - len(kept))


def check_scores(scores: Mapping[str, float], dice: Mapping[str, float]) -> None:
    """Check that scores and Dice can be compared.

    NaN comes first: scipy's weighted tau takes it for a value like any other.

    Raises:
        TransferabilityError: See :func:`agreement`.
    """
    for what, values in (("scores", scores), ("Dice", dice)):
        bad = [f"{name}: {value}" for name, value in sorted(values.items()) if not math.isfinite(value)]
        if bad:
            raise _error(f"{what} that are not finite", _some(bad), "a finite number for each checkpoint",
                         "Leave these checkpoints out, or repair what failed for them.")  # fmt: skip
    if set(scores) != set(dice):
        only = [f"only in the scores: {_some(sorted(set(scores) - set(dice)))}"] if set(scores) - set(dice) else []
        only += [f"only in the Dice: {_some(sorted(set(dice) - set(scores)))}"] if set(dice) - set(scores) else []
        raise _error("different checkpoints", "; ".join(only), "the same names on both sides",
                     "Correct the names, or leave these checkpoints out on both sides.")  # fmt: skip
    if len(scores) < 3:
        raise _error("too few checkpoints", f"{len(scores)}", "at least 3", "Compare more checkpoints.")
    for what, values in (("scores", scores), ("Dice", dice)):
        if len(set(values.values())) == 1:
            raise _error(f"{what} that are all equal", f"{next(iter(values.values())):g} for {len(values)} checkpoints",
                         "values that order the checkpoints", "Check where they come from.")  # fmt: skip


def _error(problem: str, got: str, expected: str, remedy: str) -> TransferabilityError:
    return TransferabilityError(problem, got=got, expected=expected, remedy=remedy)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
