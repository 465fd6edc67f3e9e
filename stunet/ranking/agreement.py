"""How well scores predict the order of fine-tuned Dice: weighted Kendall tau, correlations, regret; with intervals."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stunet.errors import TransferabilityError, reading

Array = NDArray[np.float64]

RANKING_FORMAT = 1
"""Value of ``format`` in ``ranking.json``."""


@dataclass(frozen=True)
class Statistic:
    """A statistic with its percentile bootstrap interval."""

    value: float  # over all checkpoints
    low: float  # lower end of the interval, NaN where no resample has a value
    high: float  # upper end, likewise
    degenerate: int  # resamples without a value, which the interval leaves out: all scores or all Dice equal


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Scores of one metric beside the Dice after fine-tuning."""

    estimates: Mapping[str, Statistic]  # by name; all but the regret, a difference of Dice, are 1 at best
    top: str  # the checkpoint with the highest score, the first of equal ones
    best: str  # the checkpoint with the highest Dice
    n_checkpoints: int
    n_resamples: int  # behind each interval
    confidence: float  # share of the resamples that the intervals span

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON, where NaN is null."""
        return dict(json.loads(msgspec.json.encode(self)))


def weighted_kendall(scores: Array, dice: Array) -> float:
    """Compute Kendall's tau that weighs exchanges by rank: those among the best count most (scipy)."""
    return float(stats.weightedtau(scores, dice).statistic)


def top_regret(scores: Array, dice: Array) -> float:
    """Return best Dice minus that of the checkpoint with the highest score, or their mean where several have it."""
    return float(dice.max() - dice[scores == scores.max()].mean())


def _pearson_of_rows(x: Array, y: Array) -> Array:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return np.asarray((x * y).sum(1) / np.sqrt(np.square(x).sum(1) * np.square(y).sum(1)), dtype=np.float64)


