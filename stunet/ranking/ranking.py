"""Which pre-trained checkpoint to fine-tune on a dataset: the target, the scores, the order."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from scipy.stats import rankdata

from stunet.errors import STUNetError, TransferabilityError, UsageError
from stunet.files import atomic_path, file_sha256, write_json
from stunet.planning import PreprocessedDataset, fit_strides, open_preprocessed
from stunet.ranking.candidates import build_candidate, name_checkpoints, read_zoo
from stunet.ranking.ccfv import Debias, Normalise, bootstrap_scores, ccfv
from stunet.ranking.points import CasePoints, draw_points, extract_case
from stunet.ranking.rivals import RIVALS, PointPredictions, zero_shot_at_points
from stunet.weights.convert import locate_checkpoint

METRICS = ("ccfv", *RIVALS, "zero-shot")
"""Names of all metrics."""

#: Share of resamples in which one checkpoint must be ahead of another to be called better.
_CONFIDENCE = 0.95
#: Below it a mean over cases, or over pairs of them, hangs on single cases.
_FEW_CASES = 5
_WHAT_RESAMPLES_SAY = (
    "Resampling shows how much the order depends on the choice of cases; it does not show which checkpoint is better "
    "after fine-tuning."
)
#: Grows with every change of what is computed.
_KEPT_FORMAT = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Cases of a target dataset, with the points at which every checkpoint is looked at.

    Attributes:
        dataset: The dataset. Images are read anew for each checkpoint: twenty CTs would not fit into memory.
        points: Points of each case, in order.
        digest: SHA-256 over all images and segmentations, and what is annotated.
    """

    dataset: PreprocessedDataset
    points: tuple[CasePoints, ...]
    digest: str

    @property
    def shared(self) -> dict[int, list[str]]:
        """For each structure in the points the cases that have it."""
        labels = sorted({label for drawn in self.points for label in drawn.voxels if label != 0})
        return {label: [drawn.case for drawn in self.points if label in drawn.voxels] for label in labels}

    def structure(self, label: int) -> str:
        """Return the name of a label value."""
        return self.dataset.structures.get(label, f"label {label}")


def prepare_target(
    dataset: PreprocessedDataset,
    cases: Sequence[str],
    *,
    per_class: int = 100,
    n_whole: int = 1000,
    seed: int = 0,
    on_progress: Callable[[float], Any] = lambda share: None,
) -> Target:
    """Read each case once and draw its points, as :func:`stunet.ranking.draw_points` does.

    Args:
        dataset: The target dataset.
        cases: Names of its cases.
        per_class: Voxels of each class in each case.
        n_whole: Voxels of the whole volume of each case.
        seed: For the points.
        on_progress: Called with the share of the cases that is done.

    Raises:
        DatasetError: A case cannot be read, or has no voxel to draw.
        TransferabilityError: No two cases that share a structure, so that nothing can be compared.
    """
    digest, points = hashlib.sha256(), []
    draw = partial(draw_points, per_class=per_class, n_whole=n_whole, seed=seed, ignore_label=dataset.ignore_label)
    for done, name in enumerate(cases, start=1):
        case = dataset.load(name)
        digest.update(f"{sorted(dataset.annotated(name))}".encode())
        for array in (case.image, case.segmentation):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        points.append(draw(case.segmentation, case=name))
        on_progress(done / len(cases))
    target = Target(dataset=dataset, points=tuple(points), digest=digest.hexdigest())
    if all(len(holders) < 2 for holders in target.shared.values()):
        found = "; ".join(f"{target.structure(k)} in {', '.join(names)}" for k, names in target.shared.items())
        raise TransferabilityError(f"no two of {len(cases)} cases share a structure ({found}): take more cases")
    return target


