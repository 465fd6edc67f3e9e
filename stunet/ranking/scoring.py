"""All scores of one candidate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stunet.ranking.candidates import CandidateNetwork, build_candidate
from stunet.ranking.ccfv import CCFV, ccfv, draw_cases, scores_of_draws
from stunet.ranking.extraction import extract_case
from stunet.ranking.features import decoder_stages
from stunet.ranking.metrics import METRICS, MetricSettings
from stunet.ranking.samples import CaseFeatures
from stunet.ranking.target import TargetCases
from stunet.ranking.zero_shot import PointPredictions, zero_shot_at_points
from stunet.ranking.zoo import ZooEntry

__all__ = ["RANK_METRICS", "CandidateScores", "score_candidate"]

RANK_METRICS = (*METRICS, "zero-shot")
"""Names of all metrics."""


@dataclass(frozen=True, kw_only=True)
class CandidateScores:
    """What a ranking says about one candidate.

    Attributes:
        name: As tables call it.
        path: The checkpoint.
        sha256: Of its content.
        description: What kind of network it is, see :class:`stunet.ranking.CandidateDescription`.
        scores: By metric, higher is better; None where the metric says nothing about this candidate.
        notes: Why a score is missing, by metric.
        ccfv: What CC-FV is made of, see :meth:`stunet.ranking.CCFV.as_dict`; empty where it was not asked for.
        draws: CC-FV on resamples of the cases, the same ones for all candidates; None where a resample has no pair.
        zero_shot: Estimated Dice by structure of what the checkpoint predicts as it is.
        seconds: That scoring took; 0 where the result was there already.
    """

    name: str
    path: str
    sha256: str
    description: Mapping[str, Any]
    scores: Mapping[str, float | None]
    notes: Mapping[str, str] = field(default_factory=dict)
    ccfv: Mapping[str, Any] = field(default_factory=dict)
    draws: tuple[float | None, ...] = ()
    zero_shot: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of CC-FV over resampled cases, 95 %."""
        values = [value for value in self.draws if value is not None]
        if len(values) < 2:
            return None
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)


def score_candidate(
    entry: ZooEntry,
    target: TargetCases,
    *,
    sha256: str = "",
    metrics: Sequence[str] = ("ccfv",),
    settings: MetricSettings | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    n_resamples: int = 1000,
    seed: int = 0,
    on_progress: Callable[[str, str, float], Any] | None = None,
) -> CandidateScores:
    """Load a checkpoint, read its features of the target's cases, and score them.

    Args:
        entry: The checkpoint.
        target: The target's cases.
        sha256: Of the checkpoint, to be passed on.
        metrics: Names out of :data:`RANK_METRICS`.
        settings: Options of the metrics.
        device: For the network.
        batch_size: Windows at once.
        n_resamples: Bootstrap resamples of the cases, for CC-FV.
        seed: For the resamples.
        on_progress: Called with the candidate, what is being done, and the share of its cases that has been read.

    Raises:
        ArchitectureError: A network that no image of the target fits.
        CheckpointError: It cannot be read, or its weights are not finite.
        FeatureError: Features that are not finite.
        TransferabilityError: The cases allow no score.
    """
    started = time.monotonic()
    settings = settings or MetricSettings()

    def report(doing: str, share: float) -> None:
        if on_progress is not None:
            on_progress(entry.name, doing, share)

    report("loading", 0.0)
    candidate = build_candidate(entry.path, target.target)
    cases, predictions = _read(candidate, target, device=device, batch_size=batch_size, report=report)
    scores: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    details: CCFV | None = None
    zero_shot: dict[str, float | None] = {}
    for metric in metrics:
        report(f"computing {metric}", 1.0)
        scores[metric] = None
        if metric == "ccfv":
            details = ccfv(
                cases,
                normalise=settings.normalise,
                debias=settings.debias,
                project_to=settings.project_to,
                min_points=settings.min_points,
            )
            scores[metric] = details.score
        elif metric in ("leep", "zero-shot") and candidate.head is None:
            notes[metric] = "its outputs are regions, or it has no head"
        elif metric == "zero-shot":
            zero_shot = zero_shot_at_points(predictions, target.structures, candidate.description.outputs)
            known = [dice for dice in zero_shot.values() if dice is not None]
            scores[metric] = float(np.mean(known)) if known else None
            if not known:
                notes[metric] = "no structure of the target among its outputs"
        else:
            scores[metric] = float(METRICS[metric](cases, settings))
    draws = () if details is None else scores_of_draws(details, draw_cases(len(cases), n_resamples, seed))
    return CandidateScores(
        name=entry.name,
        path=str(entry.path),
        sha256=sha256,
        description=candidate.description.as_dict(),
        scores=scores,
        notes=notes,
        ccfv={} if details is None else details.as_dict(),
        draws=tuple(float(value) if np.isfinite(value) else None for value in draws),
        zero_shot=zero_shot,
        seconds=round(time.monotonic() - started, 2),
    )


def _read(
    candidate: CandidateNetwork,
    target: TargetCases,
    *,
    device: str | torch.device,
    batch_size: int,
    report: Callable[[str, float], None],
) -> tuple[list[CaseFeatures], list[PointPredictions]]:
    """Features of each case, and what the candidate's own head predicts at its points."""
    patch_size = candidate.fit_patch(target.target.patch_size)
    finest = decoder_stages(candidate.network)[0]
    cases, predictions = [], []
    n_cases = len(target.points)
    for index, points in enumerate(target.points):

        def window_done(done: int, n: int, *, index: int = index, case: str = points.case) -> None:
            report(f"case {index + 1} of {n_cases}, {case}", (index + done / n) / n_cases)

        case = target.load(points.case)
        features = extract_case(
            candidate.network,
            case.image,
            points,
            patch_size=patch_size,
            device=device,
            batch_size=batch_size,
            head=candidate.head,
            source=candidate.description.path,
            on_window=window_done,
        )
        cases.append(features if target.is_complete(points.case) else _without_background(features))
        if candidate.head is not None and features.probabilities is not None and candidate.head.layer == finest:
            # The points of the whole volume too: most of them are background, where false positives are.
            whole = candidate.head.probabilities(torch.from_numpy(features.variety[0])).numpy()
            predictions.append(
                PointPredictions(
                    labels=np.concatenate((points.labels, case.segmentation[tuple(points.whole.T)])),
                    outputs=np.concatenate((features.probabilities, whole)).argmax(1),
                    voxels=points.voxels,
                    annotated=target.annotated[points.case],
                )
            )
    return cases, predictions


def _without_background(features: CaseFeatures) -> CaseFeatures:
    """The same without the points of the background, which in a case that lacks annotations may be anything."""
    kept = features.labels != 0
    if not kept.any():
        return features
    return replace(
        features,
        labels=features.labels[kept],
        scales=tuple(scale[kept] for scale in features.scales),
        probabilities=None if features.probabilities is None else features.probabilities[kept],
    )