# Of all resamples at once, where scipy would be called for each.
_OF_ROWS: Mapping[str, Callable[[Array, Array], Array]] = {
    "weighted_kendall": lambda x, y: np.array(list(map(weighted_kendall, x, y))),
    "pearson": _pearson_of_rows,
    "spearman": lambda x, y: _pearson_of_rows(stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)),
    "regret": lambda x, y: np.array(list(map(top_regret, x, y))),
}


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

    >>> scores, dice = {"small": 1.2, "base": 1.9, "large": 1.5}, {"small": 0.80, "base": 0.84, "large": 0.85}
    >>> found = agreement(scores, dice)
    >>> found.top, found.best, round(found.estimates["regret"].value, 3)
    ('base', 'large', 0.01)

    Args:
        scores: Score by checkpoint, higher is better.
        dice: Dice after fine-tuning by checkpoint, the same names.
        n_resamples: Resamples for the intervals.
        confidence: Share of the resamples that an interval spans, in equal tails.
        seed: Seed of the resamples. Equal seeds draw the same checkpoints for every metric.

    Raises:
        TransferabilityError: Names differ, a value is not finite, all are equal, or there are fewer than 3 checkpoints.
    """
    # NaN comes first: scipy's weighted tau takes it for a value like any other.
    for what, values in (("scores", scores), ("Dice", dice)):
        if bad := [f"{name}: {value}" for name, value in sorted(values.items()) if not math.isfinite(value)]:
            raise TransferabilityError(f"{what} are not finite for {', '.join(bad[:8])}: leave these out")
    if set(scores) != set(dice):
        left, right = (", ".join(sorted(set(a) - set(b))[:8]) or "none" for a, b in ((scores, dice), (dice, scores)))
        raise TransferabilityError(f"only in the scores: {left}; only in the Dice: {right}; give both for each name")
    if len(scores) < 3:
        raise TransferabilityError(f"{len(scores)} checkpoints are too few: compare at least 3")
    for what, values in (("scores", scores), ("Dice", dice)):
        if len(set(values.values())) == 1:
            raise TransferabilityError(f"{what} of {len(values)} checkpoints are all equal: they order nothing")
    names = sorted(scores)
    x, y = (np.array([values[name] for name in names], dtype=np.float64) for values in (scores, dice))
    draws = np.random.default_rng(seed).integers(0, len(names), size=(n_resamples, len(names)))
    # A resample may draw one value only. The regret is defined even then.
    varied = draws[(np.ptp(x[draws], axis=1) > 0) & (np.ptp(y[draws], axis=1) > 0)]
    estimates = {}
    for name, of_rows in _OF_ROWS.items():
        kept = draws if name == "regret" else varied
        found = of_rows(x[kept], y[kept])
        tails = [(1 - confidence) / 2, 1 - (1 - confidence) / 2]
        low, high = np.quantile(found, tails).tolist() if found.size else (math.nan, math.nan)
        estimates[name] = Statistic(float(of_rows(x[None], y[None])[0]), low, high, len(draws) - len(kept))
    return Agreement(
        estimates=estimates,
        top=names[int(x.argmax())],
        best=names[int(y.argmax())],
        n_checkpoints=len(names),
        n_resamples=n_resamples,
        confidence=confidence,
    )


@contextmanager
def _content(path: str | os.PathLike[str]) -> Iterator[Any]:
    with reading(path, "a file of scores that cannot be used", TransferabilityError, "check its path and content"):
        yield json.loads(Path(path).read_text(encoding="utf-8"))  # with NaN, as nnU-Net writes it


def _numbers(values: Any) -> dict[str, float]:
    """Check and return numbers by name; null is NaN."""
    numbers = msgspec.convert(values, dict[str, float | None])
    return {name: math.nan if value is None else float(value) for name, value in numbers.items()}


def read_scores(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Read scores by metric and checkpoint.

    Args:
        path: A ``ranking.json`` of ``stunet rank``, or a JSON object of scores by checkpoint, whose metric is then
            called ``score``. A score that is missing or null is NaN.

    Raises:
        TransferabilityError: The file is missing or holds something else.
    """
    with _content(path) as content:
        if "candidates" not in content:
            return {"score": _numbers(content)}
        names, number = [str(row["name"]) for row in content["candidates"]], content["format"]
        rows = {str(row["name"]): _numbers(row["scores"]) for row in content["candidates"]}
    metrics = list(dict.fromkeys(metric for scores in rows.values() for metric in scores))
    if number != RANKING_FORMAT or len(rows) < len(names) or not metrics:
        got = f"{path} has format {number}, {len(metrics)} metrics and candidates {', '.join(names[:8]) or 'none'}"
        raise TransferabilityError(f"{got}: give scores of format {RANKING_FORMAT}, each candidate once")
    return {metric: {name: scores.get(metric, math.nan) for name, scores in rows.items()} for metric in metrics}


def read_dice(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the Dice by checkpoint.

    Args:
        path: A JSON object of Dice by checkpoint; or a folder, in which each folder is called after a checkpoint and
            holds one ``summary.json`` of nnU-Net at any depth.

    Raises:
        TransferabilityError: The file or folder is missing or holds something else.
    """
    if not Path(path).is_dir():
        with _content(path) as content:
            return _numbers(content)
    folders = {entry.name: entry for entry in sorted(Path(path).iterdir()) if any(entry.rglob("summary.json"))}
    if not folders:
        raise TransferabilityError(f"no summary.json in {path}: give a folder of folders NAME that hold one each")
    return read_summaries(folders)


def read_summaries(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, float]:
    """Read ``foreground_mean`` Dice from nnU-Net's ``summary.json`` of each checkpoint, or of a folder that holds one.

    Raises:
        TransferabilityError: A file is missing, holds something else, or a folder holds several.
    """
    dice: dict[str, float] = {}
    for name, path in paths.items():
        found = sorted(Path(path).rglob("summary.json")) if Path(path).is_dir() else [Path(path)]
        if len(found) != 1:
            got = ", ".join(str(file.relative_to(path)) for file in found[:4])
            raise TransferabilityError(f"{path} holds {len(found)} summary.json ({got}): give NAME=PATH of one")
        with _content(found[0]) as content:
            dice |= _numbers({name: content["foreground_mean"]["Dice"]})
    return dice