@dataclass(kw_only=True)
class CandidateScores:
    """What a ranking says about one checkpoint.

    Attributes:
        name: As tables call it.
        path: The checkpoint.
        error: Why it could not be scored; empty where it was.
        sha256: Of its content.
        description: What kind of network it is, see :class:`stunet.ranking.Candidate`.
        scores: By metric, higher is better; None where the metric says nothing about this checkpoint.
        notes: Why a score is missing, by metric.
        ccfv: What CC-FV is made of, see :meth:`stunet.ranking.CCFV.as_dict`; empty where it was not asked for.
        draws: CC-FV on resamples of the cases, the same ones for all checkpoints; None where a resample has no pair.
        zero_shot: Estimated Dice by structure of what the checkpoint predicts as it is.
        seconds: That scoring took; 0 where the result was there already.
    """

    name: str
    path: str
    error: str = ""
    sha256: str = ""
    description: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    ccfv: dict[str, Any] = field(default_factory=dict)
    draws: tuple[float | None, ...] = ()
    zero_shot: dict[str, float | None] = field(default_factory=dict)
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
    name: str,
    path: str | os.PathLike[str],
    target: Target,
    *,
    metrics: Sequence[str] = ("ccfv",),
    normalise: Normalise = "both",
    debias: Debias = "null",
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    n_resamples: int = 1000,
    seed: int = 0,
    trust: Sequence[str] = (),
    on_progress: Callable[[str, float], Any] = lambda doing, share: None,
) -> CandidateScores:
    """Load a checkpoint, read its features of the target's cases, and score them.

    The arguments are those of :func:`rank`. ``on_progress`` is called with what is being done, and the share of the
    target's cases that has been read.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the target.
        FeatureError: Features that are not finite.
        TransferabilityError: The cases allow no score.
    """
    started = time.monotonic()
    on_progress("loading", 0.0)
    candidate = build_candidate(path, **_network_options(target.dataset), trust=trust)
    head, cases, predictions = candidate.head, [], []
    n_cases = len(target.points)
    for index, points in enumerate(target.points):
        case, annotated = target.dataset.load(points.case), target.dataset.annotated(points.case)

        def report(share: float, *, index: int = index, name: str = points.case) -> None:
            on_progress(f"case {index + 1} of {n_cases}, {name}", (index + share) / n_cases)

        features = extract_case(
            candidate.network,
            case.image,
            points,
            patch_size=candidate.patch_size,
            device=device,
            batch_size=batch_size,
            head=head,
            source=str(path),
            on_window=report,
        )
        probabilities = features.probabilities
        if head is not None and probabilities is not None:
            # The points of the whole volume too: most of them are background, where false positives are.
            whole = head.probabilities(torch.from_numpy(features.variety[0])).numpy()
            labels = np.concatenate((points.labels, case.segmentation[tuple(points.whole.T)]))
            outputs = np.concatenate((probabilities, whole)).argmax(1)
            predictions.append(PointPredictions(labels, outputs, points.voxels, annotated))
        if not annotated >= set(target.dataset.structures) and (kept := features.labels != 0).any():
            # Background that is not known to be background.
            scales = tuple(scale[kept] for scale in features.scales)
            rest = None if probabilities is None else probabilities[kept]
            features = replace(features, labels=features.labels[kept], scales=scales, probabilities=rest)
        cases.append(features)
    result = CandidateScores(name=name, path=str(path), description=candidate.description)
    result.scores = dict.fromkeys(metrics)
    for metric in metrics:
        on_progress(f"computing {metric}", 1.0)
        if metric == "ccfv":
            details = ccfv(cases, normalise=normalise, debias=debias)
            result.scores[metric], result.ccfv = details.score, details.as_dict()
            draws = bootstrap_scores(details, n_resamples=n_resamples, seed=seed).tolist()
            result.draws = tuple(value if np.isfinite(value) else None for value in draws)
        elif metric in ("leep", "zero-shot") and head is None:
            result.notes[metric] = "its outputs are regions, or it has no head"
        elif metric == "zero-shot":
            names = candidate.description["outputs"]
            result.zero_shot = zero_shot_at_points(predictions, target.dataset.structures, names)
            if known := [dice for dice in result.zero_shot.values() if dice is not None]:
                result.scores[metric] = float(np.mean(known))
            else:
                result.notes[metric] = "no structure of the target among its outputs"
        else:
            result.scores[metric] = RIVALS[metric](cases)
    result.seconds = round(time.monotonic() - started, 2)
    return result


