"""Rivals of CC-FV, computed from the same features.

LogME, TransRate, LEEP, GBC; TopoTE's two terms; consistency under dropped channels; Dice of a linear probe; zero-shot
Dice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist, pdist, squareform

from stunet.errors import TransferabilityError
from stunet.labels.labels import match_names
from stunet.ranking.ccfv import scale_weights
from stunet.ranking.points import CaseFeatures, CasePoints

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


def topology_divergence(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """TopoTE's global term: how little the minimum spanning tree of the points crosses between classes (2602.23916).

    For each class, of the total length of the tree's edges that touch it the share that remains when edges to other
    classes are taken off, each with its length, or with the median distance of all points where that is shorter; the
    mean over classes. From 0 to 1. The published score is its negative, which falls as classes come apart; here, higher
    is better: near 1 where classes are far apart, and 1 where there is one only.

    >>> features, labels = np.random.default_rng(0).normal(size=(100, 8)), np.repeat([1, 2], 50)
    >>> [round(topology_divergence(features + apart * labels[:, None], labels), 1) for apart in (0, 2)]
    [0.3, 1.0]

    Args:
        features: ``(n, C)``, of points of the foreground.
        labels: ``(n,)``.
    """
    edges, lengths, middle = _spanning_tree(np.asarray(features, dtype=np.float64))
    ends = np.asarray(labels)[edges]
    crossing = np.where(ends[0] != ends[1], np.minimum(lengths, middle), 0.0)
    touched = [(ends == label).any(0) for label in np.unique(labels)]
    return float(np.mean([1 - crossing[edges].sum() / lengths[edges].sum() for edges in touched]))


def boundary_consistency(
    features: NDArray[np.floating], labels: NDArray[np.integer], anchors: NDArray[np.integer], neighbours: int = 16
) -> float:
    """TopoTE's local term: how well features tell classes apart at the boundaries of structures (arXiv 2602.23916).

    One minus the share of edges between classes in the minimum spanning tree of an anchor and the points that are
    nearest to it in feature space, averaged over anchors. It rises as classes come apart, as published.

    Args:
        features: ``(n, C)``, of points of all classes.
        labels: ``(n,)``.
        anchors: Points near a boundary, see :func:`boundary_anchors`.
        neighbours: Points beside the anchor.
    """
    rows, shares = np.asarray(features, dtype=np.float64), []
    for nearest in np.argsort(cdist(rows[anchors], rows), axis=1, kind="stable")[:, : neighbours + 1]:
        ends = labels[nearest][_spanning_tree(rows[nearest])[0]]
        shares.append(np.mean(ends[0] != ends[1]))
    return float(1 - np.mean(shares))


def boundary_anchors(points: CasePoints, most: int = 50) -> NDArray[np.int64]:
    """Find the class-balanced points that are nearest, in voxels, to a point of another class."""
    gaps = np.full(len(points.labels), np.inf)
    for label in np.unique(points.labels):
        own = points.labels == label
        if not own.all():
            gaps[own] = KDTree(points.balanced[~own]).query(points.balanced[own])[0]
    return np.argsort(gaps, kind="stable")[:most]


def _spanning_tree(rows: Array) -> tuple[NDArray[np.int64], Array, float]:
    """Return edges ``(2, n - 1)`` of the Euclidean minimum spanning tree, their lengths, and the median distance.

    The unit is the longest distance: what is below 1e-8 scipy takes for no edge, as between points that coincide.
    """
    distances = pdist(rows)
    distances = np.maximum(distances / (distances.max() or 1.0), 1e-7)
    tree = minimum_spanning_tree(squareform(distances)).tocoo()
    return np.stack([tree.row, tree.col]), tree.data, float(np.median(distances))


def topote_global(cases: Sequence[CaseFeatures], *, most: int = 256) -> float:
    """Average :func:`topology_divergence` over cases with foreground and, with the paper's weights, over scales.

    Args:
        cases: The cases.
        most: Points of the foreground of a case, evenly out of those that are there.
    """
    found = []
    for case in cases:
        foreground = np.flatnonzero(case.labels)
        chosen = foreground[np.linspace(0, len(foreground) - 1, min(most, len(foreground))).astype(int)]
        if len(chosen) > 1:
            found.append([topology_divergence(rows[chosen], case.labels[chosen]) for rows in case.scales])
    return float(scale_weights(len(cases[0].scales)) @ np.mean(found, axis=0))


def topote_local(cases: Sequence[CaseFeatures]) -> float:
    """Average :func:`boundary_consistency` over cases and, with the paper's weights, over scales.

    Raises:
        TransferabilityError: Features without the points that they were read at.
    """
    anchors = map(boundary_anchors, _points(cases))
    found = [[boundary_consistency(x, c.labels, a) for x in c.scales] for c, a in zip(cases, anchors, strict=True)]
    return float(scale_weights(len(cases[0].scales)) @ np.mean(found, axis=0))


def fuse_topote(divergence: Array, consistency: Array, n_classes: int) -> Array:
    """Fuse TopoTE's terms ``(N,)`` of all candidates, each brought to 0 to 1 over these (arXiv 2602.23916).

    The more foreground classes, the more the global term counts; of one class it says nothing.

    >>> fuse_topote(np.array([0.2, 0.4, 0.3]), np.array([5.0, 5.0, 6.0]), n_classes=3)
    array([0.  , 0.5 , 0.75])
    """
    share = (n_classes - 1) / (n_classes + 1)
    spread = [np.ptp(values) or 1.0 for values in (divergence, consistency)]
    terms = (divergence - divergence.min()) / spread[0], (consistency - consistency.min()) / spread[1]
    return np.asarray(share * terms[0] + (1 - share) * terms[1], dtype=np.float64)


def dropout_consistency(cases: Sequence[CaseFeatures], *, share: float = 0.25, n_draws: int = 16) -> float:
    """Measure how little a checkpoint's own predictions change when channels are dropped (after arXiv 2503.00450).

    It needs no structure of the target among the outputs, and labels only for where to look. Channels of the finest
    features, which the head sees, are dropped at random, the same ones at all points, and the others scaled up
    accordingly. Of the points that are foreground with or without them, the share at which the output stays the same;
    the mean over draws and cases, 0 where nothing is ever foreground.

    Args:
        cases: The cases, with the checkpoint's own head.
        share: Probability of a channel to be dropped.
        n_draws: Draws of channels, the same ones for every checkpoint of this width.
    """
    found = []
    for case in cases:
        if case.head is not None:
            rows = torch.from_numpy(np.concatenate((case.scales[0], case.variety[0])))
            kept = np.random.default_rng(0).random((n_draws, rows.shape[1])) >= share
            masks = torch.from_numpy((kept / (1 - share)).astype(np.float32))
            whole = case.head.probabilities(rows).argmax(1)
            for mask in masks:
                dropped = case.head.probabilities(rows * mask).argmax(1)
                shown = (whole > 0) | (dropped > 0)
                found.append(float((whole == dropped)[shown].float().mean()) if shown.any() else 0.0)
    return float(np.mean(found))


def linear_probe(
    cases: Sequence[CaseFeatures],
    *,
    penalties: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    thresholds: Sequence[float] = tuple(sorted(np.linspace(0.05, 0.95, 19), key=lambda value: abs(value - 0.5))),
) -> dict[int, float]:
    """Estimate the Dice of a linear model of the features, on cases that it was not fitted to.

    For each structure, a ridge regression of its indicator on all scales together is fitted to all cases but one, and
    predicts it at the points of the one left out; only cases that annotate the structure count. In the fit a class
    weighs as the root of its share of a case: background counts most, and small structures do not vanish. Channels have
    unit variance, so that scaling a layer changes nothing, and a penalty of 1 halves the weight of a direction with the
    variance of one channel. A point is called the structure where the prediction exceeds a threshold; that and the
    penalty are those with the highest mean Dice of the *other* cases, each predicted while it was left out. Dice is
    estimated as :func:`zero_shot_at_points` does: background counts at its true share.

    In closed form: the weighted second moments of channels and targets are summed over cases once, and those of the
    case left out are taken off.

    Args:
        cases: The cases, with the points that they were read at.
        penalties: Ridge penalties, in units of a channel's variance, to choose from.
        thresholds: Of predictions, to choose from; the first of equal ones, so the most central ones come first.

    Returns:
        Mean Dice by label, of structures that two cases have.

    Raises:
        TransferabilityError: Features without the points that they were read at.
    """
    points, groups = _points(cases), dict[tuple[int, ...], list[int]]()
    for label in sorted({label for each in points for label in each.voxels if label > 0}):
        holders = tuple(i for i, each in enumerate(points) if label in each.annotated)
        if sum(label in points[i].voxels for i in holders) > 1:
            groups.setdefault(holders, []).append(label)
    found = dict[int, float]()
    for holders, structures in groups.items():  # one group where all cases annotate all structures
        read = [partial(_probe_rows, cases[i], points[i], structures) for i in holders]  # not all in memory at once
        total, dice = sum(_second_moments(each()) for each in read), []
        for each in read:
            probe = each()
            dice.append(_dice_of_probe(total - _second_moments(probe), probe, len(structures), penalties, thresholds))
        found |= dict(zip(structures, _mean_of_chosen(np.stack(dice)), strict=True))
    return {label: found[label] for label in sorted(found)}


def _points(cases: Sequence[CaseFeatures]) -> list[CasePoints]:
    points = [case.points for case in cases if case.points is not None]
    if len(points) < len(cases):
        raise TransferabilityError("features without the points they were read at: give those of extract_case")
    return points


class _Probe(NamedTuple):
    rows: Array  # (n, 1 + C + K): 1, the channels of all scales, the indicators of the structures
    weights: Array  # (n,), of each point in the fit
    voxels: Array  # (n,), that each point stands for


def _probe_rows(case: CaseFeatures, points: CasePoints, structures: Sequence[int]) -> _Probe:
    labels = np.concatenate((case.labels, points.whole_labels))
    channels = [np.concatenate(pair) for pair in zip(case.scales, case.variety, strict=True)]
    rows = np.hstack([np.ones((len(labels), 1)), *channels, labels[:, None] == np.array(structures)])
    voxels = _voxels_of_points(labels, points.voxels)
    of_class = np.array([points.voxels[label] for label in labels.tolist()])
    return _Probe(rows, voxels / np.sqrt(of_class * float(sum(points.voxels.values()))), voxels)


def _second_moments(probe: _Probe) -> Array:
    return np.asarray((probe.rows * probe.weights[:, None]).T @ probe.rows, dtype=np.float64)


def _dice_of_probe(
    moments: Array, probe: _Probe, n_targets: int, penalties: Sequence[float], thresholds: Sequence[float]
) -> Array:
    """Fit to second moments, and return the Dice ``(K, penalties, thresholds)`` at a case's points."""
    moments, width = moments / moments[0, 0], len(moments) - 1 - n_targets
    mean, covariance = moments[0, 1:], moments[1:, 1:] - np.outer(moments[0, 1:], moments[0, 1:])
    variances, seconds = np.diag(covariance)[:width], np.diag(moments)[1 : 1 + width]
    deviations = np.sqrt(np.where(variances > 1e-9 * seconds, variances, np.inf))  # a constant channel says nothing
    correlations = covariance[:width, :width] / deviations / deviations[:, None]
    with_targets = covariance[:width, width:] / deviations[:, None]
    channels, truths = (probe.rows[:, 1 : 1 + width] - mean[:width]) / deviations, probe.rows[:, 1 + width :] > 0
    weights = [solve(correlations + p * np.eye(width), with_targets, assume_a="pos") for p in penalties]
    predictions = np.stack([channels @ each + mean[width:] for each in weights], axis=-1)  # (n, K, penalties)
    called = (predictions[:, k, :, None] > np.asarray(thresholds) for k in range(n_targets))
    return np.stack([_dice_at_points(c, truths[:, k], probe.voxels) for k, c in enumerate(called)])


