"""Zero-shot Dice: a candidate's own predictions of the structures that source and target share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.labels import match_names

__all__ = ["Values", "ZeroShotDice", "shared_structures", "zero_shot_dice"]

Values = int | tuple[int, ...]
"""The label value of a structure, or the values that a region joins."""


@dataclass(frozen=True)
class ZeroShotDice:
    """Dice of what a candidate predicts without fine-tuning.

    Attributes:
        mean: Mean over the structures with a score, NaN where none has one.
        structures: Mean over cases of each structure, NaN where no case has it or predicts it.
        n_cases: Number of cases.
    """

    mean: float
    structures: Mapping[str, float]
    n_cases: int


def shared_structures(source: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, tuple[Values, Values]]:
    """Structures that two ``labels`` of ``dataset.json`` share, by name or usual spelling.

    Args:
        source: Value, or list of values for a region, by name.
        target: The same of the target dataset.

    Returns:
        Value of source and target by the target's name, without background and ignore label.
    """

    def foreground(labels: Mapping[str, Any]) -> dict[str, Values]:
        listed = {k: tuple(v) if isinstance(v, list | tuple) else int(v) for k, v in labels.items() if k != "ignore"}
        return {name: value for name, value in listed.items() if value not in (0, (0,))}

    sources, targets = foreground(source), foreground(target)
    matches = match_names(list(sources), list(targets))
    return {name: (sources[match], targets[name]) for name, match in matches.items() if match is not None}


def zero_shot_dice(
    pairs: Iterable[tuple[NDArray[np.integer], NDArray[np.integer]]], values: Mapping[str, tuple[Values, Values]]
) -> ZeroShotDice:
    """Dice of predicted label maps of the source's values with label maps of the target's.

    As in nnU-Net's evaluation, a case that neither has nor predicts a structure says nothing about it. Structures that
    the candidate does not know are left out, so compare candidates on structures that all of them know.

    Args:
        pairs: Predicted and true label map of each case, equal shapes.
        values: Value of source and target by structure; see :func:`shared_structures`.

    Raises:
        TransferabilityError: No structure is shared, or shapes of a case differ.
    """
    if not values:
        raise TransferabilityError(
            "no structure that source and target share",
            got="0 structures",
            expected="at least one structure of the target among the candidate's outputs",
            remedy="Rank this candidate by its features, for example by ccfv.",
        )
    scores: dict[str, list[float]] = {name: [] for name in values}
    n_cases = 0
    for predicted, true in pairs:
        if predicted.shape != true.shape:
            raise TransferabilityError(
                "label maps of different shapes",
                got=f"prediction {predicted.shape}, reference {true.shape} in case number {n_cases + 1}",
                expected="equal shapes",
                remedy="Predict at the spacing of the reference.",
            )
        n_cases += 1
        for name, (source, target) in values.items():
            a, b = np.isin(predicted, source), np.isin(true, target)
            total = int(a.sum()) + int(b.sum())
            if total:
                scores[name].append(2 * int((a & b).sum()) / total)
    means = {name: sum(found) / len(found) if found else math.nan for name, found in scores.items()}
    defined = [mean for mean in means.values() if not math.isnan(mean)]
    return ZeroShotDice(sum(defined) / len(defined) if defined else math.nan, means, n_cases)
