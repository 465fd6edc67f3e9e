"""The metrics by name, all computed from the same features of the target's cases; higher is better for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from stunet.ranking.ccfv import Normalise, ccfv
from stunet.ranking.consistency import Debias
from stunet.ranking.gbc import Covariance, gbc
from stunet.ranking.leep import leep
from stunet.ranking.logme import logme
from stunet.ranking.pooled import unit_variance
from stunet.ranking.samples import CaseFeatures, check_cases, mean_over_scales, pool_probabilities
from stunet.ranking.transrate import transrate

__all__ = ["METRICS", "Metric", "MetricSettings"]


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Options of the metrics, for all candidates of a ranking.

    Attributes:
        normalise: CC-FV: which terms see features scaled to the unit sphere.
        debias: CC-FV: what is done about the noise of small samples.
        project_to: CC-FV: dimensions for ``debias="project"``.
        min_points: CC-FV: points of a class that a case must have to have it.
        eps: TransRate: squared distortion, for features of total variance 1.
        components: GBC: principal components that are kept, or None for all.
        floor: GBC: lowest variance, for features of total variance 1.
    """

    normalise: Normalise = "both"
    debias: Debias = "null"
    project_to: int = 32
    min_points: int = 8
    eps: float = 1e-4
    components: int | None = 64
    floor: float = 1e-4


Metric = Callable[[Sequence[CaseFeatures], MetricSettings], float]


def _ccfv(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    return ccfv(
        cases,
        normalise=settings.normalise,
        debias=settings.debias,
        project_to=settings.project_to,
        min_points=settings.min_points,
    ).score


def _logme(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    return mean_over_scales(cases, logme)


def _transrate(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    # To unit variance, so that a scaled layer changes nothing.
    return mean_over_scales(cases, lambda x, y: transrate(unit_variance(x), y, eps=settings.eps))


def _leep(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    check_cases(cases)
    return leep(*pool_probabilities(cases))


def _gbc(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    return _any_gbc(cases, settings, "diagonal")


def _gbc_full(cases: Sequence[CaseFeatures], settings: MetricSettings) -> float:
    return _any_gbc(cases, settings, "full")


def _any_gbc(cases: Sequence[CaseFeatures], settings: MetricSettings, covariance: Covariance) -> float:
    return mean_over_scales(
        cases,
        lambda x, y: gbc(
            unit_variance(x), y, covariance=covariance, components=settings.components, floor=settings.floor
        ),
    )


METRICS: Mapping[str, Metric] = MappingProxyType(
    {"ccfv": _ccfv, "logme": _logme, "transrate": _transrate, "leep": _leep, "gbc": _gbc, "gbc-full": _gbc_full}
)
"""Each takes the cases of a candidate and the settings. Pooled ones are averaged over scales; ``leep`` has none."""
