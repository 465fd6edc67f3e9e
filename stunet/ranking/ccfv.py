"""CC-FV: class consistency and feature variety of a candidate's features on a target (arXiv 2307.11958).

From the paper's formulas, with each class's consistency normalised by the pairs of cases that both have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.consistency import (
    LEAST_SHARE,
    Debias,
    PairDistances,
    cases_by_class,
    check_debias,
    class_distances,
    mean_distance,
    noise_share,
    random_projection,
)
from stunet.ranking.samples import CaseFeatures, check_cases
from stunet.ranking.variety import case_varieties

__all__ = ["CCFV", "Normalise", "bootstrap_scores", "ccfv", "draw_cases", "scores_of_draws"]

Array = NDArray[np.float64]

Normalise = Literal["none", "variety", "both"]
"""Which of the two terms sees features scaled to the unit sphere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CCFV:
    """The score, and what it is made of. Scales are finest first, classes by label value.

    Attributes:
        score: ``T``, the mean over scales of ``log(variety / consistency)``. Higher is better.
        per_scale: That logarithm, for each scale.
        variety: Feature variety, for each scale.
        consistency: Class consistency (a distance: small is consistent), for each scale.
        class_consistency: The same of each class that two cases share, for each scale.
        pairs: Number of unordered pairs of cases that share each class, 0 for those that one case has.
        null: Root mean square W2 between two random halves of the same case and class, for each scale: pure noise, at
            half the points.
        noise: Share of the mean squared W2 that is sampling noise, for each scale; 0 where none was taken away.
        unresolved: Classes at each scale whose distances are all noise, so that a floor stands for their consistency.
        cases: The cases, in order.
        normalise: The option.
        debias: The option.
        case_varieties: `(D, N)` what each case adds to the variety.
        distances: For each scale, the distances of each class.
    """

    score: float
    per_scale: tuple[float, ...]
    variety: tuple[float, ...]
    consistency: tuple[float, ...]
    class_consistency: tuple[Mapping[int, float], ...]
    pairs: Mapping[int, int]
    null: tuple[float, ...]
    noise: tuple[float, ...]
    unresolved: tuple[tuple[int, ...], ...]
    cases: tuple[str, ...]
    normalise: Normalise
    debias: Debias
    case_varieties: Array = field(repr=False)
    distances: tuple[Mapping[int, PairDistances], ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the matrices."""
        return {
            "score": self.score,
            "per_scale": list(self.per_scale),
            "variety": list(self.variety),
            "consistency": list(self.consistency),
            "class_consistency": [{str(k): v for k, v in scale.items()} for scale in self.class_consistency],
            "pairs": {str(k): v for k, v in self.pairs.items()},
            "null": list(self.null),
            "noise": list(self.noise),
            "unresolved": [list(labels) for labels in self.unresolved],
            "cases": list(self.cases),
            "normalise": self.normalise,
            "debias": self.debias,
        }


def ccfv(
    cases: Sequence[CaseFeatures],
    *,
    normalise: Normalise = "both",
    debias: Debias = "null",
    project_to: int = 32,
    min_points: int = 8,
) -> CCFV:
    """Score a candidate on a target.

    ``T = 1/D sum_d log(F_v^d / C_cons^d)``. Feature variety ``F_v`` is the mean over cases of ``1 / E_1``, of points of
    the whole volume. Class consistency ``C_cons`` is the mean over foreground classes of the mean W2 between the
    Gaussians of the class in two cases, over all ordered pairs of different cases that both have it (with ``null`` the
    root of the mean square, see :func:`stunet.ranking.consistency.mean_distance`).

    Args:
        cases: The target's cases, at least two with a class in common.
        normalise: Which terms see features scaled to the unit sphere. With ``both``, a layer that is scaled by a factor
            a changes nothing; with ``variety`` the score changes by ``-log a``, with ``none`` by nothing either, except
            that varying norms count.
        debias: What is done about the noise of small samples, which makes distances in wide features look long.
            ``null`` corrects by what random halves of the same case show, ``project`` brings all features to
            ``project_to`` dimensions by a random projection, ``none`` does nothing. Over widths of 64 to 1536 channels
            at 100 points, distances that are truly equal came out up to 1.1, 1.1 and 1.9 times as long in one width as
            in another, and up to 1.2, 3 and 7 times as long as they are, so ``null`` is the default
            (docs/transferability.md).
        project_to: Dimensions for ``project``.
        min_points: A case has a class where it has at least so many points of it.

    Raises:
        TransferabilityError: No two cases share a foreground class; or cases, options or points that allow no score.
    """
    if normalise not in get_args(Normalise):
        raise TransferabilityError(
            "unknown normalisation",
            got=normalise,
            expected=f"one of {', '.join(get_args(Normalise))}",
            remedy="Choose both, with which scaled layers do not matter.",
        )
    check_debias(debias)
    check_cases(cases)
    holders = cases_by_class(cases, min_points)
    shared = {label: positions for label, positions in holders.items() if len(positions) > 1}
    distances: list[dict[int, PairDistances]] = []
    for d, features in enumerate(cases[0].scales):
        projection = random_projection(features.shape[1], project_to) if debias == "project" else None
        distances.append(
            {
                label: class_distances(
                    cases, positions, label=label, scale=d, normalise=normalise == "both", debias=debias,
                    projection=projection,
                )
                for label, positions in shared.items()
            }
        )  # fmt: skip
    return _result(
        cases,
        case_varieties(cases, normalise=normalise != "none"),
        distances,
        pairs={label: len(positions) * (len(positions) - 1) // 2 for label, positions in holders.items()},
        normalise=normalise,
        debias=debias,
    )


def _result(
    cases: Sequence[CaseFeatures],
    varieties: Array,
    distances: Sequence[Mapping[int, PairDistances]],
    *,
    pairs: Mapping[int, int],
    normalise: Normalise,
    debias: Debias,
) -> CCFV:
    everything = np.ones((1, len(cases)))
    by_class = [{label: float(mean_distance(p, everything)[0]) for label, p in scale.items()} for scale in distances]
    for d, scale in enumerate(by_class):
        if not any(scale.values()):
            raise TransferabilityError(
                "features that are the same in all cases",
                got=f"scale {d}: no distance between any two of {len(cases)} cases",
                expected="features that depend on the image",
                remedy="Check that the candidate's weights were loaded, and that the cases' images differ.",
            )
    variety = varieties.mean(1)
    consistency = np.array([np.mean(list(scale.values())) for scale in by_class])
    per_scale = np.log(variety / consistency)
    return CCFV(
        score=float(per_scale.mean()),
        per_scale=tuple(per_scale.tolist()),
        variety=tuple(variety.tolist()),
        consistency=tuple(consistency.tolist()),
        class_consistency=tuple(by_class),
        pairs=pairs,
        null=tuple(math.sqrt(np.mean([np.mean(p.null) for p in scale.values()])) for scale in distances),
        noise=tuple(float(np.mean([noise_share(p) for p in scale.values()])) for scale in distances),
        unresolved=tuple(
            tuple(label for label, p in scale.items() if noise_share(p) > 1 - LEAST_SHARE) for scale in distances
        ),
        cases=tuple(case.case for case in cases),
        normalise=normalise,
        debias=debias,
        case_varieties=varieties,
        distances=tuple(distances),
    )


def draw_cases(n_cases: int, n_draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Bootstrap resamples of cases, as how often each is drawn.

    Candidates are compared on the same draws, which equal arguments give.

    Returns:
        `(n_draws, n_cases)`, rows that sum up to ``n_cases``.
    """
    drawn: NDArray[np.int64] = np.random.default_rng(seed).multinomial(
        n_cases, np.full(n_cases, 1 / n_cases), size=n_draws
    )
    return drawn


def scores_of_draws(result: CCFV, draws: NDArray[np.integer]) -> Array:
    """The score on each resample of the cases, from the distances and varieties that are there.

    A case that is drawn several times counts so often, and makes no pair with itself.

    Args:
        result: The score on all cases.
        draws: `(B, N)` how often each case is drawn.

    Returns:
        `(B,)`, NaN where a draw has no two different cases that share a class.
    """
    counts = np.asarray(draws, dtype=np.float64)
    variety = counts @ result.case_varieties.T / counts.sum(1, keepdims=True)
    consistency = np.stack(
        [_mean_where_defined([mean_distance(p, counts) for p in scale.values()]) for scale in result.distances], axis=1
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(variety / consistency)
    scores: Array = np.where(np.isfinite(logs).all(1), logs.mean(1), np.nan)
    return scores


def bootstrap_scores(result: CCFV, *, n_resamples: int = 1000, seed: int = 0) -> Array:
    """Scores on bootstrap resamples of the cases: :func:`scores_of_draws` of :func:`draw_cases`.

    Returns:
        `(n_resamples,)`, with NaN for resamples without a pair.
    """
    return scores_of_draws(result, draw_cases(len(result.cases), n_resamples, seed))


def _mean_where_defined(rows: Sequence[Array]) -> Array:
    stacked = np.stack(rows)
    defined = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, stacked, 0).sum(0) / defined.sum(0), dtype=np.float64)
