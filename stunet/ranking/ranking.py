"""Which pre-trained checkpoint to fine-tune on a dataset: the target, the candidates, their scores, the order."""

import csv
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from stunet.datasets.raw import has_annotations, read_annotations
from stunet.environment import did_you_mean
from stunet.errors import CheckpointError, STUNetError, TransferabilityError, UsageError, reading
from stunet.files import Name, atomic_path, decode, file_sha256, read_document, write_json
from stunet.network import build_stunet
from stunet.planning.plans import fit_strides
from stunet.planning.preprocessed import PreprocessedDataset, open_preprocessed
from stunet.ranking.agreement import RANKING_FORMAT
from stunet.ranking.ccfv import VARIANTS, Debias, Normalise, bootstrap_scores, ccfv, ccfv_variants
from stunet.ranking.points import CaseFeatures, CasePoints, Part, SourceHead, draw_points, extract_case
from stunet.ranking.rivals import RIVALS, PointPredictions, fuse_topote, zero_shot_at_points
from stunet.weights.convert import UNetWeights, locate_checkpoint, open_any_weights, trained_parts
from stunet.weights.published import cached_weights, load_registry
from stunet.weights.transfer import HEADS, adapt_stem, source_outputs

METRICS = ("ccfv", *RIVALS, "topote", "zero-shot", *VARIANTS)
"""Names of all metrics."""
DEFAULT_METRICS = ("logme", "ccfv", "transrate", "leep", "gbc", "zero-shot")
"""No score has earned its place; the first was among the better ones in two measurements (docs/transferability.md)."""


class Measured(NamedTuple):
    """What a score was worth in the study of the documentation: means over its targets."""

    tau: float  # weighted, with the Dice after fine-tuning
    low: float  # ends of its 95 % interval
    high: float
    regret: float
    by_chance: float  # regret of a checkpoint taken at random, of those that have the score


MEASURED: Mapping[str, Measured] = {
    "ccfv": Measured(0.01, -0.39, 0.43, 0.045, 0.056),
    "logme": Measured(0.11, -0.22, 0.48, 0.036, 0.056),
    "transrate": Measured(0.10, -0.27, 0.46, 0.053, 0.056),
    "leep": Measured(0.06, -0.44, 0.58, 0.035, 0.045),
    "gbc": Measured(-0.10, -0.42, 0.28, 0.067, 0.056),
    "linear-probe": Measured(-0.06, -0.39, 0.40, 0.061, 0.056),
    "topote": Measured(0.20, -0.18, 0.54, 0.032, 0.056),
    "topote-global": Measured(0.19, -0.17, 0.49, 0.032, 0.056),
    "topote-local": Measured(0.06, -0.30, 0.43, 0.079, 0.056),
    "dropout": Measured(-0.19, -0.66, 0.38, 0.061, 0.045),
    "the Dice with other seeds": Measured(0.36, -0.02, 0.66, 0.029, 0.071),
}
"""By score, and last of the Dice of other trainings as if it were a score (docs/studies/five_datasets.md)."""

#: What ``topote`` is fused from.
_TERMS = ("topote-global", "topote-local")
#: Of what a checkpoint predicts itself.
_OF_OUTPUTS = ("leep", "dropout", "zero-shot")
#: Share of resamples in which one checkpoint must be ahead of another to be called better.
_CONFIDENCE = 0.95
#: Below it a mean over cases, or over pairs of them, hangs on single cases.
_FEW_CASES = 5
#: Grows with every change of what is computed, or of how results are kept.
_KEPT_FORMAT = 6


