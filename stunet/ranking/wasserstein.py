"""The 2-Wasserstein distance between Gaussians, of samples or of given moments.

For Gaussians it is ``W2^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)`` (Dowson and Landau, 1982,
doi:10.1016/0047-259X(82)90077-X). The last trace, the fidelity, needs no square root of a matrix: with any factors
``S = F^T F`` it is the nuclear norm of ``F1 F2^T``, the sum of its singular values. A sample of ``n`` points gives a
factor of ``min(n - 1, C)`` rows, so a hundred points cost the same in 64 dimensions as in a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stunet.errors import TransferabilityError

__all__ = [
    "GaussianFactor",
    "factor_from_moments",
    "gaussian_factor",
    "pairwise_fidelity",
    "pairwise_wasserstein2",
    "wasserstein2",
]

Array = NDArray[np.float64]

#: Bytes of the cross-Gram matrices whose singular values are found in one call.
_BLOCK_BYTES = 2**25


@dataclass(frozen=True, eq=False)
class GaussianFactor:
    """A Gaussian by its mean and a factor of its covariance.

    Attributes:
        mean: `(C,)`.
        factor: `(r, C)` with `factor.T @ factor` the covariance, `r` at most `C`.
    """

    mean: Array
    factor: Array

    @property
    def trace(self) -> float:
        """Trace of the covariance: the total variance."""
        return float(np.vdot(self.factor, self.factor))


def gaussian_factor(samples: ArrayLike) -> GaussianFactor:
    """The Gaussian with the mean and the covariance (over ``n - 1``) of a sample.

    Args:
        samples: `(n, C)`, at least 2 points.

    Raises:
        TransferabilityError: Fewer than 2 points, no matrix, or values that are not finite.
    """
    points = np.asarray(samples, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise TransferabilityError(
            "a sample without a covariance",
            got=f"{'not finite' if points.size and not np.isfinite(points).all() else 'an array'} of {points.shape}",
            expected="finite (n, C) with at least 2 points",
            remedy="Sample more points of this class, or leave the case out for it.",
        )
    n, channels = points.shape
    mean = points.mean(0)
    centred = (points - mean) / np.sqrt(n - 1)
    if n > channels:
        return GaussianFactor(mean, np.asarray(np.linalg.qr(centred, mode="r"), dtype=np.float64))
    # The rows sum up to 0, so the reflection that turns (1, ..., 1)/sqrt(n) to the first axis makes the first row 0.
    axis = np.full(n, 1 / np.sqrt(n))
    axis[0] -= 1
    reflected = centred - np.outer(2 * axis / np.vdot(axis, axis), axis @ centred)
    return GaussianFactor(mean, reflected[1:])


def factor_from_moments(mean: ArrayLike, covariance: ArrayLike) -> GaussianFactor:
    """A Gaussian of given moments.

    Args:
        mean: `(C,)`.
        covariance: `(C, C)`, symmetric and positive semidefinite up to rounding.

    Raises:
        TransferabilityError: The shapes do not fit, or this is no covariance.
    """
    centre, matrix = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    fits = centre.ndim == 1 and matrix.shape == (len(centre), len(centre))
    if not fits or not np.isfinite(matrix).all() or not np.isfinite(centre).all() or not np.allclose(matrix, matrix.T):
        raise _no_covariance(f"mean {centre.shape}, covariance {matrix.shape}")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    tolerance = len(centre) * np.finfo(np.float64).eps * max(values.max(initial=0.0), 0.0)
    if values.min(initial=0.0) < -1e3 * tolerance:
        raise _no_covariance(f"lowest eigenvalue {values.min():g}")
    kept = values > tolerance
    return GaussianFactor(centre, np.sqrt(values[kept])[:, None] * vectors.T[kept])


def _no_covariance(got: str) -> TransferabilityError:
    return TransferabilityError(
        "moments that no Gaussian has",
        got=got,
        expected="finite mean (C,) and symmetric positive semidefinite covariance (C, C)",
        remedy="Check how the covariance was computed.",
    )


def wasserstein2(a: GaussianFactor, b: GaussianFactor) -> float:
    """The distance W2, not squared, of two Gaussians of the same width."""
    return float(pairwise_wasserstein2([a, b])[0, 1])


def pairwise_wasserstein2(factors: Sequence[GaussianFactor]) -> Array:
    """Distances of all pairs.

    Args:
        factors: N Gaussians of the same width.

    Returns:
        Symmetric `(N, N)`, not squared, with zeros on the diagonal.
    """
    means = np.stack([factor.mean for factor in factors])
    traces = np.array([factor.trace for factor in factors])
    squares = squared_mean_distances(means) + traces[:, None] + traces[None] - 2 * pairwise_fidelity(factors)
    distances: Array = np.sqrt(np.clip(squares, 0, None))  # rounding can leave a negative zero
    np.fill_diagonal(distances, 0)
    return distances


def squared_mean_distances(means: Array) -> Array:
    """`|m_i - m_j|^2` for all pairs of rows `(N, C)`, by differences, which keeps small ones exact."""
    return np.stack([np.square(means - mean).sum(1) for mean in means])


def pairwise_fidelity(factors: Sequence[GaussianFactor]) -> Array:
    """`tr (S_i^(1/2) S_j S_i^(1/2))^(1/2)` for all pairs, which is the trace of the covariance where i is j.

    Returns:
        Symmetric `(N, N)`.
    """
    n = len(factors)
    rank = max(len(factor.factor) for factor in factors)
    # Rows of zeros change no singular value but zero, so factors of unequal rank fit one array.
    stacked = np.stack([np.pad(factor.factor, ((0, rank - len(factor.factor)), (0, 0))) for factor in factors])
    fidelity = np.diag([factor.trace for factor in factors])
    block = max(1, _BLOCK_BYTES // max(8 * rank * rank, 1))
    for i in range(n - 1):
        for start in range(i + 1, n, block):
            others = stacked[start : start + block]
            singular = np.linalg.svd(others @ stacked[i].T, compute_uv=False)
            fidelity[i, start : start + block] = fidelity[start : start + block, i] = singular.sum(-1)
    return fidelity
