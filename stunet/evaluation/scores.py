"""Scores of one structure in one case.

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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from surface_distance import compute_robust_hausdorff, compute_surface_dice_at_tolerance, compute_surface_distances

__all__ = ["METRICS", "NOT_ANNOTATED", "Status", "StructureScore", "dice_of", "surface_scores", "volume_scores"]

Status = Literal["scored", "missed", "spurious", "absent", "not annotated"]
Mask = npt.NDArray[np.bool_]

METRICS = ("Dice", "NSD", "HD95")
"""The metrics that are shown: higher is better for the first two, the third is in mm."""

_COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")


@dataclass(frozen=True)
class StructureScore:
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


NOT_ANNOTATED = StructureScore("not annotated", dict.fromkeys(("Dice", "IoU", "NSD", "HD95", *_COUNTS)))
"""What a case has for a structure that it does not annotate."""


def volume_scores(tp: int, n_ref: int, n_pred: int, n_voxels: int) -> StructureScore:
    """Scores that need no more than counts of voxels; NSD and HD95 only where a structure is absent.

    Args:
        tp: Voxels inside the structure in label map and prediction.
        n_ref: Voxels inside it in the label map.
        n_pred: Voxels inside it in the prediction.
        n_voxels: All voxels that count.
    """
    fp, fn = n_pred - tp, n_ref - tp
    counts = dict(zip(_COUNTS, (tp, fp, fn, n_voxels - tp - fp - fn, n_pred, n_ref), strict=True))
    if n_ref == n_pred == 0:
        return StructureScore("absent", {"Dice": None, "IoU": None, "NSD": None, "HD95": None, **counts})
    status: Status = "scored" if n_ref and n_pred else "missed" if n_ref else "spurious"
    nsd = None if status == "scored" else 0.0
    iou = tp / (tp + fp + fn)
    return StructureScore(status, {"Dice": dice_of(tp, n_ref, n_pred), "IoU": iou, "NSD": nsd, "HD95": None, **counts})


def dice_of(tp: int, n_ref: int, n_pred: int) -> float:
    """Dice of voxel counts, of which at least one is not 0."""
    return 2 * tp / (n_ref + n_pred)


def surface_scores(
    reference: Mask, prediction: Mask, spacing: Sequence[float], *, tolerance: float
) -> tuple[float, float]:
    """Normalised surface Dice and 95th percentile Hausdorff distance, both weighted by surface area.

    They are those of the ``surface-distance`` package: surfaces run between voxel centres, through the eight voxels of
    each cube that the structure does not fill (arXiv 1809.04430, section 4.4). Voxels beyond the arrays are outside.

    Args:
        reference: The structure in the label map, with 2 or 3 axes; not empty.
        prediction: The structure in the prediction, of the same shape; not empty.
        spacing: mm along each axis.
        tolerance: How far surfaces may lie apart and still agree, in mm.

    Returns:
        Fraction of both surfaces that lies within the tolerance of the other; and the larger of the two distances in
        mm within which 95% of one surface lies from the other.
    """
    box = _bounding_box(reference | prediction)
    distances: Any = compute_surface_distances(
        np.ascontiguousarray(reference[box]), np.ascontiguousarray(prediction[box]), tuple(spacing)
    )
    return (
        float(compute_surface_dice_at_tolerance(distances, tolerance)),
        float(compute_robust_hausdorff(distances, 95)),
    )


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    inside = (np.flatnonzero(mask.any(axis=tuple(b for b in range(mask.ndim) if b != a))) for a in range(mask.ndim))
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in inside)