# The target -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Cases of a target dataset, with the points at which every checkpoint is looked at."""

    dataset: PreprocessedDataset  # images are read anew for each checkpoint: twenty CTs would not fit into memory
    points: tuple[CasePoints, ...]  # of each case, in order
    digest: str  # SHA-256 over all images and segmentations, and what is annotated

    @property
    def voxels(self) -> dict[int, dict[str, int]]:
        """For each structure in the points how many voxels it has in each case that has it."""
        labels = sorted({label for drawn in self.points for label in drawn.voxels if label != 0})
        return {k: {drawn.case: drawn.voxels[k] for drawn in self.points if k in drawn.voxels} for k in labels}

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
    """Read each case of a dataset once and draw its points, as :func:`stunet.ranking.points.draw_points` does.

    ``on_progress`` is called with the share of the cases that is done.

    Raises:
        DatasetError: A case cannot be read, or has no voxel to draw.
        TransferabilityError: No two cases that share a structure, so that nothing can be compared.
    """
    if has_annotations(dataset.name):
        read_annotations(dataset.name, dataset.dataset_json)  # brings them here, as nnU-Net's preprocessing does not
    digest, points = hashlib.sha256(), []
    draw = partial(draw_points, per_class=per_class, n_whole=n_whole, seed=seed, ignore_label=dataset.ignore_label)
    for done, name in enumerate(cases, start=1):
        case, annotated = dataset.load(name), dataset.annotated(name)
        digest.update(f"{sorted(annotated)}".encode())
        for array in (case.image, case.segmentation):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        points.append(draw(case.segmentation, case=name, annotated=annotated))
        on_progress(done / len(cases))
    target = Target(dataset=dataset, points=tuple(points), digest=digest.hexdigest())
    if all(len(holders) < 2 for holders in target.voxels.values()):
        found = "; ".join(f"{target.structure(k)} in {', '.join(names)}" for k, names in target.voxels.items())
        raise TransferabilityError(f"no two of {len(cases)} cases share a structure ({found}): take more cases")
    return target


# The checkpoints to choose from ---------------------------------------------------------------------------------------


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    path: Name
    name: Annotated[str, msgspec.Meta(pattern=r"\S")] | None = None


class _Zoo(msgspec.Struct, forbid_unknown_fields=True):
    checkpoints: Annotated[list[_Entry], msgspec.Meta(min_length=1)]


