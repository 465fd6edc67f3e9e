"""Scores of one case, and what it says about left and right.

What is scored where a structure is absent (the same as nnU-Net's evaluation, as far as that goes):

=========================  ============  ====  ====  ==========================
in the label map           predicted     Dice  NSD   HD95
=========================  ============  ====  ====  ==========================
yes                        yes           0..1  0..1  mm
yes                        no (missed)   0     0     infinite: none, but counted
no                         yes (spurious) 0    0     infinite: none, but counted
no                         no (absent)   none  none  none
not annotated              either        none  none  none
=========================  ============  ====  ====  ==========================

Nothing here imports PyTorch or nnU-Net, which each process would load anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects
from surface_distance import compute_robust_hausdorff, compute_surface_dice_at_tolerance, compute_surface_distances

from stunet.errors import DatasetError
from stunet.labels.aliases import canonical_name
from stunet.labels.comparisons import Comparison
from stunet.volumes import GRID_TOLERANCE, LABEL_ENDINGS, Volume, check_shape, corner_distance, read_labels

METRICS = ("Dice", "NSD", "HD95")
"""The metrics that are shown: higher is better for the first two, the third is in mm."""

_COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")
_VOXELS_AT_A_TIME = 2**22

Status = Literal["scored", "missed", "spurious", "absent", "not annotated"]
Mask = npt.NDArray[np.bool_]
Boxes = Sequence[tuple[slice, ...] | None]


class StructureScore(NamedTuple):
    """Scores of one structure in one case.

    Attributes:
        status: ``scored``; ``missed`` or ``spurious``, where it is in the label map or in the prediction alone;
            ``absent`` from both; or ``not annotated``.
        metrics: Under nnU-Net's names ``Dice`` and ``IoU``, and the voxels ``TP``, ``FP``, ``FN``, ``TN``, ``n_pred``,
            ``n_ref``; with them ``NSD``, the normalised surface Dice, and ``HD95``, the 95th percentile Hausdorff
            distance in mm. None where there is none.
    """

    status: Status
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class EvaluationCase:
    """A case to score.

    Attributes:
        name: Name of the case.
        reference: Its label map.
        prediction: The model's segmentation.
        comparisons: What is compared.
        observed: Values of each comparison's structures in this label map; None where the case does not annotate them.
        target_labels: Values of each structure of the dataset.
        source_labels: Values of each structure of the model.
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


class Sides(NamedTuple):
    """How many pairs of a left and a right structure were looked at, and how many lie the wrong way round."""

    pairs: int = 0
    reversed: int = 0

    @property
    def suspicious(self) -> bool:
        """Whether most pairs lie the wrong way round."""
        return 2 * self.reversed > self.pairs


class CaseOrientation(NamedTuple):
    """What a case says about left and right.

    Attributes:
        reference: Pairs in its label map.
        prediction: Pairs in its prediction.
        dice: Mean Dice of the sided structures that the label map has; None where it has none.
        swapped_dice: The same with left and right of the prediction swapped.
    """

    reference: Sides = Sides()
    prediction: Sides = Sides()
    dice: float | None = None
    swapped_dice: float | None = None


class CaseScores(NamedTuple):
    """Scores of one case, one for each comparison in order, and what the case says about left and right."""

    scores: tuple[StructureScore, ...]
    orientation: CaseOrientation


