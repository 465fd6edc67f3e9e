"""Scoring one case; what the processes of an evaluation do.

Nothing here imports torch or nnU-Net, which each process would load anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from stunet.evaluation.orientation import CaseOrientation, count_reversed, sided_pairs
from stunet.evaluation.scores import NOT_ANNOTATED, StructureScore, dice_of, surface_scores, volume_scores
from stunet.evaluation.volumes import LabelVolume, check_same_geometry, check_values, read_label_volume
from stunet.labels import Comparison

__all__ = ["CaseScores", "EvaluationCase", "score_case"]

Boxes = Sequence[tuple[slice, ...] | None]

_VOXELS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class EvaluationCase:
    """A case to score.

    Attributes:
        name: Name of the case.
        reference: Its label map.
        prediction: The model's segmentation.
        comparisons: What is compared.
        observed: For each comparison the values that its structures have in this label map; None where the case does
            not annotate them.
        target_labels: Values of each structure of the dataset, by name.
        source_labels: Values of each structure of the model, by name.
        ignore: The dataset's ignore label: its voxels count for nothing.
        tolerance: Tolerance of the normalised surface Dice in mm.
    """

    name: str
    reference: Path
    prediction: Path
    comparisons: tuple[Comparison, ...]
    observed: tuple[tuple[int, ...] | None, ...]
    target_labels: dict[str, tuple[int, ...]]
    source_labels: dict[str, tuple[int, ...]]
    ignore: int | None
    tolerance: float


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case.

    Attributes:
        scores: One for each comparison, in order.
        orientation: What the case says about left and right.
    """

    scores: tuple[StructureScore, ...]
    orientation: CaseOrientation


def score_case(case: EvaluationCase) -> CaseScores:
    """Score one case.

    Raises:
        DatasetError: A file that cannot be read, a prediction on another grid than the label map, or values that no
            ``dataset.json`` lists.
    """
    reference, prediction = read_label_volume(case.reference), read_label_volume(case.prediction)
    ignore = () if case.ignore is None else (case.ignore,)
    for volume, labels, more, of in (
        (prediction, case.source_labels, (), "the model"),
        (reference, case.target_labels, ignore, "the dataset"),
    ):
        check_values(volume, {0, *more, *(value for values in labels.values() for value in values)}, of=of)
    check_same_geometry(prediction, reference)
    overlap = _Overlap.of(reference.labels, prediction.labels, case.ignore)
    boxes: tuple[Boxes, Boxes] = (find_objects(reference.labels), find_objects(prediction.labels))
    scores = []
    for comparison, observed in zip(case.comparisons, case.observed, strict=True):
        if observed is None:
            scores.append(NOT_ANNOTATED)
            continue
        score = volume_scores(*overlap.counts(observed, comparison.source_values), overlap.n_voxels)
        if score.status == "scored":
            masks = _masks(reference, prediction, boxes, observed, comparison.source_values, case.ignore)
            nsd, hd95 = surface_scores(*masks, _spacing(reference), tolerance=case.tolerance)
            score = replace(score, metrics={**score.metrics, "NSD": nsd, "HD95": hd95})
        scores.append(score)
    return CaseScores(tuple(scores), _orientation(case, (reference, prediction), boxes, overlap))


@dataclass(frozen=True)
class _Overlap:
    """Voxels by value in the label map and in the prediction, without those that the label map says to ignore."""

    table: npt.NDArray[np.int64]

    @classmethod
    def of(cls, reference: npt.NDArray[Any], prediction: npt.NDArray[Any], ignore: int | None) -> _Overlap:
        rows, columns = int(reference.max()) + 1, int(prediction.max()) + 1
        counts = np.zeros(rows * columns, np.int64)
        flat = reference.ravel(), prediction.ravel()
        for start in range(0, reference.size, _VOXELS_AT_A_TIME):
            r, p = (labels[start : start + _VOXELS_AT_A_TIME].astype(np.int64) for labels in flat)
            counts += np.bincount(r * columns + p, minlength=rows * columns)
        table = counts.reshape(rows, columns)
        if ignore is not None and ignore < rows:
            table[ignore] = 0
        return cls(table)

    @property
    def n_voxels(self) -> int:
        return int(self.table.sum())

    def counts(self, target: Sequence[int], source: Sequence[int]) -> tuple[int, int, int]:
        """Voxels in both, in the label map, and in the prediction."""
        rows = self.table[[value for value in target if value < len(self.table)]]
        columns = [value for value in source if value < self.table.shape[1]]
        return int(rows[:, columns].sum()), int(rows.sum()), int(self.table[:, columns].sum())


def _masks(
    reference: LabelVolume,
    prediction: LabelVolume,
    boxes: tuple[Boxes, Boxes],
    target: Sequence[int],
    source: Sequence[int],
    ignore: int | None,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Both masks of a structure, around it; a flat image's without its flat axis."""
    pairs = ((boxes[0], target), (boxes[1], source))
    found = [b for all_boxes, values in pairs for v in values if v <= len(all_boxes) and (b := all_boxes[v - 1])]
    box = tuple(slice(min(b[i].start for b in found), max(b[i].stop for b in found)) for i in range(3))
    labels = reference.labels[box]
    inside, predicted = np.isin(labels, target), np.isin(prediction.labels[box], source)
    if ignore is not None:
        predicted &= labels != ignore
    axes = _flat_axis(reference)
    return inside.squeeze(axes), predicted.squeeze(axes)


def _spacing(volume: LabelVolume) -> tuple[float, ...]:
    return tuple(side for i, side in enumerate(volume.spacing) if i not in _flat_axis(volume))


def _flat_axis(volume: LabelVolume) -> tuple[int, ...]:
    flat = tuple(i for i, n in enumerate(volume.labels.shape) if n == 1)
    return flat if len(flat) == 1 else ()


def _orientation(
    case: EvaluationCase, volumes: tuple[LabelVolume, LabelVolume], boxes: tuple[Boxes, Boxes], overlap: _Overlap
) -> CaseOrientation:
    sides = []
    for volume, found, labels in zip(volumes, boxes, (case.target_labels, case.source_labels), strict=True):
        pairs = [(labels[left], labels[right]) for left, right in sided_pairs(labels)]
        sides.append(count_reversed(volume, found, pairs))
    names = {comparison.name: i for i, comparison in enumerate(case.comparisons)}
    dice, swapped = [], []
    for pair in sided_pairs(names):
        left, right = (names[name] for name in pair)
        for mine, other in ((left, right), (right, left)):
            observed = case.observed[mine]
            if observed is None or case.observed[other] is None:
                continue
            straight = overlap.counts(observed, case.comparisons[mine].source_values)
            crossed = overlap.counts(observed, case.comparisons[other].source_values)
            if straight[1]:
                dice.append(dice_of(*straight))
                swapped.append(dice_of(*crossed))
    if not dice:
        return CaseOrientation(sides[0], sides[1])
    return CaseOrientation(sides[0], sides[1], float(np.mean(dice)), float(np.mean(swapped)))
