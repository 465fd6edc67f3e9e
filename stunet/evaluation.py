"""Evaluation of segmentations on a dataset with other labels: what is compared, scores of a case, all cases.

What is scored where a structure is absent (the same as nnU-Net's evaluation, as far as that goes):

=========================  ============  ====  ====  ==========================
in the label map           predicted     Dice  NSD   HD95
=========================  ============  ====  ====  ==========================
yes                        yes           0..1  0..1  mm
yes                        no (missed)   0     0     infinite: none, but counted
no                         yes (spurious) 0    0     infinite: none, but counted
no                         no (absent)   none  none  none
not annotated              either        none  none  none
=========================  ============  ====  ====  ==========================

Nothing here imports PyTorch or nnU-Net, which each process would load anew.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import center_of_mass, find_objects
from surface_distance import compute_robust_hausdorff, compute_surface_dice_at_tolerance, compute_surface_distances

from stunet.datasets.raw import RawDataset, read_raw_dataset, read_test_dataset, read_validation_dataset
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import DatasetError, STUNetError, UsageError, reading
from stunet.files import atomic_path, read_json
from stunet.labels import mappings
from stunet.labels.annotations import MANIFEST_NAME, read_manifest
from stunet.labels.labels import Labels, canonical_name
from stunet.processes import run_jobs
from stunet.volumes import LABEL_ENDINGS, Volume, check_listed, check_same_grid, read_labels

METRICS = ("Dice", "NSD", "HD95")
"""The metrics that are shown: higher is better for the first two, the third is in mm."""

_COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")
_COLUMNS = ("Dice", "IoU", "NSD", "HD95", *_COUNTS)
_STATES = ("scored", "missed", "spurious", "absent", "not_annotated")
#: How much higher the mean Dice of sided structures must be with left and right swapped before a case is suspicious.
_MUCH_BETTER = 0.2
_SHOWN = 8

Status = Literal["scored", "missed", "spurious", "absent", "not annotated"]
Mask = npt.NDArray[np.bool_]
Boxes = Sequence[tuple[slice, ...] | None]
Values = Mapping[str, tuple[int, ...]]
"""Label values by structure."""


class SegmentationModel(NamedTuple):
    """What says what the values in segmentations mean."""

    path: Path  # a model folder, a folder of segmentations, or a dataset.json
    dataset_json: dict[str, Any]
    plans: dict[str, Any]  # those beside it; empty where there are none


@dataclass(frozen=True)
class EvaluationCase:
    """A case to score."""

    name: str
    reference: Path  # its label map
    prediction: Path
    comparisons: tuple[mappings.Comparison, ...]
    observed: tuple[tuple[int, ...] | None, ...]  # values of each in this label map; None where it is not annotated
    target_labels: Values  # of the dataset's structures
    source_labels: Values  # of the model's
    ignore: int | None  # the dataset's label of voxels that count for nothing
    tolerance: float  # of the normalised surface Dice, in mm


def evaluate(
    predictions: str | os.PathLike[str],
    dataset: int | str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    label_map: str | None = None,
    split: Literal["train", "test"] = "train",
    fold: int | None = None,
    cases: Sequence[str] | None = None,
    tolerance: float = 3.0,
    num_processes: int = 1,
) -> EvaluationResults:
    """Score the segmentations in a folder on a dataset's own labels.

    Args:
        predictions: Folder of the segmentations, of other labels than the dataset's or the same.
        dataset: Id, name, or path of a raw dataset.
        model: A model folder, or a ``dataset.json``, with the segmentations' labels; by default the ``dataset.json``
            beside them.
        label_map: YAML file, or the name of a published label system, that says which structures stand for which.
        split: Whether training or test cases are scored.
        fold: A fold whose validation cases alone are scored.
        cases: Names of the cases to score; all by default.
        tolerance: Tolerance of the normalised surface Dice in mm.
        num_processes: Cases to score at a time.

    Raises:
        DatasetError: The dataset, its cases or their segmentations are missing.
        LabelError: Nothing can be compared, or a label map that does not fit.

    >>> results = evaluate(prediction_folder, dataset_folder)
    >>> results.structures[0].comparison.name, results.mean["Dice"]
    ('structure_1', 1.0)
    """
    described, target = read_description(Path(model or predictions)), choose_cases(str(dataset), split, fold, cases)
    _, jobs = compare_labels(described, target, label_map, Path(predictions), tolerance=tolerance)
    check_predictions(jobs, Path(predictions))
    return score_cases(jobs, num_processes=num_processes)


def read_description(place: Path, option: str = "-m") -> SegmentationModel:
    """Read what the values in segmentations mean: of a model folder, a ``dataset.json``, or a folder of segmentations.

    Raises:
        DatasetError: There is no ``dataset.json``, or an incomplete one.
        UsageError: No such folder.
    """
    if not place.exists():
        raise UsageError(f"{place} does not exist: correct {option}")
    path = place / "dataset.json" if place.is_dir() else place
    remedy = "give a model folder or its dataset.json with -m"
    with reading(path, "without names of a model's structures", DatasetError, remedy):
        dataset_json = read_json(path)
        _ = dict(dataset_json["labels"]), len(dataset_json.get("channel_names", {}))
        plans_path = path.with_name("plans.json")
        plans = read_json(plans_path) if plans_path.is_file() else {}
        _ = [[float(side) for side in own.get("spacing", ())] for own in plans.get("configurations", {}).values()]
    return SegmentationModel(place, dataset_json, plans)


def choose_cases(
    dataset: str, split: str, fold: int | None, names: Sequence[str] | None = None, predictions: Path | None = None
) -> RawDataset:
    """Return the dataset to score on, with the cases that were asked for, or have a segmentation in ``predictions``.

    Raises:
        DatasetError: The dataset is unknown, or cases are missing.
        UsageError: A fold of test cases, an unknown case, or none that has a segmentation.
    """
    if split == "test" and fold is not None:
        raise UsageError(f"--split {split} --fold {fold} is impossible: folds are of the training cases")
    is_path = (Path(dataset) / "dataset.json").is_file()
    folder = Path(dataset) if is_path else nnunet_folder("nnUNet_raw") / find_dataset(dataset)
    if split == "test":
        target = read_test_dataset(folder)
    else:
        target = read_raw_dataset(folder) if fold is None else read_validation_dataset(folder, fold)
    wanted, ending = list(target.cases) if names is None else list(names), target.dataset_json["file_ending"]
    unknown = [name for name in wanted if name not in target.cases]
    if unknown or not wanted:
        known = ", ".join(list(target.cases)[:5])
        raise UsageError(f"--cases {', '.join(unknown)} are no cases of {target.folder} ({known}, …): correct --cases")
    found = [name for name in wanted if predictions is None or (predictions / f"{name}{ending}").is_file()]
    if not found:
        raise UsageError(f"{predictions} has no segmentation of any case, such as {wanted[0]}{ending}")
    return replace(target, cases={name: target.cases[name] for name in found})


def compare_labels(
    model: SegmentationModel, target: RawDataset, label_map: str | None, predictions: Path, *, tolerance: float
) -> tuple[mappings.LabelRelation, list[EvaluationCase]]:
    """Relate the model's labels to the dataset's, and return how, and what is to be scored.

    Raises:
        LabelError: A malformed annotation manifest or label map, or nothing that can be compared.
        UsageError: An impossible tolerance.
    """
    if not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance:g} mm is impossible: give 0 mm or more")
    mapping = None
    if label_map is not None:
        is_file = Path(label_map).is_file() or label_map.endswith((".yaml", ".yml")) or os.sep in label_map
        mapping = (mappings.read_label_map if is_file else mappings.load_label_system)(label_map)
    labels, path = target.dataset_json["labels"], target.folder / MANIFEST_NAME
    relation = mappings.relate_labels(model.dataset_json["labels"], labels, mapping)
    annotated = read_manifest(path, labels=labels) if path.is_file() else None
    own, others = Labels(target.dataset_json), Labels(model.dataset_json)
    comparisons, of_all = relation.comparisons, (own.structures, others.structures, own.ignore, tolerance)
    jobs = []
    for name, (_, reference) in target.cases.items():
        prediction = predictions.resolve() / f"{name}{target.dataset_json['file_ending']}"
        observed = [
            c.target_values if annotated is None else mappings.observed_values(c, annotated, name) for c in comparisons
        ]
        jobs.append(EvaluationCase(name, reference, prediction, comparisons, tuple(observed), *of_all))
    return relation, jobs


def check_predictions(jobs: Sequence[EvaluationCase], predictions: Path) -> None:
    """Check that each case has a prediction."""
    if not predictions.is_dir():
        raise UsageError(f"--predictions {predictions} is no such folder")
    missing = [job.prediction for job in jobs if not job.prediction.is_file()]
    if missing:
        count = f"{len(missing)} of {len(jobs)} predictions are missing"
        raise DatasetError(f"{count}, first {missing[0]}: choose cases with --cases, or score the others with --chill")


# One case -------------------------------------------------------------------------------------------------------------


class StructureScore(NamedTuple):
    """Scores of one structure in one case."""

    status: Status  # missed or spurious where it is in the label map or in the prediction alone, absent from both
    # Dice, IoU and voxels under nnU-Net's names; NSD, the normalised surface Dice; HD95, the 95th percentile Hausdorff
    # distance in mm; None where there is none
    metrics: dict[str, float | None]


class Sides(NamedTuple):
    """How many pairs of a left and a right structure were looked at, and how many lie the wrong way round."""

    pairs: int = 0
    reversed: int = 0


class CaseOrientation(NamedTuple):
    """What a case says about left and right."""

    reference: Sides = Sides()
    prediction: Sides = Sides()
    dice: float | None = None  # mean of the sided structures that the label map has; None where it has none
    swapped_dice: float | None = None  # the same with left and right of the prediction swapped


class CaseScores(NamedTuple):
    """Scores of one case, one for each comparison in order, and what the case says about left and right."""

    scores: tuple[StructureScore, ...]
    orientation: CaseOrientation


def score_case(case: EvaluationCase) -> CaseScores:
    """Score one case.

    Raises:
        DatasetError: A file that cannot be read, a prediction on another grid than the label map, or values that no
            ``dataset.json`` lists.
    """
    ignored = () if case.ignore is None else (case.ignore,)
    reference = _read(case.reference, case.target_labels, ignored)
    prediction = _read(case.prediction, case.source_labels)
    check_same_grid(prediction, reference)
    overlap = _overlap(reference.voxels, prediction.voxels)
    overlap[[value for value in ignored if value < len(overlap)]] = 0
    boxes: tuple[Boxes, Boxes] = find_objects(reference.voxels), find_objects(prediction.voxels)
    flat = tuple(axis for axis, n in enumerate(reference.voxels.shape) if n == 1)
    flat = flat if len(flat) == 1 else ()  # a flat image is scored in its plane
    spacing = [side for axis, side in enumerate(reference.spacing) if axis not in flat]
    scores = []
    for comparison, observed in zip(case.comparisons, case.observed, strict=True):
        if observed is None:
            scores.append(StructureScore("not annotated", dict.fromkeys(_COLUMNS)))
            continue
        counts = _counts(overlap, observed, comparison.source_values)
        score = volume_scores(*counts, int(overlap.sum()))
        if score.status == "scored":
            box = _hull((boxes[0], observed), (boxes[1], comparison.source_values))
            labels = reference.voxels[box]
            inside, predicted = np.isin(labels, observed), np.isin(prediction.voxels[box], comparison.source_values)
            masks = inside.squeeze(flat), (predicted & ~np.isin(labels, ignored)).squeeze(flat)
            score.metrics["NSD"], score.metrics["HD95"] = surface_scores(*masks, spacing, tolerance=case.tolerance)
        scores.append(score)
    mine = _count_reversed(reference, boxes[0], case.target_labels)
    others = _count_reversed(prediction, boxes[1], case.source_labels)
    return CaseScores(tuple(scores), CaseOrientation(mine, others, *_swapped_dice(case, overlap)))


def volume_scores(tp: int, n_ref: int, n_pred: int, n_voxels: int) -> StructureScore:
    """Scores that need no more than counts of voxels; NSD and HD95 only where a structure is absent.

    ``tp`` voxels are inside the structure in label map and prediction, ``n_ref`` and ``n_pred`` in one of them, and
    ``n_voxels`` count at all.
    """
    fp, fn = n_pred - tp, n_ref - tp
    metrics: dict[str, float | None] = dict.fromkeys(_COLUMNS)
    metrics |= zip(_COUNTS, (tp, fp, fn, n_voxels - tp - fp - fn, n_pred, n_ref), strict=True)
    if n_ref == n_pred == 0:
        return StructureScore("absent", metrics)
    metrics |= {"Dice": 2 * tp / (n_ref + n_pred), "IoU": tp / (tp + fp + fn)}
    if n_ref and n_pred:
        return StructureScore("scored", metrics)
    return StructureScore("missed" if n_ref else "spurious", metrics | {"NSD": 0.0})


def surface_scores(
    reference: Mask, prediction: Mask, spacing: Sequence[float], *, tolerance: float
) -> tuple[float, float]:
    """Normalised surface Dice and 95th percentile Hausdorff distance in mm, both weighted by surface area.

    They are those of the ``surface-distance`` package: surfaces run between voxel centres, through the eight voxels of
    each cube that the structure does not fill (arXiv 1809.04430, section 4.4). Voxels beyond the arrays are outside.
    Both masks have 2 or 3 axes, and are not empty; ``spacing`` and ``tolerance`` are in mm.
    """
    distances: Any = compute_surface_distances(reference, prediction, tuple(spacing))
    nsd = compute_surface_dice_at_tolerance(distances, tolerance)
    return float(nsd), float(compute_robust_hausdorff(distances, 95))


def sided_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that mean the left and the right one of the same structure."""
    known = {canonical_name(name): name for name in names}
    partners = {name: f"{meant.removesuffix('left')}right" for meant, name in known.items() if meant.endswith("_left")}
    return [(left, known[right]) for left, right in partners.items() if right in known]