def _network_options(dataset: PreprocessedDataset) -> dict[str, Any]:
    """What the target's plans say about the networks that shall read its images."""
    configuration = dataset.configuration
    strides = fit_strides(configuration["architecture"]["arch_kwargs"]["strides"])
    return {"input_channels": dataset.input_channels, "patch_size": configuration["patch_size"], "strides": strides}


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A table of checkpoints, best first by the first metric that was asked for.

    Attributes:
        rows: Checkpoints with a score by that metric first, then the others.
        failures: Those that could not be scored.
        metrics: Names of the metrics, in the order asked for.
        target: The target's cases and points.
        about: What the target is: ``dataset``, ``configuration`` and ``plans``.
        settings: All options by name.
        date: In UTC.
    """

    rows: tuple[CandidateScores, ...]
    failures: tuple[CandidateScores, ...] = ()
    metrics: tuple[str, ...]
    target: Target
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    date: str

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.metrics[0]

    @property
    def best(self) -> CandidateScores | None:
        """The first checkpoint; None where none has a score by the metric that ranks."""
        return next((row for row in self.rows if row.scores.get(self.metric) is not None), None)

    @property
    def preferred(self) -> dict[str, CandidateScores]:
        """The checkpoint with the highest score, by metric; of metrics that score two checkpoints at least."""
        scored = {m: [row for row in self.rows if row.scores.get(m) is not None] for m in self.metrics}
        return {m: max(rows, key=lambda row: row.scores[m] or 0.0) for m, rows in scored.items() if len(rows) > 1}

    @property
    def mean_ranks(self) -> tuple[float, ...]:
        """Mean rank of each checkpoint over the metrics that score all of them; empty with fewer than two of these."""
        columns = [[row.scores.get(metric) for row in self.rows] for metric in self.metrics]
        ranks = [rankdata([-score for score in c if score is not None]) for c in columns if c and None not in c]
        return tuple(np.mean(ranks, axis=0).tolist()) if len(ranks) > 1 else ()

    @property
    def consensus(self) -> CandidateScores | None:
        """The checkpoint with the lowest mean rank, the first of equal ones; None where there is no mean rank."""
        ranks = self.mean_ranks
        return self.rows[min(range(len(ranks)), key=ranks.__getitem__)] if ranks else None

    def ahead(self, better: CandidateScores, worse: CandidateScores) -> float | None:
        """Return the share of the resamples of the cases in which one checkpoint's CC-FV is above another's."""
        pairs = [(a, b) for a, b in zip(better.draws, worse.draws, strict=False) if a is not None and b is not None]
        return sum(a > b for a, b in pairs) / len(pairs) if pairs else None

    @property
    def tied(self) -> tuple[CandidateScores, ...]:
        """Checkpoints that the cases cannot tell from the first: it is ahead in fewer than 95 % of their resamples."""
        if self.metric != "ccfv" or self.best is None:
            return ()
        shares = ((row, self.ahead(self.best, row)) for row in self.rows if row is not self.best)
        return tuple(row for row, share in shares if share is not None and share < _CONFIDENCE)

    @property
    def verdict(self) -> str:
        """The outcome in a few sentences: who comes first, which metrics disagree, what the cases can tell apart."""
        if not self.rows:
            return "None of the candidates could be scored."
        if self.best is None:
            return f"No candidate has a score by {self.metric}."
        if len(self.rows) == 1:
            return f"{self.best.name} is the only candidate with a score."
        first, consensus, mean_ranks = self.best, self.consensus, self.mean_ranks
        preferences: dict[str, list[str]] = {}
        for metric, row in self.preferred.items():
            preferences.setdefault(row.name, []).append(metric)
        said = [f"{first.name} comes first by {_listed(preferences.get(first.name, [self.metric]))}."]
        if len(preferences) > 1:
            prefer = [f"{_listed(names)} prefer{'s' * (len(names) == 1)} {name}" for name, names in preferences.items()]
            said = [f"The metrics disagree: {'; '.join(prefer)}."]
            if consensus is not None:
                beside = "" if consensus is first else f", {first.name} has {mean_ranks[0]:.1f}"
                said.append(f"The lowest mean rank has {consensus.name}: {min(mean_ranks):.1f}{beside}.")
            said.append("Fine-tune those that a metric prefers for a short time, and compare.")
        if self.metric == "ccfv" and first.draws:
            certain = f"By ccfv {first.name} is ahead of every other candidate in at least 95 %"
            if tied := _listed([row.name for row in self.tied]):
                certain = f"ccfv cannot tell {first.name} from {tied}: it is ahead in fewer than 95 %"
            said.append(f"{certain} of the resamples of these {len(self.target.points)} cases. {_WHAT_RESAMPLES_SAY}")
        return " ".join(said)

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before trusting the ranking: too few cases, or too few points of a structure."""
        points, said = self.target.points, list[str]()
        if (n := len(points)) < _FEW_CASES:
            said = [f"Only {n} cases: scores and intervals of fewer than {_FEW_CASES} say little. Take more cases."]
        for label, cases in self.target.shared.items():
            if few := [drawn.voxels[label] for drawn in points if label in drawn.fewer]:
                short = f"{len(few)} of {len(cases)} cases have fewer than {points[0].per_class} voxels of it"
                said.append(f"{self.target.structure(label)}: {short}, the fewest {min(few)}")
        return said

    @property
    def commands(self) -> list[str]:
        """How to fine-tune the first checkpoint, and the one of the lowest mean rank, where these are STU-Nets."""
        commands = []
        for row in {row.name: row for row in (*self.rows[:1], self.consensus) if row is not None}.values():
            if str(row.description["network"]).startswith("STU-Net"):  # another network needs its own plans
                number, fold, plans = int(self.about["dataset"][7:10]), self.settings["fold"], self.about["plans"]
                command = ["stunet", "finetune", "-d", str(number), "-c", self.about["configuration"]]
                command += ["-f", fold] if fold != "all" else []  # whose validation cases the ranking has not seen
                command += ["--from", row.path, *(["-p", plans] if plans != "nnUNetPlans" else [])]
                commands.append(shlex.join(command))
        return commands

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV: rank, name, a column for each metric, mean rank, interval of CC-FV, checkpoint."""
        heads = ["rank", "name", *self.metrics, "mean_rank", "ccfv_low", "ccfv_high", "parameters", "path", "sha256"]
        mean_ranks = self.mean_ranks or [None] * len(self.rows)
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(heads)
            for place, (row, mean) in enumerate(zip(self.rows, mean_ranks, strict=True), start=1):
                scores, size = [row.scores.get(metric) for metric in self.metrics], row.description["parameters"]
                interval = row.interval or (None, None)
                writer.writerow([place, row.name, *scores, mean, *interval, size, row.path, row.sha256])


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])


def rank(
    checkpoints: Path | str | Sequence[Path | str] | Mapping[str, Path | str],
    dataset: int | str | PreprocessedDataset,
    *,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    fold: str = "all",
    metrics: Sequence[str] = ("ccfv", "logme", "transrate", "leep", "gbc", "zero-shot"),
    n_cases: int = 20,
    per_class: int = 100,
    n_whole: int = 1000,
    normalise: Normalise = "both",
    debias: Debias = "null",
    device: str | torch.device = "auto",
    batch_size: int = 2,
    n_resamples: int = 1000,
    seed: int = 0,
    trust: Sequence[str] = (),
    keep_in: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str, float], Any] = lambda doing, share: None,
    on_candidate: Callable[[CandidateScores], Any] = lambda scores: None,
) -> Ranking:
    """Rank checkpoints by how well they will transfer to a dataset, without fine-tuning any of them.

    Each is scored by its features at the same voxels of a few labelled cases. One that fails is reported, and the
    others are ranked.

    >>> ranking = rank(["early.pth", "late.pth"], dataset=4, metrics=["ccfv"], n_cases=4)
    >>> [row.name for row in ranking.rows]
    ['late', 'early']
    >>> ranking.best.name, ranking.best.scores["ccfv"] > ranking.rows[1].scores["ccfv"]
    ('late', True)
    >>> ranking.to_csv("ranking.csv")

    Args:
        checkpoints: Checkpoints, model folders or names of published weights that were fetched; or these by the names
            that the table shall have; or a zoo file, see :func:`stunet.ranking.read_zoo`.
        dataset: The target: id or name of a preprocessed dataset, or one that is open.
        configuration: Configuration of the target's plans.
        plans: Identifier of the plans that the target is preprocessed with.
        fold: Take only cases that this fold trains on; ``all`` takes all.
        metrics: Names out of :data:`METRICS`; the first one ranks.
        n_cases: Cases to look at, drawn by seed.
        per_class: Voxels of each structure in a case.
        n_whole: Voxels of the whole volume of a case.
        normalise: Which terms of CC-FV see features of unit length, see :func:`stunet.ranking.ccfv.ccfv`.
        debias: What is done about the noise of small samples, likewise.
        device: For the networks; ``auto`` takes CUDA where there is a GPU.
        batch_size: Windows at once.
        n_resamples: Bootstrap resamples of the cases.
        seed: Of cases, points and resamples.
        trust: Network classes of others' that plans in checkpoints may name.
        keep_in: Folder where results are kept and looked up, by the content of checkpoint and cases and all settings,
            so that an interrupted ranking can be resumed. What cannot be used there is computed again and replaced.
        on_progress: Called with what is being done, and the share of all that is done.
        on_candidate: Called with each result.

    Raises:
        DatasetError: The dataset is unknown or not preprocessed, or a case cannot be read.
        TransferabilityError: No two cases share a structure.
        UsageError: Unknown metrics, or checkpoints that are not there.
    """
    if not metrics or len({*metrics} & {*METRICS}) < len(metrics):
        raise UsageError(f"metrics {', '.join(metrics) or 'none'}: give some of {', '.join(METRICS)}, each once")
    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = read_zoo(checkpoints)
    named = checkpoints if isinstance(checkpoints, Mapping) else name_checkpoints(checkpoints)
    if not isinstance(dataset, PreprocessedDataset):
        dataset = open_preprocessed(str(dataset), plans, configuration)
    else:
        plans = str(dataset.plans.get("plans_name", plans))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = dataset.choose(dataset.training_cases(fold), n_cases, seed)
    read, total = 0.2, 0.2 + len(named)  # reading the cases takes little of the time that a checkpoint takes
    prepare = partial(prepare_target, dataset, cases, per_class=per_class, n_whole=n_whole, seed=seed)
    target = prepare(on_progress=lambda share: on_progress("reading cases", read * share / total))
    what = [_KEPT_FORMAT, target.digest, sorted(metrics), normalise, debias, n_resamples, seed, per_class, n_whole]
    what += [dataset.ignore_label, dataset.structures, _network_options(dataset)]
    score = partial(score_candidate, target=target, metrics=metrics, normalise=normalise, debias=debias, seed=seed)
    score = partial(score, device=device, batch_size=batch_size, n_resamples=n_resamples, trust=trust)
    results = []
    for done, (name, path) in enumerate(named.items()):

        def report(doing: str, share: float, *, name: str = name, done: int = done) -> None:
            on_progress(f"{doing}: {name}", (read + done + 0.95 * share) / total)

        try:
            checkpoint = locate_checkpoint(path)
            sha256 = file_sha256(checkpoint)
            digest = hashlib.sha256(json.dumps([sha256, *what]).encode()).hexdigest()
            file = None if keep_in is None else Path(keep_in) / f"{digest[:32]}.json"
            result = _kept(file)
            if result is None:
                result = score(name, path, on_progress=report)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(asdict(result), file)
            result.name, result.path, result.sha256 = name, str(path), sha256
            result.description["path"] = str(checkpoint)
        except STUNetError as error:
            result = CandidateScores(name=name, path=str(path), error=str(error))
        results.append(result)
        on_progress(name, (read + done + 1) / total)
        on_candidate(result)

    settings = {"fold": fold, "cases": len(cases), "points of each structure": per_class}
    settings |= {"points of the whole volume": n_whole, "normalize": normalise, "debias": debias}
    settings |= {"resamples": n_resamples, "seed": seed, "device": str(device)}
    scored = [(result.scores.get(metrics[0]), result) for result in results if not result.error]
    scored.sort(key=lambda pair: (pair[0] is None, -(pair[0] or 0.0)))
    return Ranking(
        rows=tuple(result for _, result in scored),
        failures=tuple(result for result in results if result.error),
        metrics=tuple(metrics),
        target=target,
        about={"dataset": dataset.name, "configuration": dataset.configuration_name, "plans": plans},
        settings=settings,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _kept(file: Path | None) -> CandidateScores | None:
    """Read a result that was kept; None where there is none, or somebody has damaged it."""
    with suppress(OSError, ValueError):
        if file is not None:
            return replace(msgspec.json.decode(file.read_bytes(), type=CandidateScores), seconds=0.0)
    return None
