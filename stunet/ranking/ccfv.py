"""CC-FV: class consistency and feature variety of a checkpoint's features on a target (arXiv 2307.11958).

From the paper's formulas, with each class's consistency normalised by the pairs of cases that both have it. From top to
bottom: the 2-Wasserstein distance, distances of a class between cases and their noise, feature variety, the score.

Two samples of one Gaussian are apart: a hundred points of 1536 dimensions with a 1/k spectrum by 0.91 of the square
root of their total variance. The noise grows with the width, and STU-Net's sizes differ in width, so distances as they
are rank widths. Random halves of the same case and class show the noise, since their true distance is 0. What is left
after it is taken into account was measured for several ways of doing so; see docs/transferability.md.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, get_args
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.points import CaseFeatures

Array = NDArray[np.float64]

Normalise = Literal["none", "variety", "both"]
"""Which of the two terms sees features scaled to the unit sphere."""
Debias = Literal["none", "null", "project"]
"""What is done about the noise of small samples; see :func:`class_distances`."""

#: At least this share of the mean squared distance counts as real, so that noise can never make a distance vanish.
LEAST_SHARE = 0.01
#: Distances of points below this share of their root mean square norm count as this share.
FLOOR = 0.01
#: Rows of distances between points that are computed at once.
_ROWS = 512


@dataclass(frozen=True, eq=False)
class GaussianFactor:
    """A Gaussian by its mean and a factor of its covariance."""

    mean: Array  # (C,)
    factor: Array  # (r, C) with factor.T @ factor the covariance, r at most C

    @property
    def trace(self) -> float:
        """Trace of the covariance: the total variance."""
        return float(np.vdot(self.factor, self.factor))


def gaussian_factor(samples: ArrayLike) -> GaussianFactor:
    """Return the Gaussian with the mean and the covariance (over ``n - 1``) of a sample ``(n, C)``.

    Raises:
        TransferabilityError: Fewer than 2 points, no matrix, or values that are not finite.
    """
    points = np.asarray(samples, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise TransferabilityError(f"a sample {points.shape} has no covariance: give finite (n, C), at least 2 points")
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


def pairwise_wasserstein2(factors: Sequence[GaussianFactor]) -> Array:
    """Return the 2-Wasserstein distances of all pairs of Gaussians.

    For Gaussians it is ``W2^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)`` (Dowson and Landau,
    1982, doi:10.1016/0047-259X(82)90077-X). The last trace, the fidelity, needs no square root of a matrix: with any
    factors ``S = F^T F`` it is the nuclear norm of ``F1 F2^T``, the sum of its singular values. A sample of ``n``
    points gives a factor of ``min(n - 1, C)`` rows: a hundred points cost the same in 64 dimensions as in a thousand.

    Returns:
        Symmetric ``(N, N)``, not squared, with zeros on the diagonal.
    """
    # Rounding can leave a negative zero.
    distances: Array = np.sqrt(np.clip(_squared_distances(factors, pairwise_fidelity(factors)), 0, None))
    np.fill_diagonal(distances, 0)
    return distances


def pairwise_fidelity(factors: Sequence[GaussianFactor]) -> Array:
    """Return ``tr (S_i^(1/2) S_j S_i^(1/2))^(1/2)`` ``(N, N)``, which is the trace of the covariance where i is j."""
    rank = max(len(factor.factor) for factor in factors)
    # Rows of zeros change no singular value but zero, so factors of unequal rank fit one array.
    stacked = np.stack([np.pad(factor.factor, ((0, rank - len(factor.factor)), (0, 0))) for factor in factors])
    fidelity = np.diag([factor.trace for factor in factors])
    for i in range(len(factors) - 1):
        singular = np.linalg.svd(stacked[i + 1 :] @ stacked[i].T, compute_uv=False)
        fidelity[i, i + 1 :] = fidelity[i + 1 :, i] = singular.sum(-1)
    return fidelity


def _squared_distances(factors: Sequence[GaussianFactor], fidelity: Array) -> Array:
    traces = np.array([factor.trace for factor in factors])
    means = np.stack([factor.mean for factor in factors])
    # Of means by differences, which keeps small ones exact.
    of_means = np.stack([np.square(means - mean).sum(1) for mean in means])
    squares: Array = of_means + traces[:, None] + traces - 2 * fidelity
    return squares


@dataclass(frozen=True, eq=False)
class PairDistances:
    """Distances between the P cases that have a class, at one scale."""

    cases: NDArray[np.int64]  # (P,) positions of the cases in the target, ascending
    distances: Array  # (P, P) W2 between the samples as they are
    squares: Array | None  # (P, P) squared W2 without noise, single ones may be negative; None if not asked for
    null: Array  # (P,) squared W2 between two random halves of the same case, each of half the points


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
    """Compute the distances between all pairs of cases that have a class.

    With ``null`` each case's points are split into random halves. Between Gaussians that are equal, the
    fidelity ``tr (S1 S2)^(1/2)`` is the total variance; between halves of one case it falls short by noise, to the
    share ``rho``. Between halves of two cases it falls short by nearly ``sqrt(rho_i rho_j)``, and is divided by that
    (as a correlation is corrected for the unreliability of its variables). Both are of half the points, so nothing is
    scaled from one sample size to another. The squared distance of the means loses its noise, total variance over
    number of points, in closed form. Subtracting the null from W2 or from its square was tried, and left more that
    depends on the width.

    Args:
        cases: Cases of one checkpoint.
        positions: Which of them have the class.
        label: The class.
        scale: The scale.
        normalise: Scale features to the unit sphere first.
        debias: ``null`` as above; ``project`` and ``none`` leave distances as they are.
        projection: ``(C, P)``, applied to the features after normalisation; see :func:`random_projection`.
    """
    points, halves = [], []
    for case in (cases[position] for position in positions):
        rows = np.asarray(case.scales[scale][case.labels == label], dtype=np.float64)
        rows = unit_norm(rows) if normalise else rows
        rows = rows if projection is None else np.asarray(rows @ projection, dtype=np.float64)
        # By the case's name: the same halves for all checkpoints, in whatever order the cases come.
        order = np.random.default_rng([crc32(case.case.encode()), label]).permutation(len(rows))
        points.append(rows)
        halves += [gaussian_factor(rows[half]) for half in np.array_split(order, 2)]
    samples = [gaussian_factor(rows) for rows in points]
    squares = None
    if debias == "null":
        squares = _without_noise(samples, [len(rows) for rows in points], halves)
        np.fill_diagonal(squares, 0)
    pairs = [halves[i : i + 2] for i in range(0, len(halves), 2)]
    null = np.clip([_squared_distances(pair, pairwise_fidelity(pair))[0, 1] for pair in pairs], 0, None)
    return PairDistances(np.asarray(positions, dtype=np.int64), pairwise_wasserstein2(samples), squares, null)


def _without_noise(samples: Sequence[GaussianFactor], sizes: Sequence[int], halves: Sequence[GaussianFactor]) -> Array:
    """Return squared distances ``(P, P)`` as :func:`class_distances` describes them for ``null``."""
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


def unit_norm(features: NDArray[np.floating]) -> Array:
    """Scale rows to the unit sphere, as float64. A row of zeros stays what it is."""
    rows = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def random_projection(channels: int, dimensions: int, seed: int = 0) -> Array | None:
    """Draw orthonormal columns ``(C, P)`` times ``sqrt(C / P)``, which keep squared lengths; None unless P is less."""
    if channels <= dimensions:
        return None
    drawn = np.random.default_rng([seed, channels]).standard_normal((channels, dimensions))
    projection: Array = np.linalg.qr(drawn)[0] * np.sqrt(channels / dimensions)
    return projection


def mean_distance(pairs: PairDistances, counts: Array) -> Array:
    """Return the class consistency of one class, for cases that are drawn several times or not at all.

    The mean W2 over ordered pairs of different cases; or, where noise was taken away, which can be done to squares
    only, the root of the mean square. At least a hundredth of the mean square before is left.

    Args:
        pairs: The distances.
        counts: ``(B, N)`` how often each case of the target is drawn. Without two different ones of the class, NaN.
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


