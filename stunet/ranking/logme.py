"""LogME: how well a Bayesian linear model of the features explains the labels (arXiv 2102.11005)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stunet.ranking.pooled import check_pooled

__all__ = ["Evidence", "evidence", "logme"]

Array = NDArray[np.float64]

_MAX_STEPS = 200
_TOLERANCE = 1e-9
#: Bounds of both precisions: targets that no or any feature explains would drive them to infinity.
_LEAST, _MOST = 1e-12, 1e12


@dataclass(frozen=True)
class Evidence:
    """The evidence of one target, at its own maximum.

    Attributes:
        alpha: Precision of the weights.
        beta: Precision of the targets.
        log_evidence: Log density of all targets, ``log N(y; 0, F F^T / alpha + I / beta)``.
    """

    alpha: float
    beta: float
    log_evidence: float


def logme(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean over the one-hot targets of the log evidence of a point.

    Scaling all features by a factor changes nothing: the weights' precision takes it up.

    Args:
        features: `(n, C)`.
        labels: `(n,)`, at least two classes.

    Raises:
        TransferabilityError: The arrays do not fit, or there is one class only.
    """
    rows, classes = check_pooled(features, labels)
    variances, axes = _decompose(rows)
    targets = np.eye(int(classes.max()) + 1)[classes].T
    totals = [_evidence(axes.T @ y, variances, y, rows.shape[1]).log_evidence for y in targets]
    return float(np.mean(totals) / len(rows))


def evidence(features: NDArray[np.floating], target: NDArray[np.floating]) -> Evidence:
    """Evidence of one target of real numbers.

    Args:
        features: `(n, C)`.
        target: `(n,)`.
    """
    rows, y = np.asarray(features, dtype=np.float64), np.asarray(target, dtype=np.float64)
    variances, axes = _decompose(rows)
    return _evidence(axes.T @ y, variances, y, rows.shape[1])


def _decompose(rows: Array) -> tuple[Array, Array]:
    """Eigenvalues above rounding of ``F F^T``, and its eigenvectors `(n, k)`, by the smaller Gram matrix."""
    n, channels = rows.shape
    gram = rows @ rows.T if n < channels else rows.T @ rows
    values, vectors = np.linalg.eigh(gram)
    kept = values > max(n, channels) * np.finfo(np.float64).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if n < channels else rows @ vectors / np.sqrt(values)


def _evidence(projected: Array, variances: Array, target: Array, channels: int) -> Evidence:
    """Alpha and beta by fixed point (the paper's algorithm 1), then the log evidence with all its terms.

    Along each axis of the features the problem is one-dimensional, so a step costs no more than the rank.
    """
    n, rank = len(target), len(variances)
    parts = np.square(projected)
    outside = max(float(np.vdot(target, target) - parts.sum()), 0.0)  # what no weights can explain
    alpha = beta = 1.0
    for _ in range(_MAX_STEPS):
        gamma, length, residual = _moments(alpha, beta, parts, variances, outside)
        before = alpha, beta
        alpha = min(max(gamma / max(length, 1e-300), _LEAST), _MOST)
        beta = min(max((n - gamma) / max(residual, 1e-300), _LEAST), _MOST)
        if abs(alpha - before[0]) <= _TOLERANCE * alpha and abs(beta - before[1]) <= _TOLERANCE * beta:
            break
    _, length, residual = _moments(alpha, beta, parts, variances, outside)
    # D/2 ln alpha of the prior and -(D - k)/2 ln alpha of the determinant's zero eigenvalues leave k/2 ln alpha.
    log_determinant = float(np.log(alpha + beta * variances).sum()) + (channels - rank) * math.log(alpha)
    return Evidence(
        alpha,
        beta,
        0.5
        * (
            n * math.log(beta)
            + channels * math.log(alpha)
            - n * math.log(2 * math.pi)
            - beta * residual
            - alpha * length
            - log_determinant
        ),
    )


def _moments(alpha: float, beta: float, parts: Array, variances: Array, outside: float) -> tuple[float, float, float]:
    """Effective number of weights, squared length of their mean, and squared residual."""
    scale = alpha + beta * variances
    gamma = float((beta * variances / scale).sum())
    length = float((beta**2 * variances * parts / scale**2).sum())
    residual = float((alpha**2 * parts / scale**2).sum()) + outside
    return gamma, length, residual
