"""Rivals of CC-FV, computed from the same features: LogME, TransRate, LEEP, GBC, and zero-shot Dice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.labels.labels import match_names
from stunet.ranking.points import CaseFeatures

Array = NDArray[np.float64]

Covariance = Literal["diagonal", "full"]
"""What GBC keeps of each class's covariance."""


def _check_pooled(features: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[Array, NDArray[np.int64]]:
    """Return features in float64, and classes numbered without gaps, of which there are at least two."""
    rows, given = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if rows.ndim != 2 or given.shape != rows.shape[:1] or 0 in rows.shape or not np.isfinite(rows).all():
        got = f"features {rows.shape}{'' if np.isfinite(rows).all() else ', not all finite'}, labels {given.shape}"
        raise TransferabilityError(f"{got} do not fit: give finite (n, C), and one label for each point")
    values, classes = np.unique(given, return_inverse=True)
    if len(values) < 2:
        raise TransferabilityError(f"all {len(given)} points are of class {values[0]}: give at least two classes")
    return rows, classes.reshape(-1).astype(np.int64)


def logme(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """LogME: how well a Bayesian linear model of the features explains the labels (arXiv 2102.11005).

    The mean over the one-hot targets of the log evidence of a point. Scaling all features by a factor changes nothing:
    the weights' precision takes it up.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1], 50)
    >>> logme(rng.normal(size=(100, 8)), labels) < logme(rng.normal(size=(100, 8)) + labels[:, None], labels)
    True

    Args:
        features: ``(n, C)``.
        labels: ``(n,)``, at least two classes.
    """
    rows, classes = _check_pooled(features, labels)
    variances, axes = decompose(rows)
    targets = np.eye(int(classes.max()) + 1)[classes].T
    totals = [evidence(axes.T @ y, variances, y, rows.shape[1])[2] for y in targets]
    return float(np.mean(totals) / len(rows))


def decompose(rows: Array) -> tuple[Array, Array]:
    """Return eigenvalues of ``F F^T`` above rounding, and its eigenvectors ``(n, k)``, by the smaller Gram matrix."""
    n, channels = rows.shape
    gram = rows @ rows.T if n < channels else rows.T @ rows
    values, vectors = np.linalg.eigh(gram)
    kept = values > max(n, channels) * np.finfo(np.float64).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if n < channels else rows @ vectors / np.sqrt(values)


def evidence(projected: Array, variances: Array, target: Array, channels: int) -> tuple[float, float, float]:
    """Find the evidence of one target ``(n,)`` at its maximum, by fixed point (the paper's algorithm 1).

    Args:
        projected: ``(k,)``, the target along the axes of the features' variance.
        variances: ``(k,)``, eigenvalues of ``F F^T``.
        target: ``(n,)``.
        channels: Width of the features.

    Returns:
        ``alpha``, precision of the weights; ``beta``, precision of the targets; and the log density of all targets,
        ``log N(y; 0, F F^T / alpha + I / beta)``.
    """
    n, rank = len(target), len(variances)
    parts = np.square(projected)
    outside = max(float(np.vdot(target, target) - parts.sum()), 0.0)  # what no weights can explain
    least, most = 1e-12, 1e12  # targets that no or any feature explains would drive both precisions to infinity
    alpha = beta = 1.0

    def moments() -> tuple[float, float, float]:
        """Effective number of weights, squared length of their mean, and squared residual."""
        scale = alpha + beta * variances
        gamma = float((beta * variances / scale).sum())
        length = float((beta**2 * variances * parts / scale**2).sum())
        return gamma, length, float((alpha**2 * parts / scale**2).sum()) + outside

    for _ in range(200):
        gamma, length, residual = moments()
        before = alpha, beta
        alpha = min(max(gamma / max(length, 1e-300), least), most)
        beta = min(max((n - gamma) / max(residual, 1e-300), least), most)
        if abs(alpha - before[0]) <= 1e-9 * alpha and abs(beta - before[1]) <= 1e-9 * beta:
            break
    _, length, residual = moments()
    # D/2 ln alpha of the prior and -(D - k)/2 ln alpha of the determinant's zero eigenvalues leave k/2 ln alpha.
    log_determinant = float(np.log(alpha + beta * variances).sum()) + (channels - rank) * math.log(alpha)
    logs = n * math.log(beta) + channels * math.log(alpha) - n * math.log(2 * math.pi)
    return alpha, beta, 0.5 * (logs - beta * residual - alpha * length - log_determinant)


def transrate(features: NDArray[np.floating], labels: NDArray[np.integer], *, eps: float = 1e-4) -> float:
    """TransRate: mutual information of features and labels by coding rates, in nats (arXiv 2106.09545).

    The coding rate of all features minus the mean coding rate of the classes, centred by the mean of all. Classes are
    weighted by their share of the points, with which the result is never negative (the coding rate is concave in the
    second moment), and 0 for classes with equal second moments.

    Args:
        features: ``(n, C)``. Their scale matters, by the ratio of their variance to `eps`.
        labels: ``(n,)``, at least two classes.
        eps: Squared distortion.
    """
    rows, classes = _check_pooled(features, labels)
    rows = rows - rows.mean(0)
    shares = (np.bincount(classes) / len(rows)).tolist()
    within = sum(share * coding_rate(rows[classes == label], eps=eps) for label, share in enumerate(shares))
    return float(coding_rate(rows, eps=eps) - within)


def coding_rate(rows: Array, *, eps: float = 1e-4) -> float:
    """Return ``1/2 log det(I + Z^T Z / (n eps))`` of rows ``(n, C)``, by the smaller of the two Gram matrices."""
    n, channels = rows.shape
    gram = rows @ rows.T if n < channels else rows.T @ rows
    return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram / (n * eps))[1])