def read_zoo(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Read a zoo file, and return paths by name, in its order.

    It is YAML (or JSON) with a list under ``checkpoints``; each entry has a ``path``, relative to the file, and may
    have a ``name``::

        checkpoints:
          - name: base, TotalSegmentator
            path: models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all/checkpoint_final.pth
          - path: other/checkpoint_best.pth

    Raises:
        UsageError: Missing, not YAML, unknown keys, a name twice or blank, or paths at which there is nothing.
    """
    with reading(path, "a zoo file that cannot be used", UsageError, remedy="correct it"):
        entries = decode(read_document(path), _Zoo).checkpoints
    defaults = name_checkpoints([Path(path).parent / Path(entry.path).expanduser() for entry in entries])
    names = [entry.name or default for entry, default in zip(entries, defaults, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path} names {', '.join(twice)} twice: give each checkpoint a name of its own")
    return dict(zip(names, defaults.values(), strict=True))


def find_checkpoints(checkpoints: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Find checkpoint files, model folders, and published weights by name, which must have been fetched.

    Raises:
        CheckpointError: Published weights that were not fetched.
        UsageError: There is nothing.
    """
    paths = []
    for path in map(Path, checkpoints):
        if not path.exists() and str(path) not in (known := load_registry()):
            meant = did_you_mean(str(path), known)
            raise UsageError(f"nothing at {path}: {meant}`stunet weights list` names what is published")
        paths.append(path if path.exists() else cached_weights(str(path)))
    return paths


def name_checkpoints(checkpoints: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return what :func:`find_checkpoints` finds by short names that tell them apart: what differs in their paths.

    Raises:
        UsageError: A path twice.
    """
    paths = [path.resolve() for path in find_checkpoints(checkpoints)]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise UsageError(f"checkpoint {', '.join(twice)} is given twice: leave one out")
    # Of each path the last parts that tell it apart, without parts that all of them have.
    parts = [[*path.parts[1:-1], path.stem if path.is_file() else path.name] for path in paths]
    common = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    parts = [[part for part in own if part not in common] or own for own in parts]
    for n in range(1, max(map(len, parts), default=0) + 1):
        named = {"/".join(own[-n:]): path for own, path in zip(parts, paths, strict=True)}
        if len(named) == len(paths):
            return named
    return {str(path): path for path in paths}  # they differ in their suffix alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A checkpoint as a network that features of a target's images can be read from."""

    network: nn.Module  # in evaluation mode, on the CPU; its own heads are 0 and say nothing
    head: SourceHead | None  # its finest head; None where its outputs are regions, which do not exclude each other
    # the smallest patch that it takes and that is no smaller than the target's: a STU-Net takes the target's own, one
    # of nnU-Net's networks has the strides that it was trained with
    patch_size: tuple[int, ...]
    part: Part  # whose features are read: the decoder's, unless it was not trained
    description: dict[str, Any]  # for JSON


def build_candidate(
    path: str | os.PathLike[str],
    *,
    input_channels: int,
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    trust: Sequence[str] = (),
) -> Candidate:
    """Build the network that a checkpoint belongs to, for a target's images, and load it.

    A STU-Net of whatever size gets the target's strides, on which its weights do not depend. One of nnU-Net's networks
    keeps its own: its transposed convolutions have their shape. All parameters but those of the heads are taken; the
    stem is adapted where the target has other channels.

    Args:
        path: As for :func:`stunet.weights.convert.open_any_weights`.
        input_channels: Channels of the target's images.
        patch_size: Voxels of the target's patch; two axes in a 2D configuration.
        strides: Stride of each of STU-Net's six stages for each axis, see :func:`stunet.planning.plans.fit_strides`.
        trust: Classes that the plans of checkpoints may name.

    Raises:
        CheckpointError: The file cannot be read, its weights are not finite, or have another number of axes.
    """
    weights = open_any_weights(path, trust)
    architecture, n_axes = weights.architecture, weights.architecture.n_axes
    if n_axes != len(patch_size):
        got = f"{weights.path} holds {n_axes}D weights for {len(patch_size)}D patches"
        raise CheckpointError(f"{got}: choose a {n_axes}D configuration of the target, or leave this checkpoint out")
    # One output, which nobody looks at: a map of logits for a hundred classes would take more than the features.
    with torch.device("meta"):  # initialisation would take long
        if isinstance(weights, UNetWeights):
            name, network = weights.architecture.name, weights.architecture.build(input_channels, 1)
        else:
            name, conv_op = f"STU-Net {weights.architecture.size.name}", nn.Conv3d if n_axes == 3 else nn.Conv2d
            network = build_stunet(weights.architecture.size, input_channels, 1, strides, conv_op=conv_op)
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, parameter in network.state_dict(keep_vars=True).items():
            if key.startswith(HEADS) or key not in weights.tensors:  # or of a decoder that is not read
                parameter.zero_()
            elif weights.tensors[key].shape != parameter.shape:  # the stem
                parameter.copy_(adapt_stem(weights.tensors[key], parameter, "repeat-scaled"))
            else:
                parameter.copy_(weights.tensors[key])
    stride = np.prod(network.encoder.strides, axis=0)  # type: ignore[union-attr, arg-type]
    fitted = np.ceil(np.array(patch_size) / stride).astype(int) * stride
    if (fitted == stride).all():  # norms need more than one voxel at the coarsest stage
        fitted[0] *= 2
    origin = source_outputs(weights)
    size = None if isinstance(weights, UNetWeights) else weights.architecture.size
    exclusive = origin is None or origin.exclusive  # nnU-Net's own way, where nothing speaks against it
    return Candidate(
        network=network,
        head=finest_head(weights.tensors) if exclusive and weights.pretext is None else None,
        patch_size=tuple(fitted.tolist()),
        part="decoder" if "decoder" in weights.trained else "encoder",
        description={
            "path": str(weights.path),
            "network": name,
            "size": size and {"depth": list(size.depth), "width": size.width},
            "parameters": sum(p.numel() for name, p in network.named_parameters() if not name.startswith(HEADS)),
            "n_axes": n_axes,
            "source_channels": architecture.input_channels,
            "input_channels": input_channels,
            "stem": "repeat-scaled" if architecture.input_channels != input_channels else "",
            "n_outputs": architecture.num_classes,
            "outputs": None if origin is None else origin.names,
            "exclusive": exclusive,
            "epoch": weights.epoch,
            "pretext": weights.pretext,
        },
    )


def finest_head(tensors: Mapping[str, Tensor]) -> SourceHead:
    """Return the last of the decoder's heads, which STU-Net and nnU-Net's networks order from coarse to fine."""
    level = max(int(key.split(".")[2]) for key in tensors if key.startswith(HEADS))
    weight, bias = (tensors[f"{HEADS}{level}.{kind}"].detach().float() for kind in ("weight", "bias"))
    return SourceHead(weight.flatten(1), bias)


# Their scores ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CandidateScores:
    """What a ranking says about one checkpoint."""

    name: str  # as tables call it
    path: str  # the checkpoint
    error: str = ""  # why it could not be scored; empty where it was
    sha256: str = ""  # of its content
    identity: str = ""  # digest of all that the scores depend on: checkpoint, target and settings
    description: dict[str, Any] = field(default_factory=dict)  # what kind of network it is, as of Candidate
    scores: dict[str, float | None] = field(default_factory=dict)  # by metric, higher is better; None where it has none
    notes: dict[str, str] = field(default_factory=dict)  # why a score is missing, by metric
    ccfv: dict[str, Any] = field(default_factory=dict)  # what CC-FV is made of; empty where it was not asked for
    draws: tuple[float | None, ...] = ()  # CC-FV on resamples of the cases, the same for all; None without any pair
    zero_shot: dict[str, float | None] = field(default_factory=dict)  # estimated Dice of its own predictions
    seconds: float = 0.0  # that scoring took; 0 where the result was there already

    @property
    def is_stunet(self) -> bool:
        """Whether it can be fine-tuned here."""
        return str(self.description["network"]).startswith("STU-Net")

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
    part: Part | None = None,
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

    The features are those of the stages of a ``part`` of the network: by default of the decoder, unless it was not
    trained; what the checkpoint predicts itself comes from its decoder. The other arguments are those of :func:`rank`.
    ``on_progress`` is called with what is being done, and the share of the target's cases that has been read.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the target.
        FeatureError: No features can be read.
        TransferabilityError: Features that are not finite, or cases that allow no score.
    """
    started = time.monotonic()
    on_progress("loading", 0.0)
    dataset, configuration, n_cases = target.dataset, target.dataset.configuration, len(target.points)
    channels, strides = dataset.input_channels, fit_strides(configuration["architecture"]["arch_kwargs"]["strides"])
    patch_size = configuration["patch_size"]
    candidate = build_candidate(path, input_channels=channels, patch_size=patch_size, strides=strides, trust=trust)
    part = part or candidate.part
    head = candidate.head if part == "decoder" or {*metrics} & {*_OF_OUTPUTS} else None
    found: dict[Part, list[CaseFeatures]] = {part: [], **({} if head is None else {"decoder": []})}
    read = partial(extract_case, patch_size=candidate.patch_size, device=device, batch_size=batch_size)
    predictions = []
    for done, points in enumerate(target.points):
        image, annotated = dataset.load(points.case).image, points.annotated
        for number, each in enumerate(found):

            def report(share: float, done: float = done + number / len(found), case: str = points.case) -> None:
                on_progress(f"case {int(done) + 1} of {n_cases}, {case}", (done + share / len(found)) / n_cases)

            own = head if each == "decoder" else None
            features = read(candidate.network, image, points, part=each, head=own, on_window=report)
            if own is not None and features.probabilities is not None:
                # The points of the whole volume too: most of them are background, where false positives are.
                whole = own.probabilities(torch.from_numpy(features.variety[0])).numpy()
                labels = np.concatenate((points.labels, points.whole_labels))
                outputs = np.concatenate((features.probabilities, whole)).argmax(1)
                predictions.append(PointPredictions(labels, outputs, points.voxels, annotated))
            if not annotated >= set(dataset.structures) and (features.labels != 0).any():
                features = _without_background(features, points)  # it is not known to be background
            found[each].append(features)
    cases = found[part]
    result = CandidateScores(name=name, path=str(path), description=candidate.description)
    result.scores, variants = dict.fromkeys(metrics), dict[str, float]()
    for metric in metrics:
        on_progress(f"computing {metric}", 1.0)
        if metric == "ccfv":
            details = ccfv(cases, normalise=normalise, debias=debias)
            result.scores[metric], result.ccfv = details.score, details.as_dict()
            draws = bootstrap_scores(details, n_resamples=n_resamples, seed=seed).tolist()
            result.draws = tuple(value if np.isfinite(value) else None for value in draws)
        elif metric in VARIANTS:
            variants = variants or ccfv_variants(cases)
            result.scores[metric] = variants.get(metric)  # its network may have fewer scales
        elif metric == "topote":  # which rank() fuses from these, for it takes all candidates
            result.scores |= {term: RIVALS[term](cases) for term in _TERMS if result.scores.get(term) is None}
        elif metric in _OF_OUTPUTS and head is None:
            result.notes[metric] = "its outputs are regions, or no labels have trained it"
        elif metric == "zero-shot":
            result.zero_shot = zero_shot_at_points(predictions, dataset.structures, candidate.description["outputs"])
            if known := [dice for dice in result.zero_shot.values() if dice is not None]:
                result.scores[metric] = float(np.mean(known))
            else:
                result.notes[metric] = "no structure of the target among its outputs"
        else:
            result.scores[metric] = RIVALS[metric](found["decoder"] if metric in _OF_OUTPUTS else cases)
    result.seconds = round(time.monotonic() - started, 2)
    return result


def _without_background(features: CaseFeatures, points: CasePoints) -> CaseFeatures:
    kept = features.labels != 0
    points = replace(points, balanced=points.balanced[kept], labels=points.labels[kept])
    scales = tuple(scale[kept] for scale in features.scales)
    rest = None if features.probabilities is None else features.probabilities[kept]
    return replace(features, labels=points.labels, scales=scales, probabilities=rest, points=points)


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A table of checkpoints, best first by the first metric that was asked for."""

    rows: tuple[CandidateScores, ...]  # checkpoints with a score by that metric first, then the others
    failures: tuple[CandidateScores, ...] = ()  # those that could not be scored
    metrics: tuple[str, ...]  # in the order asked for
    target: Target  # its cases and points
    about: Mapping[str, str]  # what the target is: dataset, configuration and plans
    settings: Mapping[str, Any]  # all options by name
    date: str  # in UTC

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what computes."""
        return {name: version(name) for name in ("stunet", "nnunetv2", "torch", "numpy", "scipy")}

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
            said.append(f"{certain} of the resamples of these {len(self.target.points)} cases.")
            said.append("Resampling shows how much the order depends on the choice of cases;")
            said.append("it does not show which checkpoint is better after fine-tuning.")
        return " ".join(said)

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before trusting the ranking: too few cases, or too few points of a structure."""
        points, said = self.target.points, list[str]()
        if (n := len(points)) < _FEW_CASES:
            said = [f"Only {n} cases: scores and intervals of fewer than {_FEW_CASES} say little. Take more cases."]
        for label, counts in self.target.voxels.items():
            if few := [count for count in counts.values() if count < points[0].per_class]:
                short = f"{len(few)} of {len(counts)} cases have fewer than {points[0].per_class} voxels of it"
                said.append(f"{self.target.structure(label)}: {short}, the fewest {min(few)}")
        return said

    @property
    def commands(self) -> list[str]:
        """How to fine-tune the first checkpoint, and the one of the lowest mean rank, where these are STU-Nets."""
        commands = []
        for row in {row.name: row for row in (*self.rows[:1], self.consensus) if row is not None}.values():
            if row.is_stunet:  # another network needs its own plans
                number, fold, plans = int(self.about["dataset"][7:10]), self.settings["fold"], self.about["plans"]
                command = ["stunet", "finetune", "-d", str(number), "-c", self.about["configuration"]]
                command += ["-f", fold] if fold != "all" else []  # whose validation cases the ranking has not seen
                command += ["--from", row.path, *(["-p", plans] if plans != "nnUNetPlans" else [])]
                commands.append(shlex.join(command))
        return commands

    @property
    def study(self) -> dict[str, Any] | None:
        """A study of the first three STU-Nets and training from scratch, for 100 epochs each, as ``study.yaml`` has it.

        From scratch it trains a network of the first one's size. None where there are fewer than two of them, or too
        few cases.
        """
        first = [{"name": row.name, "path": str(Path(row.path).absolute())} for row in self.rows if row.is_stunet][:3]
        n_test = (n_cases := len(self.target.dataset.cases)) // 3
        if len(first) < 2 or n_test == 0:
            return None
        target = {**self.about, "cases": [n_cases - n_test], "test": n_test}
        size = next(row.description["size"] for row in self.rows if row.is_stunet)
        candidates = [*first, {"name": "scratch", **size}]
        return {"targets": [target], "candidates": candidates, "settings": {"num_epochs": 100}, "metrics": []}

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``ranking.json``."""
        target, consensus, candidates = self.target, self.consensus, []
        kept = ("name", "path", "sha256", "scores", "mean_rank", "interval", "first_is_ahead", "network", "ccfv")
        for row, mean_rank in zip(self.rows, self.mean_ranks or [None] * len(self.rows), strict=True):
            ahead = None if row is self.rows[0] else self.ahead(self.rows[0], row)
            more = {"mean_rank": mean_rank, "interval": row.interval, "first_is_ahead": ahead}
            content = {**vars(row), **more, "network": row.description}
            candidates.append({key: content[key] for key in (*kept, "zero_shot", "notes", "seconds")})
        return {
            "format": RANKING_FORMAT,
            "date": self.date,
            "versions": self.versions,
            "target": {
                **self.about,
                "cases": [points.as_dict() for points in target.points],
                "structures": {str(label): name for label, name in target.dataset.structures.items()},
                "digest": target.digest,
            },
            "settings": self.settings,
            "metric": self.metric,
            "verdict": self.verdict,
            "warnings": self.warnings,
            "preferred": {metric: row.name for metric, row in self.preferred.items()},
            "consensus": None if consensus is None else consensus.name,
            "tied_with_the_first": [row.name for row in self.tied],
            "candidates": candidates,
            "failures": [{"name": row.name, "path": row.path, "error": row.error} for row in self.failures],
            "command": (self.commands or [""])[0],
            "commands": self.commands,
        }

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
    metrics: Sequence[str] = DEFAULT_METRICS,
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
            that the table shall have; or a zoo file, see :func:`read_zoo`.
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
        named = read_zoo(checkpoints)
    elif isinstance(checkpoints, Mapping):
        named = dict(zip(checkpoints, find_checkpoints(checkpoints.values()), strict=True))
    else:
        named = name_checkpoints(checkpoints)
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
    # Where the decoder of some candidate is random, encoders alone can be compared.
    part: Part = "decoder" if all("decoder" in trained_parts(path) for path in named.values()) else "encoder"
    what = [_KEPT_FORMAT, target.digest, sorted(metrics), normalise, debias, n_resamples, seed, per_class, n_whole]
    what += [part, dataset.ignore_label, dataset.structures, dataset.input_channels, dataset.configuration]
    score = partial(score_candidate, target=target, part=part, metrics=metrics, normalise=normalise, debias=debias)
    score = partial(score, seed=seed)
    score = partial(score, device=device, batch_size=batch_size, n_resamples=n_resamples, trust=trust)
    results = []
    for done, (name, path) in enumerate(named.items()):

        def report(doing: str, share: float, name: str = name, done: int = done) -> None:
            on_progress(f"{doing}: {name}", (read + done + 0.95 * share) / total)

        try:
            checkpoint = locate_checkpoint(path)
            sha256 = file_sha256(checkpoint)
            identity = hashlib.sha256(json.dumps([sha256, *what]).encode()).hexdigest()
            file = None if keep_in is None else Path(keep_in) / f"{identity[:32]}.json"
            result = _kept(file, identity)
            if result is None:
                result = score(name, path, on_progress=report)
                result.identity = identity
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
    if "topote" in metrics and (found := [result for result in results if not result.error]):
        divergence, consistency = (np.array([result.scores[term] or 0.0 for result in found]) for term in _TERMS)
        fused = fuse_topote(divergence, consistency, len(dataset.structures)).tolist()
        for result, score in zip(found, fused, strict=True):
            result.scores["topote"] = score
    settings = {"fold": fold, "cases": len(cases), "points of each structure": per_class}
    settings |= {"points of the whole volume": n_whole, "normalize": normalise, "debias": debias}
    settings |= {"resamples": n_resamples, "seed": seed, "device": str(device), "features": f"stages of the {part}"}
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


def _kept(file: Path | None, identity: str) -> CandidateScores | None:
    """Read a result that was kept; None where there is none, somebody has damaged it, or it is of something else."""
    with suppress(OSError, ValueError):
        if file is not None:
            kept = msgspec.json.decode(file.read_bytes(), type=CandidateScores)
            return replace(kept, seconds=0.0) if kept.identity == identity else None
    return None