def _over_pairs(matrix: Array, weights: Array) -> Array:
    # The diagonal is zero, so a case that is drawn twice makes no pair with itself.
    return np.asarray(((weights @ matrix) * weights).sum(1), dtype=np.float64)


def noise_share(pairs: PairDistances) -> float:
    """Return the share of the mean squared W2 that was taken away as noise, from 0 to 1."""
    total = float(np.square(pairs.distances).sum())
    if pairs.squares is None or total == 0:
        return 0.0
    return float(np.clip(1 - pairs.squares.sum() / total, 0, 1))


def hyperspherical_energy(points: ArrayLike, *, floor: float = FLOOR) -> float:
    """Average ``|v_i - v_j|^-1`` over ordered pairs of different points.

    Points that coincide, as in air outside of the patient, would make the energy infinite, and a few that nearly do
    would dominate it. So distances have a floor. With the default, a hundredth of the radius, a pair adds 100 at most,
    where orthogonal points add 0.7. It changes the energy of the uniform distribution on the sphere in 3
    dimensions, where near points are common, by 1/400, and in more dimensions by much less.

    Args:
        points: ``(m, C)``, at least 2. Memory is that of the points and of 512 rows of distances.
        floor: Lowest distance, as a share of the root mean square norm of the points.
    """
    rows = np.asarray(points, dtype=np.float64)
    radius = float(np.sqrt(np.square(rows).sum() / len(rows))) if rows.ndim == 2 and len(rows) > 1 else 0.0
    if not 0 < radius < np.inf:
        got = f"points {rows.shape} of root mean square norm {radius:g} have no energy"
        raise TransferabilityError(f"{got}: give at least 2 points; all zero means a dead layer")
    rows = (rows - rows.mean(0)) / radius  # near the origin, so that the products below lose no digits
    norms = np.square(rows).sum(1)
    total = 0.0
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        squares = norms[part, None] + norms[start:] - 2 * rows[part] @ rows[start:].T
        np.clip(squares, floor**2, None, out=squares)
        terms = squares**-0.5
        np.fill_diagonal(terms, 0)  # no point pairs with itself
        # Pairs within the block occur twice already, those with later blocks once.
        total += terms[:, : len(terms)].sum() + 2 * terms[:, len(terms) :].sum()
    return float(total / (len(rows) * (len(rows) - 1)) * radius**-1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class CCFV:
    """The score, and what it is made of at each scale, finest first; classes by label value."""

    score: float  # T, the mean over scales of log(variety / consistency); higher is better
    per_scale: tuple[float, ...]  # that logarithm
    variety: tuple[float, ...]  # feature variety
    consistency: tuple[float, ...]  # class consistency, a distance: small is consistent
    class_consistency: tuple[Mapping[int, float], ...]  # the same of each class that two cases share
    pairs: Mapping[int, int]  # unordered pairs of cases that share each class, 0 for those that one case has
    # root mean square W2 between two random halves of the same case and class: pure noise, at half the points
    null: tuple[float, ...]
    noise: tuple[float, ...]  # share of the mean squared W2 that is sampling noise; 0 where none was taken away
    unresolved: tuple[tuple[int, ...], ...]  # classes whose distances are all noise, so that a floor stands for them
    cases: tuple[str, ...]  # the cases, in order
    normalise: Normalise
    debias: Debias
    case_varieties: Array = field(repr=False)  # (D, N), what each case adds to the variety: 1 / E_1
    distances: tuple[Mapping[int, PairDistances], ...] = field(repr=False)  # of each class

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON, as it will be read back; without the matrices."""
        content = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        return dict(json.loads(json.dumps(content)))


def ccfv(
    cases: Sequence[CaseFeatures],
    *,
    normalise: Normalise = "both",
    debias: Debias = "null",
    project_to: int = 32,
    min_points: int = 8,
) -> CCFV:
    """Score a checkpoint on a target.

    >>> rng, labels = np.random.default_rng(0), np.repeat([0, 1], 20)
    >>> draw = lambda n: (rng.normal(size=(n, 8)).astype(np.float32),)
    >>> cases = [CaseFeatures(case=name, labels=labels, scales=draw(40), variety=draw(50)) for name in "abc"]
    >>> result = ccfv(cases)
    >>> result.pairs, len(result.per_scale), result.score == float(np.log(result.variety[0] / result.consistency[0]))
    ({1: 3}, 1, True)

    ``T = 1/D sum_d log(F_v^d / C_cons^d)``. Feature variety ``F_v`` is the mean over cases of ``1 / E_1``, of points of
    the whole volume. Class consistency ``C_cons`` is the mean over foreground classes of the mean W2 between the
    Gaussians of the class in two cases, over all ordered pairs of different cases that both have it (with ``null`` the
    root of the mean square, see :func:`mean_distance`).

    Args:
        cases: The target's cases, at least two with a class in common.
        normalise: Which terms see features scaled to the unit sphere. With ``both``, a layer that is scaled by a factor
            a changes nothing; with ``variety`` the score changes by ``-log a``, with ``none`` varying norms count.
        debias: What is done about the noise of small samples, which makes distances in wide features look long.
            ``null`` corrects by what random halves of the same case show, ``project`` brings all features to
            ``project_to`` dimensions by a random projection, ``none`` does nothing; see docs/transferability.md.
        project_to: Dimensions for ``project``.
        min_points: A case has a class where it has at least so many points of it; 4 or more, for two in each half.

    Raises:
        TransferabilityError: No two cases share a foreground class; or cases, options or points that allow no score.
    """
    if normalise not in get_args(Normalise) or debias not in get_args(Debias):
        known = f"normalise of {get_args(Normalise)}, debias of {get_args(Debias)}"
        raise TransferabilityError(f"normalise={normalise} and debias={debias} are not known: choose {known}")
    holders = _cases_by_class(cases, min_points)
    varieties, distances = [], list[dict[int, PairDistances]]()
    for d, features in enumerate(cases[0].scales):
        volumes = (case.variety[d] if normalise == "none" else unit_norm(case.variety[d]) for case in cases)
        varieties.append([1 / hyperspherical_energy(points) for points in volumes])
        projection = random_projection(features.shape[1], project_to) if debias == "project" else None
        measure = partial(class_distances, cases, scale=d, debias=debias, projection=projection)
        shared = {label: positions for label, positions in holders.items() if len(positions) > 1}
        distances.append({k: measure(p, label=k, normalise=normalise == "both") for k, p in shared.items()})
    case_varieties, everything = np.array(varieties), np.ones((1, len(cases)))
    by_class = [{label: float(mean_distance(p, everything)[0]) for label, p in scale.items()} for scale in distances]
    for d, scale in enumerate(by_class):
        if not any(scale.values()):
            got = f"scale {d}: no distance between any two of {len(cases)} cases"
            raise TransferabilityError(f"{got}: check that the weights were loaded, and that the images differ")
    variety = case_varieties.mean(1)
    consistency = np.array([np.mean(list(scale.values())) for scale in by_class])
    per_scale = np.log(variety / consistency)
    return CCFV(
        score=float(per_scale.mean()),
        per_scale=tuple(per_scale.tolist()),
        variety=tuple(variety.tolist()),
        consistency=tuple(consistency.tolist()),
        class_consistency=tuple(by_class),
        pairs={label: len(positions) * (len(positions) - 1) // 2 for label, positions in holders.items()},
        null=tuple(math.sqrt(np.mean([np.mean(p.null) for p in scale.values()])) for scale in distances),
        noise=tuple(float(np.mean([noise_share(p) for p in scale.values()])) for scale in distances),
        unresolved=tuple(
            tuple(label for label, p in scale.items() if noise_share(p) > 1 - LEAST_SHARE) for scale in distances
        ),
        cases=tuple(case.case for case in cases),
        normalise=normalise,
        debias=debias,
        case_varieties=case_varieties,
        distances=tuple(distances),
    )


def scale_weights(n_scales: int) -> Array:
    """Return weights ``(D,)`` that favour the middle scales, with a sum of 1: those of TopoTE (arXiv 2602.23916).

    They are normal densities, a little wider for the six stages of an encoder than for the five of a decoder.

    >>> scale_weights(5).round(3)
    array([0.022, 0.229, 0.499, 0.229, 0.022])
    >>> scale_weights(6).round(3)
    array([0.002, 0.038, 0.24 , 0.444, 0.24 , 0.038])
    """
    weights = np.exp(-np.square((np.arange(n_scales) - n_scales // 2) / (0.8 if n_scales < 6 else 0.9)) / 2)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


VARIANTS = (
    *("ccfv-consistency", "ccfv-variety", "ccfv-coarse", "ccfv-weighted"),
    *(f"ccfv-scale-{scale}" for scale in range(6)),
    *(f"ccfv-{normalise}-{debias}" for normalise in get_args(Normalise) for debias in get_args(Debias)),
)
"""Names of what :func:`ccfv_variants` computes."""


def ccfv_variants(cases: Sequence[CaseFeatures]) -> dict[str, float]:
    """Score a checkpoint by parts of CC-FV and with other options, from the same features.

    ``ccfv-consistency`` and ``ccfv-variety`` are the two terms, ``ccfv-scale-0`` and so on single scales, finest first,
    ``ccfv-coarse`` all scales but the finest, ``ccfv-weighted`` the mean with :func:`scale_weights`: all with the
    default options. ``ccfv-none-none`` and so on are the score with others, `normalise` first and `debias` second.
    Higher is better for each.

    Args:
        cases: As for :func:`ccfv`.
    """
    modes = [(normalise, debias) for normalise in get_args(Normalise) for debias in get_args(Debias)]
    results = {mode: ccfv(cases, normalise=mode[0], debias=mode[1]) for mode in modes}
    default = results["both", "null"]
    scales = np.array(default.per_scale)
    return {
        "ccfv-consistency": -float(np.log(default.consistency).mean()),
        "ccfv-variety": float(np.log(default.variety).mean()),
        **({"ccfv-coarse": float(scales[1:].mean())} if len(scales) > 1 else {}),
        "ccfv-weighted": float(scale_weights(len(scales)) @ scales),
        **{f"ccfv-scale-{scale}": value for scale, value in enumerate(default.per_scale)},
        **{f"ccfv-{normalise}-{debias}": result.score for (normalise, debias), result in results.items()},
    }


def _cases_by_class(cases: Sequence[CaseFeatures], min_points: int) -> dict[int, list[int]]:
    """Find the positions of the cases that have each foreground class, ascending, with so many points at least."""
    holders: dict[int, list[int]] = {}
    for position, case in enumerate(cases):
        labels, counts = np.unique(case.labels, return_counts=True)
        for label in labels[(labels > 0) & (counts >= min_points)].tolist():
            holders.setdefault(label, []).append(position)
    if all(len(positions) < 2 for positions in holders.values()):
        single = [f"class {label} in {cases[p[0]].case} only" for label, p in sorted(holders.items())[:8]]
        got = ", ".join(single) or f"no foreground class with {min_points} points"
        raise TransferabilityError(f"no two of {len(cases)} cases share a class ({got}): add cases or points")
    return {label: holders[label] for label in sorted(holders)}


def scores_of_draws(result: CCFV, draws: NDArray[np.integer]) -> Array:
    """Score each resample ``(B, N)`` of the cases, from the distances and varieties that are there.

    A case that is drawn several times counts so often, and makes no pair with itself. The score is NaN where a draw has
    no two different cases that share a class.
    """
    counts = np.asarray(draws, dtype=np.float64)
    variety = counts @ result.case_varieties.T / counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        consistency = []
        for scale in result.distances:
            stacked = np.stack([mean_distance(pairs, counts) for pairs in scale.values()])
            defined = np.isfinite(stacked)
            consistency.append(np.where(defined, stacked, 0).sum(0) / defined.sum(0))
        logs = np.log(variety / np.stack(consistency, axis=1))
    scores: Array = np.where(np.isfinite(logs).all(1), logs.mean(1), np.nan)
    return scores


def bootstrap_scores(result: CCFV, *, n_resamples: int = 1000, seed: int = 0) -> Array:
    """Score bootstrap resamples of the cases, the same ones for every checkpoint; see :func:`scores_of_draws`."""
    n = len(result.cases)
    return scores_of_draws(result, np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples))