def score_case(case: EvaluationCase) -> CaseScores:
    """Score one case.

    Raises:
        DatasetError: A file that cannot be read, a prediction on another grid than the label map, or values that no
            ``dataset.json`` lists.
    """
    ignored = () if case.ignore is None else (case.ignore,)
    reference = _read(case.reference, case.target_labels, "dataset", ignored)
    prediction = _read(case.prediction, case.source_labels, "model")
    _check_grid(prediction, reference)
    overlap = _overlap(reference.voxels, prediction.voxels)
    overlap[[value for value in ignored if value < len(overlap)]] = 0
    boxes: tuple[Boxes, Boxes] = find_objects(reference.voxels), find_objects(prediction.voxels)
    flat = tuple(axis for axis, n in enumerate(reference.voxels.shape) if n == 1)
    flat = flat if len(flat) == 1 else ()  # a flat image is scored in its plane
    spacing = [side for axis, side in enumerate(reference.spacing) if axis not in flat]
    scores = []
    for comparison, observed in zip(case.comparisons, case.observed, strict=True):
        if observed is None:
            metrics = dict.fromkeys(("Dice", "IoU", "NSD", "HD95", *_COUNTS))
            scores.append(StructureScore("not annotated", metrics))
            continue
        counts = _counts(overlap, observed, comparison.source_values)
        score = volume_scores(*counts, int(overlap.sum()))
        if score.status == "scored":
            values = (observed, comparison.source_values)
            found = [box for of, wanted in zip(boxes, values, strict=True) for box in _boxes_of(of, wanted)]
            box = tuple(slice(min(b[i].start for b in found), max(b[i].stop for b in found)) for i in range(3))
            labels = reference.voxels[box]
            inside, predicted = np.isin(labels, observed), np.isin(prediction.voxels[box], comparison.source_values)
            masks = inside.squeeze(flat), (predicted & ~np.isin(labels, ignored)).squeeze(flat)
            score.metrics["NSD"], score.metrics["HD95"] = surface_scores(*masks, spacing, tolerance=case.tolerance)
        scores.append(score)
    sides = [
        _count_reversed(volume, of, labels)
        for volume, of, labels in zip(
            (reference, prediction), boxes, (case.target_labels, case.source_labels), strict=True
        )
    ]
    return CaseScores(tuple(scores), CaseOrientation(sides[0], sides[1], *_swapped_dice(case, overlap)))


def volume_scores(tp: int, n_ref: int, n_pred: int, n_voxels: int) -> StructureScore:
    """Scores that need no more than counts of voxels; NSD and HD95 only where a structure is absent.

    ``tp`` voxels are inside the structure in label map and prediction, ``n_ref`` and ``n_pred`` in one of them, and
    ``n_voxels`` count at all.
    """
    fp, fn = n_pred - tp, n_ref - tp
    counts = dict(zip(_COUNTS, (tp, fp, fn, n_voxels - tp - fp - fn, n_pred, n_ref), strict=True))
    if n_ref == n_pred == 0:
        return StructureScore("absent", {"Dice": None, "IoU": None, "NSD": None, "HD95": None, **counts})
    status: Status = "scored" if n_ref and n_pred else "missed" if n_ref else "spurious"
    dice, iou, nsd = 2 * tp / (n_ref + n_pred), tp / (tp + fp + fn), None if status == "scored" else 0.0
    return StructureScore(status, {"Dice": dice, "IoU": iou, "NSD": nsd, "HD95": None, **counts})


def surface_scores(
    reference: Mask, prediction: Mask, spacing: Sequence[float], *, tolerance: float
) -> tuple[float, float]:
    """Normalised surface Dice and 95th percentile Hausdorff distance in mm, both weighted by surface area.

    They are those of the ``surface-distance`` package: surfaces run between voxel centres, through the eight voxels of
    each cube that the structure does not fill (arXiv 1809.04430, section 4.4). Voxels beyond the arrays are outside.

    Args:
        reference: The structure in the label map, with 2 or 3 axes; not empty.
        prediction: The structure in the prediction, of the same shape; not empty.
        spacing: mm along each axis.
        tolerance: How far surfaces may lie apart and still agree, in mm.
    """
    (box,) = find_objects((reference | prediction).astype(np.uint8))
    masks = (np.ascontiguousarray(mask[box]) for mask in (reference, prediction))
    distances: Any = compute_surface_distances(*masks, tuple(spacing))
    nsd = compute_surface_dice_at_tolerance(distances, tolerance)
    return float(nsd), float(compute_robust_hausdorff(distances, 95))


