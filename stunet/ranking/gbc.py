"""GBC: how much the Gaussians of the classes overlap (arXiv 2111.12780)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.pooled import check_pooled

__all__ = ["Covariance", "gbc"]

Array = NDArray[np.float64]

Covariance = Literal["diagonal", "full"]
"""What is kept of each class's covariance."""


def gbc(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    covariance: Covariance = "diagonal",
    components: int | None = None,
    floor: float = 1e-4,
) -> float:
    """Negative sum over ordered pairs of different classes of the Bhattacharyya coefficient ``exp(-D_B)``.

    0 where classes do not overlap, ``-K (K - 1)`` where all K are the same. A class with one point has no variance but
    the floor.

    Args:
        features: `(n, C)`. Their scale matters where variances come near the floor.
        labels: `(n,)`, at least two classes.
        covariance: Only variances along the axes, or all.
        components: Keep so many principal components of all features first, at most; all by default.
        floor: Lowest variance along an axis, or, for full covariances, lowest eigenvalue.

    Raises:
        TransferabilityError: The arrays do not fit, there is one class only, or an option is out of range.
    """
    rows, classes = check_pooled(features, labels)
    if covariance not in get_args(Covariance) or floor <= 0 or (components is not None and components < 1):
        raise TransferabilityError(
            "options that GBC cannot take",
            got=f"covariance={covariance}, components={components}, floor={floor:g}",
            expected="covariance diagonal or full, at least one component or None, a floor above 0",
            remedy="Correct them; the published floor is 1e-4.",
        )
    if components is not None and components < rows.shape[1]:
        rows = _principal_components(rows, components)
    moments = [_moments(rows[classes == label], covariance, floor) for label in range(int(classes.max()) + 1)]
    distance: Callable[..., float] = _diagonal_distance if covariance == "diagonal" else _full_distance
    overlap = [np.exp(-distance(*a, *b)) for i, a in enumerate(moments) for b in moments[:i]]
    return float(-2 * np.sum(overlap))


def _principal_components(rows: Array, components: int) -> Array:
    centred = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ vectors[:, -components:], dtype=np.float64)


def _moments(rows: Array, covariance: Covariance, floor: float) -> tuple[Array, Array]:
    mean = rows.mean(0)
    centred = (rows - mean) / np.sqrt(max(len(rows) - 1, 1))
    if covariance == "diagonal":
        return mean, np.maximum(np.square(centred).sum(0), floor)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return mean, (vectors * np.maximum(values, floor)) @ vectors.T


def _diagonal_distance(mean_a: Array, variance_a: Array, mean_b: Array, variance_b: Array) -> float:
    middle = (variance_a + variance_b) / 2
    shift = np.square(mean_a - mean_b) / middle
    return float(shift.sum() / 8 + 0.5 * np.log(middle / np.sqrt(variance_a * variance_b)).sum())


def _full_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    middle = (covariance_a + covariance_b) / 2
    shift = mean_a - mean_b
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (middle, covariance_a, covariance_b)]
    return float(shift @ np.linalg.solve(middle, shift) / 8 + 0.5 * (logs[0] - (logs[1] + logs[2]) / 2))