def leep(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """LEEP: how well a source model's own outputs predict the target's labels (arXiv 2002.12462).

    The mean log likelihood of the labels under ``P(y) = sum_z P(y | z) theta_z``, at most 0. ``P(y | z)`` comes from
    the same points: the joint distribution of label and source output, divided by the output's marginal.

    >>> leep(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 2]))
    0.0

    Args:
        probabilities: ``theta``, ``(n, K)`` softmax outputs of the source model, rows that sum up to 1.
        labels: ``(n,)``, at least two classes.
    """
    theta, classes = _check_pooled(probabilities, labels)
    if theta.min() < 0 or np.abs(theta.sum(1) - 1).max() > 0.01:  # half precision rounds each output to 3 digits
        raise TransferabilityError("rows with values below 0 or other sums than 1: apply softmax to the logits")
    theta = theta / theta.sum(1, keepdims=True)
    joint = np.eye(int(classes.max()) + 1)[classes].T @ theta
    marginal = joint.sum(0)
    given = joint / np.where(marginal > 0, marginal, 1.0)  # an output that never fires predicts nothing
    return float(np.log((theta * given[classes]).sum(1)).mean())


def gbc(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    covariance: Covariance = "diagonal",
    components: int | None = None,
    floor: float = 1e-4,
) -> float:
    """GBC: how much the Gaussians of the classes overlap (arXiv 2111.12780).

    The negative sum over ordered pairs of different classes of the Bhattacharyya coefficient ``exp(-D_B)``: 0 where
    classes do not overlap, ``-K (K - 1)`` where all K are the same. A class with one point has no variance but the
    floor.

    >>> gbc(np.repeat([[0.0], [9.0]], 4, axis=0) + np.tile([[0.1], [-0.1]], (4, 1)), np.repeat([0, 1], 4)) > -1e-9
    True

    Args:
        features: ``(n, C)``. Their scale matters where variances come near the floor.
        labels: ``(n,)``, at least two classes.
        covariance: Only variances along the axes, or all.
        components: Keep so many principal components of all features first, at most; all by default.
        floor: Lowest variance along an axis, or, for full covariances, lowest eigenvalue.
    """
    if covariance not in get_args(Covariance):
        raise TransferabilityError(f"covariance={covariance} is not known: choose from {get_args(Covariance)}")
    rows, classes = _check_pooled(features, labels)
    if components is not None and components < rows.shape[1]:
        rows = rows - rows.mean(0)
        rows = rows @ np.linalg.eigh(rows.T @ rows)[1][:, -components:]
    moments = [_moments(rows[classes == label], covariance, floor) for label in range(int(classes.max()) + 1)]
    distance: Callable[..., float] = _diagonal_distance if covariance == "diagonal" else _full_distance
    overlap = [np.exp(-distance(*a, *b)) for i, a in enumerate(moments) for b in moments[:i]]
    return float(-2 * np.sum(overlap))


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


def mean_over_scales(
    cases: Sequence[CaseFeatures], metric: Callable[..., float], *, unit_variance: bool = False, **options: object
) -> float:
    """Average a metric over scales, at each of which the points of all cases are pooled.

    Args:
        cases: The cases.
        metric: Takes features ``(n, C)`` in float64, labels ``(n,)``, and the options.
        unit_variance: Centre and scale features to a total variance of 1, so that a scaled layer changes nothing and
            thresholds mean the same for all checkpoints.
        **options: For the metric.
    """
    labels = np.concatenate([case.labels for case in cases])
    found = []
    for scale in range(len(cases[0].scales)):  # one in memory at a time
        rows = np.concatenate([case.scales[scale] for case in cases]).astype(np.float64)
        if unit_variance:
            rows = rows - rows.mean(0)
            total = float(np.square(rows).sum() / len(rows))
            rows = rows / np.sqrt(total) if total > 0 else rows
        found.append(metric(rows, labels, **options))
    return float(np.mean(found))


def _leep(cases: Sequence[CaseFeatures]) -> float:
    given = [case.probabilities for case in cases if case.probabilities is not None]
    return leep(np.concatenate(given), np.concatenate([case.labels for case in cases]))


RIVALS: Mapping[str, Callable[[Sequence[CaseFeatures]], float]] = {
    "logme": lambda cases: mean_over_scales(cases, logme),
    "transrate": lambda cases: mean_over_scales(cases, transrate, unit_variance=True),
    "leep": _leep,
    "gbc": lambda cases: mean_over_scales(cases, gbc, unit_variance=True, components=64),
    "gbc-full": lambda cases: mean_over_scales(cases, gbc, unit_variance=True, components=64, covariance="full"),
}
"""Each takes the cases of a checkpoint; higher is better. Pooled ones are averaged over scales; ``leep`` has none."""


@dataclass(frozen=True, eq=False)
class PointPredictions:
    """What a checkpoint's own head says at points of one case."""

    labels: NDArray[np.integer]  # (n,), the true class of each point
    outputs: NDArray[np.integer]  # (n,), the output with the highest probability
    voxels: Mapping[int, int]  # for each class in the case how many voxels it has
    annotated: frozenset[int]  # label values of the structures that the case annotates


def zero_shot_at_points(
    cases: Sequence[PointPredictions], structures: Mapping[int, str], outputs: Sequence[str] | None
) -> dict[str, float | None]:
    """Estimate the Dice of a checkpoint's own predictions of the structures that it shares with the target by name.

    The points are a stratified sample of the volume, with the number of voxels of each class known. So the share of a
    class's points that the checkpoint calls structure c, times that number, estimates the voxels of the class that a
    prediction of the whole volume would call c; true and false positives are sums of these. Outputs that are none of
    the target's structures count as background. What is rarer in the background than one point of it is overlooked or
    counted too high by chance: the more points, the better.

    Args:
        cases: Predictions at the points of each case.
        structures: The target's structure by label.
        outputs: What the checkpoint's outputs stand for, background first; None where nothing says it.

    Returns:
        For each structure the mean over the cases that have it or in which it is predicted; None where there is none.
    """
    names = list(outputs or ("background",))
    found = match_names(names[1:], list(structures.values()))
    known = {label: match for label, name in structures.items() if (match := found[name]) is not None}
    label_of = np.zeros(len(names), np.int64)
    for label, match in known.items():
        label_of[names.index(match)] = label
    dice: dict[str, list[float]] = {name: [] for name in structures.values()}
    for case in cases:
        for label in known.keys() & case.annotated:
            called = label_of[case.outputs] == label
            voxels = {k: n * float(called[case.labels == k].mean()) for k, n in case.voxels.items()}
            total = sum(voxels.values()) + case.voxels.get(label, 0)
            if total > 0:
                dice[structures[label]].append(2 * voxels.get(label, 0.0) / total)
    return {name: float(np.mean(values)) if values else None for name, values in dice.items()}
