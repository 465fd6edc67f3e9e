"""Ranking of checkpoints for a target, one after another, with results that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from stunet.errors import STUNetError, UsageError
from stunet.ranking.metrics import MetricSettings
from stunet.ranking.result_cache import ResultCache, checkpoint_digest
from stunet.ranking.scoring import RANK_METRICS, CandidateScores, score_candidate
from stunet.ranking.target import TargetCases
from stunet.ranking.zoo import ZooEntry

__all__ = ["Failure", "Ranking", "check_metrics", "rank_candidates"]

#: Share of resamples in which one candidate must be ahead of another to be called better.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Failure:
    """A candidate that could not be scored.

    Attributes:
        name: As tables call it.
        path: The checkpoint.
        error: What was wrong, what was expected, what to do.
    """

    name: str
    path: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Candidates, best first by the first metric that was asked for.

    Attributes:
        metric: That metric.
        candidates: Those with a score by it first, then the others.
        failures: Those that could not be scored.
    """

    metric: str
    candidates: tuple[CandidateScores, ...]
    failures: tuple[Failure, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics by which at least one candidate has a score, the one that ranks first."""
        names = [self.metric, *(name for candidate in self.candidates for name in candidate.scores)]
        scored = {name for c in self.candidates for name, score in c.scores.items() if score is not None}
        return tuple(name for name in dict.fromkeys(names) if name in scored)

    @property
    def preferred(self) -> dict[str, CandidateScores]:
        """The candidate with the highest score, by metric; of metrics that score two candidates at least."""
        found = {}
        for metric in self.metrics:
            scored = [(score, c) for c in self.candidates if (score := c.scores.get(metric)) is not None]
            if len(scored) > 1:
                found[metric] = max(scored, key=lambda pair: pair[0])[1]
        return found

    @property
    def mean_ranks(self) -> tuple[float, ...]:
        """Mean rank of each candidate over the metrics that score all of them; empty with fewer than two of these."""
        rows = [[c.scores.get(metric) for c in self.candidates] for metric in self.metrics]
        ranks = [rankdata([-score for score in row if score is not None]) for row in rows if None not in row]
        return tuple(np.mean(ranks, axis=0).tolist()) if len(ranks) > 1 else ()

    @property
    def consensus(self) -> CandidateScores | None:
        """The candidate with the lowest mean rank, the first of equal ones; None where there is no mean rank."""
        if not (ranks := self.mean_ranks):
            return None
        return self.candidates[min(range(len(ranks)), key=ranks.__getitem__)]

    def ahead(self, better: CandidateScores, worse: CandidateScores) -> float | None:
        """Share of the resamples of the cases in which one candidate's CC-FV is above another's."""
        pairs = [(a, b) for a, b in zip(better.draws, worse.draws, strict=False) if a is not None and b is not None]
        return sum(a > b for a, b in pairs) / len(pairs) if pairs else None

    @property
    def tied(self) -> tuple[CandidateScores, ...]:
        """Candidates that the cases at hand cannot tell from the first one; empty where there are none.

        By CC-FV on the same resamples: the first is ahead in fewer than 95 % of them.
        """
        if self.metric != "ccfv" or len(self.candidates) < 2:
            return ()
        first, *others = [c for c in self.candidates if c.scores.get("ccfv") is not None]
        shares = [(other, self.ahead(first, other)) for other in others]
        return tuple(other for other, share in shares if share is not None and share < _CONFIDENCE)


def rank_candidates(
    entries: Sequence[ZooEntry],
    target: TargetCases,
    *,
    metrics: Sequence[str] = ("ccfv",),
    settings: MetricSettings | None = None,
    cache: ResultCache | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    n_resamples: int = 1000,
    seed: int = 0,
    on_progress: Callable[[str, str, float], Any] | None = None,
    on_candidate: Callable[[CandidateScores | Failure], Any] | None = None,
) -> Ranking:
    """Score each candidate; one that fails is reported and the others go on.

    Args:
        entries: The checkpoints.
        target: The target's cases.
        metrics: Names out of :data:`RANK_METRICS`; the first one ranks.
        settings: Options of the metrics.
        cache: Where results are kept and looked up, by the content of checkpoint and cases and by all settings.
        device: For the networks.
        batch_size: Windows at once.
        n_resamples: Bootstrap resamples of the cases.
        seed: For the resamples.
        on_progress: See :func:`stunet.ranking.score_candidate`.
        on_candidate: Called with each result.

    Raises:
        TransferabilityError: An unknown metric.
    """
    check_metrics(metrics)
    settings = settings or MetricSettings()
    results: list[CandidateScores] = []
    failures: list[Failure] = []
    for entry in entries:
        outcome: CandidateScores | Failure
        try:
            sha256 = checkpoint_digest(entry.path)
            key = {
                "checkpoint": sha256,
                **_target_key(target),
                "metrics": sorted(metrics),
                "settings": asdict(settings),
                "resamples": [n_resamples, seed],
            }
            kept = _kept(entry, cache, key)
            outcome = kept or score_candidate(
                entry,
                target,
                sha256=sha256,
                metrics=metrics,
                settings=settings,
                device=device,
                batch_size=batch_size,
                n_resamples=n_resamples,
                seed=seed,
                on_progress=on_progress,
            )
            if cache is not None and kept is None:
                cache.put(key, asdict(outcome))
            results.append(outcome)
        except STUNetError as error:
            outcome = Failure(entry.name, str(entry.path), str(error))
            failures.append(outcome)
        if on_candidate is not None:
            on_candidate(outcome)
    return Ranking(metric=metrics[0], candidates=_best_first(results, metrics[0]), failures=tuple(failures))


def check_metrics(metrics: Sequence[str]) -> None:
    """Check names of metrics.

    Raises:
        UsageError: None, an unknown one, or one twice.
    """
    unknown = [metric for metric in metrics if metric not in RANK_METRICS]
    if not metrics or unknown or len(set(metrics)) < len(metrics):
        raise UsageError(
            "metrics that are not known" if unknown else "no metrics, or one twice",
            got=", ".join(unknown or metrics) or "nothing",
            expected=f"some of {', '.join(RANK_METRICS)}",
            remedy="Correct --metrics; the first one ranks.",
        )


def _target_key(target: TargetCases) -> dict[str, Any]:
    return {
        "cases": target.digest,
        "points": target.points_digest,
        "network": [
            target.target.input_channels,
            list(target.target.patch_size),
            list(map(list, target.target.strides)),
        ],
        "structures": {str(label): name for label, name in target.structures.items()},
    }


def _kept(entry: ZooEntry, cache: ResultCache | None, key: dict[str, Any]) -> CandidateScores | None:
    kept = None if cache is None else cache.get(key)
    if kept is None:
        return None
    here = {
        "name": entry.name,
        "path": str(entry.path),
        "description": {**kept["description"], "path": str(entry.path)},
        "draws": tuple(kept["draws"]),
        "seconds": 0.0,
    }
    return CandidateScores(**{**kept, **here})


def _best_first(results: Sequence[CandidateScores], metric: str) -> tuple[CandidateScores, ...]:
    def order(result: CandidateScores) -> tuple[bool, float]:
        score = result.scores.get(metric)
        return score is None, 0.0 if score is None else -score

    return tuple(sorted(results, key=order))
