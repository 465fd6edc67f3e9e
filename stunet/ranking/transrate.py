"""TransRate: mutual information of features and labels by coding rates (arXiv 2106.09545)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stunet.ranking.pooled import check_pooled

__all__ = ["coding_rate", "transrate"]

Array = NDArray[np.float64]


def transrate(features: NDArray[np.floating], labels: NDArray[np.integer], *, eps: float = 1e-4) -> float:
    """Coding rate of all features minus the mean coding rate of the classes, in nats.

    Features are centred by the mean of all. Classes are weighted by their share of the points, with which the result
    is never negative (the coding rate is concave in the second moment), and 0 for classes with equal second moments.

    Args:
        features: `(n, C)`. Their scale matters, by the ratio of their variance to `eps`.
        labels: `(n,)`, at least two classes.
        eps: Squared distortion.

    Raises:
        TransferabilityError: The arrays do not fit, or there is one class only.
    """
    rows, classes = check_pooled(features, labels)
    rows = rows - rows.mean(0)
    within = sum(
        count / len(rows) * coding_rate(rows[classes == label], eps=eps)
        for label, count in enumerate(np.bincount(classes).tolist())
    )
    return float(coding_rate(rows, eps=eps) - within)


def coding_rate(rows: Array, *, eps: float = 1e-4) -> float:
    """``1/2 log det(I + Z^T Z / (n eps))`` of rows `(n, C)`, by the smaller of the two Gram matrices."""
    n, channels = rows.shape
    gram = rows @ rows.T if n < channels else rows.T @ rows
    return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram / (n * eps))[1])
