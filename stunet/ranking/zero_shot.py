"""Zero-shot Dice from points: what a candidate predicts as it is, without predicting whole volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stunet.labels import match_names

__all__ = ["PointPredictions", "zero_shot_at_points"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PointPredictions:
    """What a candidate's own head says at points of one case.

    Attributes:
        labels: ``(n,)``, the true class of each point.
        outputs: ``(n,)``, the output with the highest probability.
        voxels: For each class in the case how many voxels it has.
        annotated: Label values of the structures that the case annotates; nothing is said about the others.
    """

    labels: npt.NDArray[np.integer]
    outputs: npt.NDArray[np.integer]
    voxels: Mapping[int, int]
    annotated: frozenset[int]


def zero_shot_at_points(
    cases: Sequence[PointPredictions], structures: Mapping[int, str], outputs: Sequence[str] | None
) -> dict[str, float | None]:
    """Estimate the Dice of a candidate's own predictions of the structures that it shares with the target by name.

    The points are a stratified sample of the volume, with the number of voxels of each class known. So the share of a
    class's points that the candidate calls structure c, times that number, estimates the voxels of the class that a
    prediction of the whole volume would call c; true and false positives are sums of these. Outputs that are none of
    the target's structures count as background. What is rarer in the background than one point of it is overlooked or
    counted too high by chance: the more points, the better.

    Args:
        cases: Predictions at the points of each case.
        structures: The target's structure by label.
        outputs: What the candidate's outputs stand for, background first; None where nothing says it.

    Returns:
        For each structure the mean over the cases that have it or in which it is predicted; None where the candidate
        does not know it, or no case says anything about it.
    """
    names = list(outputs or ("background",))
    found = match_names(names[1:], list(structures.values()))
    label_of = np.zeros(len(names), np.int64)
    known = {label: match for label, name in structures.items() if (match := found[name]) is not None}
    for label, match in known.items():
        label_of[names.index(match)] = label
    dice: dict[str, list[float]] = {name: [] for name in structures.values()}
    for case in cases:
        for label in known.keys() & case.annotated:
            if (value := _dice(label_of[case.outputs] == label, case, label)) is not None:
                dice[structures[label]].append(value)
    return {name: float(np.mean(values)) if values else None for name, values in dice.items()}


def _dice(called: npt.NDArray[np.bool_], case: PointPredictions, label: int) -> float | None:
    voxels = {k: n * float(called[case.labels == k].mean()) for k, n in case.voxels.items()}
    predicted, true = sum(voxels.values()), case.voxels.get(label, 0)
    return 2 * voxels.get(label, 0.0) / (predicted + true) if predicted + true > 0 else None