def sided_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that mean the left and the right one of the same structure."""
    known = {canonical_name(name): name for name in names}
    pairs = (
        (name, known.get(f"{meant.removesuffix('left')}right"))
        for meant, name in known.items()
        if meant.endswith("_left")
    )
    return [(left, right) for left, right in pairs if right is not None]


def _read(path: Path, labels: dict[str, tuple[int, ...]], whose: str, more: Sequence[int] = ()) -> Volume:
    if not path.name.endswith(LABEL_ENDINGS):
        raise DatasetError(f"{path} is of a format that cannot be scored: convert it to {', '.join(LABEL_ENDINGS)}")
    volume = read_labels(path)
    known = {0, *more, *(value for values in labels.values() for value in values)}
    found = np.flatnonzero(sum(np.bincount(plane.ravel(), minlength=2**16) for plane in volume.voxels.T))
    if unknown := [str(value) for value in found if value not in known]:
        said = f"{', '.join(unknown[:5])}{' …' * (len(unknown) > 5)}"
        raise DatasetError(
            f"{path} has values that the {whose}'s dataset.json (0 to {max(known)}) does not list: {said}"
        )
    return volume


def _check_grid(prediction: Volume, reference: Volume) -> None:
    """Check that a prediction lies on the grid of the label map, to a twentieth of a voxel's side at each corner."""
    check_shape(prediction, reference)
    apart = corner_distance(prediction.affine, reference.affine, reference.voxels.shape)
    if apart > GRID_TOLERANCE * reference.spacing.min():
        mine, theirs = (np.round(volume.affine[:3], 4).tolist() for volume in (prediction, reference))
        said = f"lies {apart:.3g} mm elsewhere, by {mine}, than {reference.path} by {theirs}"
        raise DatasetError(f"{prediction.path} {said}: predict the image that the label map belongs to")


def _overlap(reference: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Voxels by value in the label map (rows) and in the prediction (columns)."""
    rows, columns = int(reference.max()) + 1, int(prediction.max()) + 1
    counts = np.zeros(rows * columns, np.int64)
    flat = reference.T.ravel(), prediction.T.ravel()
    for start in range(0, reference.size, _VOXELS_AT_A_TIME):
        r, p = (labels[start : start + _VOXELS_AT_A_TIME].astype(np.int64) for labels in flat)
        counts += np.bincount(r * columns + p, minlength=rows * columns)
    return counts.reshape(rows, columns)


def _counts(overlap: npt.NDArray[np.int64], target: Sequence[int], source: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of a structure in both, in the label map, and in the prediction."""
    rows = overlap[[value for value in target if value < len(overlap)]]
    columns = [value for value in source if value < overlap.shape[1]]
    return int(rows[:, columns].sum()), int(rows.sum()), int(overlap[:, columns].sum())


def _boxes_of(boxes: Boxes, values: Sequence[int]) -> list[tuple[slice, ...]]:
    return [box for value in values if 1 <= value <= len(boxes) and (box := boxes[value - 1]) is not None]


def _count_reversed(volume: Volume, boxes: Boxes, labels: dict[str, tuple[int, ...]]) -> Sides:
    """Count the pairs whose left structure lies to the patient's right of its partner, by their centres of mass."""
    n = n_reversed = 0
    for pair in sided_pairs(labels):
        centres = [_rightward(volume, boxes, labels[name]) for name in pair]
        if centres[0] is not None and centres[1] is not None:
            n, n_reversed = n + 1, n_reversed + (centres[0] > centres[1])
    return Sides(n, n_reversed)


def _rightward(volume: Volume, boxes: Boxes, values: Sequence[int]) -> float | None:
    """How far to the patient's right the centre of mass of some label values lies, in mm."""
    total, n = np.zeros(3), 0
    for value in values:
        for box in _boxes_of(boxes, [value]):
            inside = volume.voxels[box] == value
            n += int(inside.sum())
            for axis, side in enumerate(box):
                profile = inside.sum(axis=tuple(other for other in range(3) if other != axis))
                total[axis] += profile @ np.arange(side.start, side.stop)
    return float((volume.affine @ [*(total / n), 1.0])[0]) if n else None


def _swapped_dice(case: EvaluationCase, overlap: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Mean Dice of the sided structures that the label map has, as they are and with the prediction's sides swapped."""
    compared = {c.name: (c, o) for c, o in zip(case.comparisons, case.observed, strict=True) if o is not None}
    dice = []
    for left, right in sided_pairs(compared):
        for mine, other in ((left, right), (right, left)):
            observed = compared[mine][1]
            scores = [
                volume_scores(*_counts(overlap, observed, compared[of][0].source_values), 0) for of in (mine, other)
            ]
            if scores[0].metrics["n_ref"]:
                dice.append([score.metrics["Dice"] for score in scores])
    straight, swapped = (float(value) for value in np.mean(np.array(dice, float), axis=0)) if dice else (None, None)
    return straight, swapped