def _read(path: Path, labels: Values, more: Sequence[int] = ()) -> Volume:
    if not path.name.endswith(LABEL_ENDINGS):
        raise DatasetError(f"{path} is of a format that cannot be scored: convert it to {', '.join(LABEL_ENDINGS)}")
    volume = read_labels(path)
    check_listed(volume, {0, *more, *(value for values in labels.values() for value in values)})
    return volume


def _overlap(reference: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Voxels by value in the label map (rows) and in the prediction (columns)."""
    rows, columns = int(reference.max()) + 1, int(prediction.max()) + 1
    counts = np.zeros(rows * columns, np.int64)
    for r, p in zip(reference.T, prediction.T, strict=True):  # plane by plane, since bincount takes 8 bytes a voxel
        counts += np.bincount((r.astype(np.int64) * columns + p).ravel(), minlength=rows * columns)
    return counts.reshape(rows, columns)


def _counts(overlap: npt.NDArray[np.int64], target: Sequence[int], source: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of a structure in both, in the label map, and in the prediction."""
    rows = overlap[[value for value in target if value < len(overlap)]]
    columns = [value for value in source if value < overlap.shape[1]]
    return int(rows[:, columns].sum()), int(rows.sum()), int(overlap[:, columns].sum())


def _hull(*parts: tuple[Boxes, Sequence[int]]) -> tuple[slice, ...]:
    """The box around label values, by the boxes around single ones; empty where there are none."""
    boxes = [box for of, values in parts for value, box in enumerate(of, start=1) if box and value in values]
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


def _count_reversed(volume: Volume, boxes: Boxes, labels: Values) -> Sides:
    """Count the pairs whose left structure lies to the patient's right of its partner, by their centres of mass."""
    pairs = [[_rightward(volume, boxes, labels[name]) for name in pair] for pair in sided_pairs(labels)]
    seen = [(left, right) for left, right in pairs if left is not None and right is not None]
    return Sides(len(seen), sum(left > right for left, right in seen))


def _rightward(volume: Volume, boxes: Boxes, values: Sequence[int]) -> float | None:
    """How far to the patient's right the centre of mass of some label values lies, in mm."""
    if not (box := _hull((boxes, values))):
        return None
    centre = np.add(center_of_mass(np.isin(volume.voxels[box], values)), [side.start for side in box])
    return float((volume.affine @ [*centre, 1.0])[0])


def _swapped_dice(case: EvaluationCase, overlap: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Mean Dice of the sided structures that the label map has, as they are and with the prediction's sides swapped."""
    compared = zip(case.comparisons, case.observed, strict=True)
    values = {c.name: (observed, c.source_values) for c, observed in compared if observed is not None}
    dice = []
    for left, right in sided_pairs(values):
        for mine, other in ((left, right), (right, left)):
            counts = [_counts(overlap, values[mine][0], values[of][1]) for of in (mine, other)]
            scores = [volume_scores(*count, 0) for count in counts]
            if scores[0].metrics["n_ref"]:
                dice.append([score.metrics["Dice"] for score in scores])
    straight, swapped = (float(value) for value in np.mean(np.array(dice, float), axis=0)) if dice else (None, None)
    return straight, swapped


# All cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StructureSummary:
    """Scores of one structure over all cases."""

    comparison: mappings.Comparison
    mean: Mapping[str, float | None]  # of each metric over the cases that have it; None where none has
    counts: Mapping[str, int]  # of cases by status

    @property
    def infinite(self) -> int:
        """Cases whose Hausdorff distance is infinite and not part of its mean."""
        return self.counts["missed"] + self.counts["spurious"]

    @property
    def key(self) -> str:
        """nnU-Net's key in ``summary.json``: a label value, or several in brackets."""
        values = self.comparison.target_values
        return str(values[0]) if len(values) == 1 else str(values)


@dataclass(frozen=True)
class EvaluationResults:
    """Scores of all cases."""

    structures: tuple[StructureSummary, ...]  # in the order of the dataset's label values
    cases: Mapping[str, CaseScores]  # in the order of names
    jobs: Mapping[str, EvaluationCase]  # what was scored, by case
    mean: Mapping[str, float | None]  # over structures of their means, for each metric; None where no structure has it
    warnings: tuple[str, ...]  # what is suspicious about left and right
    failed: Mapping[str, STUNetError]  # why cases could not be scored

    def summary(self, **more: Any) -> dict[str, Any]:
        """Return the content of a ``summary.json`` as nnU-Net's evaluation writes it, with more metrics and entries."""
        keys = [structure.key for structure in self.structures]
        per_case = [
            {
                "reference_file": str(self.jobs[name].reference),
                "prediction_file": str(self.jobs[name].prediction),
                "case": name,
                "metrics": {key: score.metrics for key, score in zip(keys, case.scores, strict=True)},
                "status": {key: score.status for key, score in zip(keys, case.scores, strict=True)},
            }
            for name, case in self.cases.items()
        ]
        described = {
            structure.key: {**asdict(structure.comparison), **structure.counts, "HD95_infinite": structure.infinite}
            for structure in self.structures
        }
        return {
            "foreground_mean": dict(self.mean),
            "mean": {structure.key: dict(structure.mean) for structure in self.structures},
            "structures": described,
            "metric_per_case": per_case,
            "warnings": list(self.warnings),
            **more,
        }

    def values(self, metric: str) -> dict[str, list[float]]:
        """Scores of all cases that have one, by structure."""
        found = {}
        for i, structure in enumerate(self.structures):
            values = (case.scores[i].metrics[metric] for case in self.cases.values())
            found[structure.comparison.name] = [value for value in values if value is not None]
        return found

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row for each case and structure, atomically; a score that there is not is left empty."""
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "structure", "status", *(f"{c}_mm" if c == "HD95" else c for c in _COLUMNS)])
            for name, case in self.cases.items():
                for structure, score in zip(self.structures, case.scores, strict=True):
                    values = ["" if (v := score.metrics[c]) is None else v for c in _COLUMNS]
                    writer.writerow([name, structure.comparison.name, score.status, *values])


def score_cases(
    jobs: Sequence[EvaluationCase], *, num_processes: int = 1, on_case: Callable[[], None] = lambda: None
) -> EvaluationResults:
    """Score cases, several at a time, and call ``on_case`` after each. One that fails stops no other."""
    scores: dict[str, CaseScores] = {}
    failed: dict[str, STUNetError] = {}
    for job, result in run_jobs(score_case, jobs, num_processes=num_processes):
        if isinstance(result, STUNetError):
            failed[job.name] = result
        else:
            scores[job.name] = result
        on_case()
    return collect_results(scores, jobs, failed)


def collect_results(
    scores: Mapping[str, CaseScores], jobs: Sequence[EvaluationCase], failed: Mapping[str, STUNetError] | None = None
) -> EvaluationResults:
    """Bring the scores of cases together; jobs without scores have failed and do not count."""
    by_name = {job.name: job for job in sorted(jobs, key=lambda job: job.name) if job.name in scores}
    cases, structures = {name: scores[name] for name in by_name}, list[StructureSummary]()
    for i, comparison in enumerate(jobs[0].comparisons):
        own = [case.scores[i] for case in cases.values()]
        states = Counter(score.status.replace(" ", "_") for score in own)
        mean = {column: _mean(score.metrics[column] for score in own) for column in _COLUMNS}
        structures.append(StructureSummary(comparison, mean, {state: states[state] for state in _STATES}))
    mean = {column: _mean(structure.mean[column] for structure in structures) for column in _COLUMNS}
    warnings = orientation_warnings({name: case.orientation for name, case in cases.items()})
    return EvaluationResults(tuple(structures), cases, by_name, mean, tuple(warnings), failed or {})


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def orientation_warnings(cases: Mapping[str, CaseOrientation]) -> list[str]:
    """Say what the cases of a dataset, by name, tell about left and right; nothing where all is well."""
    warnings, reason = [], "The model was trained on images with another orientation"
    explained = {"reference": ("label maps", "Their names are swapped"), "prediction": ("predictions", reason)}
    for what, (place, reason) in explained.items():
        sides = {name: getattr(case, what) for name, case in cases.items()}
        wrong = [name for name, of in sides.items() if 2 * of.reversed > of.pairs]
        n = sum(of.pairs > 0 for of in sides.values())
        if wrong and (what == "reference" or 2 * len(wrong) > n):
            warnings.append(
                f"left and right are swapped in the {place} of {len(wrong)} of {n} cases: by the image's own axes, "
                f"what is left in them lies to the patient's right ({_shortened(wrong)}). {reason}, or the image's "
                "direction is wrong."
            )
    scored = {n: np.array([c.dice, c.swapped_dice], float) for n, c in cases.items() if c.dice is not None}
    better = [name for name, (dice, swapped) in scored.items() if swapped > dice + _MUCH_BETTER]
    if 2 * len(better) > len(scored):
        dice, swapped = np.mean(list(scored.values()), axis=0)
        warnings.append(
            f"with left and right of the predictions swapped, sided structures would score a Dice of {swapped:.3f} "
            f"instead of {dice:.3f}; {len(better)} of {len(scored)} cases would score much better "
            f"({_shortened(better)})."
        )
    return warnings


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
