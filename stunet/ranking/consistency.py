"""How far the features of a class differ between cases, and how much of that is the noise of small samples.

Two samples of one Gaussian are apart: a hundred points of 1536 dimensions with a 1/k spectrum by 0.91 of the square
root of their total variance. The noise grows with the width, and STU-Net's sizes differ in width, so distances as they
are rank widths. Random halves of the same case and class show the noise, since their true distance is 0. What is left
after it is taken into account was measured for several ways of doing so; see docs/transferability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.samples import CaseFeatures, unit_norm
from stunet.ranking.wasserstein import GaussianFactor, gaussian_factor, pairwise_fidelity, squared_mean_distances

__all__ = [
    "Debias",
    "PairDistances",
    "cases_by_class",
    "check_debias",
    "class_distances",
    "mean_distance",
    "noise_share",
    "random_projection",
]

Array = NDArray[np.float64]

Debias = Literal["none", "null", "project"]
"""What is done about the noise of small samples; see :func:`class_distances`."""

#: At least this share of the mean squared distance counts as real, so that noise can never make a distance vanish.
LEAST_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class PairDistances:
    """Distances between the P cases that have a class, at one scale.

    Attributes:
        cases: `(P,)` positions of the cases in the target, ascending.
        distances: `(P, P)` W2 between the samples as they are.
        squares: `(P, P)` squared W2 with the noise taken away, where that was asked for, or None. Single ones may be
            negative.
        null: `(P,)` squared W2 between two random halves of the same case, each of half the points.
    """

    cases: NDArray[np.int64]
    distances: Array
    squares: Array | None
    null: Array


def check_debias(debias: str) -> None:
    """Check an option's value.

    Raises:
        TransferabilityError: There is no such way.
    """
    if debias not in get_args(Debias):
        raise TransferabilityError(
            "unknown way to treat sampling noise",
            got=debias,
            expected=f"one of {', '.join(get_args(Debias))}",
            remedy="Choose null, which depends least on the width of the features.",
        )


def cases_by_class(cases: Sequence[CaseFeatures], min_points: int) -> dict[int, list[int]]:
    """Positions of the cases that have each foreground class, ascending, at ``min_points`` points at least.

    Raises:
        TransferabilityError: No case has foreground, or no class is in two cases.
    """
    if min_points < 4:
        raise TransferabilityError(
            "too few points for halves",
            got=f"min_points={min_points}",
            expected="at least 4: two points in each half",
            remedy="Raise min_points.",
        )
    holders: dict[int, list[int]] = {}
    for position, case in enumerate(cases):
        labels, counts = np.unique(case.labels, return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            if label > 0 and count >= min_points:
                holders.setdefault(label, []).append(position)
    if all(len(positions) < 2 for positions in holders.values()):
        found = ", ".join(f"class {label} in {cases[p[0]].case} only" for label, p in sorted(holders.items())[:8])
        raise TransferabilityError(
            "no pair of cases that share a class" if holders else "no foreground",
            got=f"{len(cases)} {'case' if len(cases) == 1 else 'cases'}: "
            + (found or f"no foreground class has {min_points} points"),
            expected=f"two cases with at least {min_points} points of the same foreground class",
            remedy="Add cases of the target, or sample more points of each class.",
        )
    return {label: holders[label] for label in sorted(holders)}


def class_distances(
    cases: Sequence[CaseFeatures],
    positions: Sequence[int],
    *,
    label: int,
    scale: int,
    normalise: bool = True,
    debias: Debias = "null",
    projection: Array | None = None,
) -> PairDistances:
    """Distances between all pairs of cases that have a class.

    With ``null`` each case's points are split into random halves. Between Gaussians that are equal, the
    fidelity ``tr (S1 S2)^(1/2)`` is the total variance; between halves of one case it falls short by noise, to the
    share ``rho``. Between halves of two cases it falls short by nearly ``sqrt(rho_i rho_j)``, and is divided by that
    (as a correlation is corrected for the unreliability of its variables). Both are of half the points, so nothing is
    scaled from one sample size to another. The squared distance of the means loses its noise, total variance over
    number of points, in closed form. Subtracting the null from W2 or from its square was tried, and left more that
    depends on the width.

    Args:
        cases: Cases of one candidate.
        positions: Which of them have the class.
        label: The class.
        scale: The scale.
        normalise: Scale features to the unit sphere first.
        debias: ``null`` as above; ``project`` and ``none`` leave distances as they are.
        projection: `(C, P)`, applied to the features after normalisation; see :func:`random_projection`.
    """
    names = [cases[position].case for position in positions]
    points = [_points(cases[position], label, scale, normalise, projection) for position in positions]
    samples = [gaussian_factor(rows) for rows in points]
    halves = [
        gaussian_factor(half) for name, rows in zip(names, points, strict=True) for half in _halves(rows, name, label)
    ]
    raw = np.clip(_squared_distances(samples, pairwise_fidelity(samples)), 0, None)
    squares = _without_noise(samples, [len(rows) for rows in points], halves) if debias == "null" else None
    for matrix in (raw, squares):
        if matrix is not None:
            np.fill_diagonal(matrix, 0)
    return PairDistances(np.asarray(positions, dtype=np.int64), np.sqrt(raw), squares, _within(halves))


def _points(case: CaseFeatures, label: int, scale: int, normalise: bool, projection: Array | None) -> Array:
    rows = np.asarray(case.points(scale, label), dtype=np.float64)
    rows = unit_norm(rows) if normalise else rows
    return rows if projection is None else np.asarray(rows @ projection, dtype=np.float64)


def _halves(rows: Array, name: str, label: int) -> list[Array]:
    # By the case's name: the same halves for all candidates, in whatever order the cases come.
    order = np.random.default_rng([crc32(name.encode()), label]).permutation(len(rows))
    return [rows[half] for half in np.array_split(order, 2)]


def _squared_distances(factors: Sequence[GaussianFactor], fidelity: Array) -> Array:
    traces = np.array([factor.trace for factor in factors])
    means = np.stack([factor.mean for factor in factors])
    squares: Array = squared_mean_distances(means) + traces[:, None] + traces - 2 * fidelity
    return squares


def _within(halves: Sequence[GaussianFactor]) -> Array:
    """Squared W2 of the two halves of each case; `halves` has them one after the other."""
    pairs = [halves[i : i + 2] for i in range(0, len(halves), 2)]
    squares = np.array([_squared_distances(pair, pairwise_fidelity(pair))[0, 1] for pair in pairs])
    return np.asarray(np.clip(squares, 0, None), dtype=np.float64)


def _without_noise(samples: Sequence[GaussianFactor], sizes: Sequence[int], halves: Sequence[GaussianFactor]) -> Array:
    """Squared distances `(P, P)` as :func:`class_distances` describes them for ``null``."""
    fidelity = pairwise_fidelity(halves)
    within = np.diag(fidelity, 1)[::2]
    full = np.diag(fidelity).reshape(-1, 2).mean(1)
    # Points that all coincide have neither variance nor noise.
    reached = np.where(within > 0, within / np.where(full > 0, full, 1.0), 1.0)
    between = fidelity.reshape(len(samples), 2, len(samples), 2).mean((1, 3))
    of_means = np.array([sample.trace for sample in samples]) / np.asarray(sizes)
    corrected = between / np.sqrt(reached[:, None] * reached)
    squares: Array = _squared_distances(samples, corrected) - of_means[:, None] - of_means
    return squares


def random_projection(channels: int, dimensions: int, seed: int = 0) -> Array | None:
    """Random orthonormal columns `(C, P)` times ``sqrt(C / P)``, which keep squared lengths in expectation.

    Returns:
        None where there are no more channels than that.
    """
    if channels <= dimensions:
        return None
    drawn = np.random.default_rng([seed, channels]).standard_normal((channels, dimensions))
    projection: Array = np.linalg.qr(drawn)[0] * np.sqrt(channels / dimensions)
    return projection


def mean_distance(pairs: PairDistances, counts: Array) -> Array:
    """Class consistency of one class, for cases that are drawn several times or not at all.

    The mean W2 over ordered pairs of different cases; or, where noise was taken away, which can be done to squares
    only, the root of the mean square. At least a hundredth of the mean square before is left.

    Args:
        pairs: The distances.
        counts: `(B, N)` how often each case of the target is drawn.

    Returns:
        `(B,)`, NaN where no two different cases with the class are drawn.
    """
    weights = counts[:, pairs.cases]
    n_pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if pairs.squares is None:
            mean = _over_pairs(pairs.distances, weights) / n_pairs
        else:
            least = LEAST_SHARE * _over_pairs(np.square(pairs.distances), weights)
            mean = np.sqrt(np.maximum(_over_pairs(pairs.squares, weights), least) / n_pairs)
    return np.asarray(np.where(n_pairs > 0, mean, np.nan), dtype=np.float64)


def noise_share(pairs: PairDistances) -> float:
    """Share of the mean squared W2 that was taken away as noise, from 0 to 1."""
    total = float(np.square(pairs.distances).sum())
    if pairs.squares is None or total == 0:
        return 0.0
    return float(np.clip(1 - pairs.squares.sum() / total, 0, 1))


def _over_pairs(matrix: Array, weights: Array) -> Array:
    # The diagonal is zero, so a case that is drawn twice makes no pair with itself.
    return np.asarray(((weights @ matrix) * weights).sum(1), dtype=np.float64)
