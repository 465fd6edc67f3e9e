"""How well scores predict the order of fine-tuned Dice: weighted Kendall tau, correlations, regret; with intervals.

Of one metric on one target, on average over targets, and of the metric that the other targets choose.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

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


def pairwise_kendall(scores: Array, dice: Array) -> float:
    """Compute Kendall's tau with each pair weighed by ``1 / (i j)`` of its true ranks by Dice (arXiv 2602.23916).

    The paper has no ties; here equal Dice share their mean rank, and ties are left out of the denominator as in tau-b.
    """
    ranks = stats.rankdata(-dice)
    x, y = (np.sign(values[:, None] - values) for values in (scores, dice))
    weights = 1 / np.outer(ranks, ranks)
    return float((weights * x * y).sum() / math.sqrt((weights * x**2).sum() * (weights * y**2).sum()))


def top_regret(scores: Array, dice: Array, first: int = 1) -> float:
    """Return best Dice minus the best of the ``first`` checkpoints by score; of equal ones, the mean over all choices.

    >>> top_regret(np.array([3.0, 2.0, 1.0]), np.array([0.5, 0.75, 1.0])), top_regret(np.zeros(2), np.array([0.5, 1.0]))
    (0.5, 0.25)
    """
    last = np.sort(scores)[-first:][0]
    sure, tied = dice[scores > last], np.sort(dice[scores == last])
    choices = special.comb(np.arange(len(tied)), first - len(sure) - 1)  # those with this one as the best of the tied
    best = np.maximum(tied, sure.max(initial=-np.inf))
    return float(dice.max() - choices @ best / choices.sum())


def _pearson_of_rows(x: Array, y: Array) -> Array:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return np.asarray((x * y).sum(1) / np.sqrt(np.square(x).sum(1) * np.square(y).sum(1)), dtype=np.float64)


# Of all resamples at once, where scipy would be called for each.
_OF_ROWS: Mapping[str, Callable[[Array, Array], Array]] = {
    "weighted_kendall": lambda x, y: np.array(list(map(weighted_kendall, x, y))),
    "pairwise_kendall": lambda x, y: np.array(list(map(pairwise_kendall, x, y))),
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
    names, x, y = _paired(scores, dice)
    if np.ptp(x) == 0:
        raise TransferabilityError(f"scores of {len(x)} checkpoints are all equal: they order nothing")
    n = len(x)
    found = _of_draws(x, y, np.random.default_rng(seed).integers(0, n, size=(n_resamples, n)))
    return Agreement(
        estimates={name: _statistic(values, confidence) for name, values in found.items()},
        top=names[int(x.argmax())],
        best=names[int(y.argmax())],
        n_checkpoints=len(names),
        n_resamples=n_resamples,
        confidence=confidence,
    )


def _paired(scores: Mapping[str, float], dice: Mapping[str, float]) -> tuple[list[str], Array, Array]:
    """Return names, scores and Dice in one order, of at least 3 checkpoints that the Dice puts in an order."""
    # NaN comes first: scipy's weighted tau takes it for a value like any other.
    for what, values in (("scores", scores), ("Dice", dice)):
        if bad := [f"{name}: {value}" for name, value in sorted(values.items()) if not math.isfinite(value)]:
            raise TransferabilityError(f"{what} are not finite for {', '.join(bad[:8])}: leave these out")
    if set(scores) != set(dice):
        left, right = (", ".join(sorted(set(a) - set(b))[:8]) or "none" for a, b in ((scores, dice), (dice, scores)))
        raise TransferabilityError(f"only in the scores: {left}; only in the Dice: {right}; give both for each name")
    if len(scores) < 3:
        raise TransferabilityError(f"{len(scores)} checkpoints are too few: compare at least 3")
    if len(set(dice.values())) == 1:
        raise TransferabilityError(f"Dice of {len(dice)} checkpoints are all equal: they order nothing")
    names = sorted(scores)
    x, y = (np.array([values[name] for name in names], dtype=np.float64) for values in (scores, dice))
    return names, x, y


def _of_draws(x: Array, y: Array, resamples: NDArray[np.int64]) -> dict[str, Array]:
    """Compute each statistic ``(1 + B,)``: of the checkpoints, and of each resample ``(B, n)`` of them.

    NaN stands where all scores or all Dice are equal.
    """
    draws = np.vstack([np.arange(len(x)), resamples])
    varied = (np.ptp(x[draws], axis=1) > 0) & (np.ptp(y[draws], axis=1) > 0)
    found = {name: np.full(len(draws), np.nan) for name in _OF_ROWS}
    for name, of_rows in _OF_ROWS.items():
        kept = varied | (name == "regret")  # which is defined even then
        found[name][kept] = of_rows(x[draws[kept]], y[draws[kept]])
    return found


def _statistic(values: Array, confidence: float) -> Statistic:
    defined = values[1:][~np.isnan(values[1:])]
    tails = [(1 - confidence) / 2, 1 - (1 - confidence) / 2]
    low, high = np.quantile(defined, tails).tolist() if defined.size else (math.nan, math.nan)
    return Statistic(float(values[0]), low, high, len(values) - 1 - len(defined))


def mean_agreement(
    scores: Mapping[str, Mapping[str, float]],
    dice: Mapping[str, Mapping[str, float]],
    *,
    against: Mapping[str, Mapping[str, float]] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Statistic]:
    """Average the agreement of a metric with the Dice after fine-tuning over targets.

    Intervals come from resampling targets and, within each, checkpoints: those of one name are drawn on all targets
    together, since a score may misjudge a checkpoint on all of them. Where all scores are equal, a correlation is 0,
    since they order nothing.

    >>> dice = {"liver": {"a": 0.8, "b": 0.9, "c": 0.7}, "heart": {"a": 0.6, "b": 0.5, "c": 0.4}}
    >>> found = mean_agreement(dict.fromkeys(dice, {"a": 2.0, "b": 3.0, "c": 1.0}), dice)
    >>> found["spearman"].value, round(found["regret"].value, 3)
    (0.75, 0.05)

    Args:
        scores: Score by target and checkpoint, higher is better.
        dice: Dice after fine-tuning by target and checkpoint, the same names.
        against: Scores of another metric, whose agreement is subtracted, resample by resample.
        n_resamples: As for :func:`agreement`, as are the other arguments.
        confidence: Share of the resamples that an interval spans, in equal tails.
        seed: Seed of the resamples.

    Raises:
        TransferabilityError: As for :func:`agreement`, except that scores may be equal; or targets differ.
    """
    values = _of_targets(scores, dice, n_resamples, seed)
    if against is not None:
        subtracted = _of_targets(against, dice, n_resamples, seed)
        values = {name: each - subtracted[name] for name, each in values.items()}
    drawn = np.random.default_rng([seed, len(dice)]).integers(0, len(dice), size=(n_resamples, len(dice)))
    resamples = np.arange(1, n_resamples + 1)[:, None]
    means = {name: np.append(each[:, 0].mean(), each[drawn, resamples].mean(1)) for name, each in values.items()}
    return {name: _statistic(each, confidence) for name, each in means.items()}


def _of_targets(
    scores: Mapping[str, Mapping[str, float]], dice: Mapping[str, Mapping[str, float]], n_resamples: int, seed: int
) -> dict[str, Array]:
    """Compute each statistic ``(T, 1 + B)`` of each target by name and of its resamples; 0 for one without order."""
    if set(scores) != set(dice) or not dice:
        raise TransferabilityError(f"scores of {sorted(scores)}, Dice of {sorted(dice)}: give both for each target")
    names = sorted({name for of in dice.values() for name in of})
    # In each place of a resample, the checkpoint of the lowest number: any of a target's is as likely as any other,
    # and targets with the same checkpoints have the same resamples.
    numbers = np.random.default_rng(seed).random((n_resamples, len(names), len(names)), np.float32)
    found = []
    for target in sorted(dice):
        own, x, y = _paired(scores[target], dice[target])
        found.append(_of_draws(x, y, numbers[:, : len(own), [names.index(name) for name in own]].argmin(2)))
    return {name: np.nan_to_num(np.stack([each[name] for each in found])) for name in _OF_ROWS}


class Choice(NamedTuple):
    """What choosing a metric by other targets comes to on one target."""

    metric: str  # the one with the best mean on the others, the first of equal ones
    agreement: Mapping[str, float]  # each statistic of this metric on the target


def leave_one_target_out(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    dice: Mapping[str, Mapping[str, float]],
    *,
    by: str = "weighted_kendall",
) -> dict[str, Choice]:
    """Choose the metric for each target by its mean agreement on all other targets.

    The agreement of the choice is of a target that had no part in it. For its mean and interval, give the scores of
    each target's choice to :func:`mean_agreement`.

    Args:
        scores: Score by metric, target and checkpoint, higher is better; all metrics score the same checkpoints.
        dice: Dice after fine-tuning by target and checkpoint.
        by: The statistic that chooses, by its name in :class:`Agreement`; the regret chooses where it is lowest.

    Raises:
        TransferabilityError: As for :func:`mean_agreement`; or fewer than two targets, or an unknown statistic.
    """
    if len(dice) < 2 or by not in _OF_ROWS:
        raise TransferabilityError(f"{len(dice)} targets, chosen by {by}: give 2 or more, and one of {[*_OF_ROWS]}")
    found = {metric: _of_targets(by_target, dice, 0, 0) for metric, by_target in scores.items()}
    choices, sign = {}, -1 if by == "regret" else 1
    for place, target in enumerate(sorted(dice)):
        means = {metric: sign * np.delete(values[by][:, 0], place).mean() for metric, values in found.items()}
        chosen = max(means, key=means.__getitem__)
        choices[target] = Choice(chosen, {name: float(each[place, 0]) for name, each in found[chosen].items()})
    return choices


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
