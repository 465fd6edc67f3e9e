"""What metrics of pooled features share: checks, and one scale for all candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError

__all__ = ["check_pooled", "unit_variance"]

Array = NDArray[np.float64]


def check_pooled(features: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[Array, NDArray[np.int64]]:
    """Features in float64, and classes numbered without gaps, of which there are at least two.

    Raises:
        TransferabilityError: The arrays do not fit, are not finite, or there is one class only.
    """
    rows, given = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if rows.ndim != 2 or given.shape != rows.shape[:1] or 0 in rows.shape or not np.isfinite(rows).all():
        finite = "" if rows.size and np.isfinite(rows).all() else ", not all finite"
        raise TransferabilityError(
            "features and labels that do not fit",
            got=f"features {rows.shape}{finite}, labels {given.shape}",
            expected="finite features (n, C) and labels (n,)",
            remedy="Give one label for each point.",
        )
    values, classes = np.unique(given, return_inverse=True)
    if len(values) < 2:
        raise TransferabilityError(
            "points of one class only",
            got=f"class {values[0]} at all {len(given)} points",
            expected="points of at least two classes, background among them",
            remedy="Sample points of all classes, with cases that have some.",
        )
    return rows, classes.reshape(-1).astype(np.int64)


def unit_variance(features: NDArray[np.floating]) -> Array:
    """Features about their mean, with a total variance of 1, so that thresholds mean the same for all candidates.

    Features that are all equal stay at 0.
    """
    rows = np.asarray(features, dtype=np.float64)
    centred: Array = rows - rows.mean(0)
    total = float(np.square(centred).sum() / len(centred))
    return centred / np.sqrt(total) if total > 0 else centred