def _mean_of_chosen(dice: Array) -> list[float]:
    """Average Dice ``(N, K, ...)`` over cases, each with the options that are best for the mean of the others."""
    n, n_targets = dice.shape[:2]
    dice = dice.reshape(n, n_targets, -1)
    defined = ~np.isnan(dice)
    filled = np.where(defined, dice, 0.0)
    others = (filled.sum(0) - filled) / np.maximum(defined.sum(0) - defined, 1)
    best = others.round(9).argmax(-1)[..., None]  # so that rounding does not choose between equal ones
    chosen = np.take_along_axis(dice, best, -1)[..., 0]
    return [float(value) for value in np.nanmean(chosen, axis=0)]


def _voxels_of_points(labels: NDArray[np.integer], voxels: Mapping[int, int]) -> Array:
    """Return how many voxels of a case each of its points ``(n,)`` stands for: those of its class, shared evenly."""
    values, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.array([voxels[value] for value in values.tolist()]) / counts
    return np.asarray(shares[classes.reshape(-1)], dtype=np.float64)


def _dice_at_points(called: NDArray[np.bool_], truth: NDArray[np.bool_], voxels: Array) -> Array:
    """Estimate the Dice ``(...)`` of predictions ``(n, ...)`` at points; NaN where nothing is true or predicted."""
    predicted, hit = (np.tensordot(weights, called, 1) for weights in (voxels, voxels * truth))
    total = predicted + voxels @ truth
    dice = np.divide(2 * hit, total, out=np.full_like(total, np.nan), where=total > 0)
    return np.asarray(dice, dtype=np.float64)


RIVALS: Mapping[str, Callable[[Sequence[CaseFeatures]], float]] = {
    "logme": lambda cases: mean_over_scales(cases, logme),
    "transrate": lambda cases: mean_over_scales(cases, transrate, unit_variance=True),
    "leep": _leep,
    "gbc": lambda cases: mean_over_scales(cases, gbc, unit_variance=True, components=64),
    "gbc-full": lambda cases: mean_over_scales(cases, gbc, unit_variance=True, components=64, covariance="full"),
    "linear-probe": lambda cases: float(np.mean(list(linear_probe(cases).values()))),
    "topote-global": topote_global,
    "topote-local": topote_local,
    "dropout": dropout_consistency,
}
"""Each takes the cases of a checkpoint; higher is better. Pooled ones are averaged over scales."""


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
        voxels = _voxels_of_points(case.labels, case.voxels)
        for label in known.keys() & case.annotated:
            value = float(_dice_at_points(label_of[case.outputs] == label, case.labels == label, voxels))
            dice[structures[label]] += [] if math.isnan(value) else [value]
    return {name: float(np.mean(values)) if values else None for name, values in dice.items()}
