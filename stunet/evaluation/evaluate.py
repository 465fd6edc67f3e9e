"""Evaluation of segmentations on a dataset with other labels: what is compared of which cases, and the results."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stunet.datasets.raw import RawDataset, read_raw_dataset, read_test_dataset, read_validation_dataset
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import DatasetError, STUNetError, UsageError, reading
from stunet.evaluation.scores import CaseOrientation, CaseScores, EvaluationCase, score_case
from stunet.files import atomic_path, read_json
from stunet.labels.annotations import MANIFEST_NAME, read_manifest
from stunet.labels.comparisons import (
    Comparison,
    LabelRelation,
    load_label_system,
    observed_values,
    read_label_map,
    relate_labels,
    structure_values,
)
from stunet.processes import run_jobs

_COLUMNS = ("Dice", "IoU", "NSD", "HD95", "TP", "FP", "FN", "TN", "n_pred", "n_ref")
_STATES = ("scored", "missed", "spurious", "absent", "not_annotated")
#: How much higher the mean Dice of sided structures must be with left and right swapped before a case is suspicious.
_MUCH_BETTER = 0.2
_SHOWN = 8
_OF_PREDICTIONS = ("predictions", "The model was trained on images with another orientation")


@dataclass(frozen=True)
class ModelDescription:
    """What a model folder says without its weights.

    Attributes:
        path: The folder, or the ``dataset.json`` alone.
        dataset_json: Content of its ``dataset.json``.
        plans: Content of its ``plans.json``; empty where there is none.
    """

    path: Path
    dataset_json: dict[str, Any]
    plans: dict[str, Any]


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
    place, described = Path(predictions), read_description(Path(model or predictions))
    target = choose_cases(str(dataset), split, fold, cases)
    _, jobs = compare_labels(described, target, label_map, place, tolerance=tolerance)
    check_predictions(jobs, place)
    return score_cases(jobs, num_processes=num_processes)


def read_description(place: Path, option: str = "-m") -> ModelDescription:
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
    return ModelDescription(place, dataset_json, plans)


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
    elif fold is None:
        target = read_raw_dataset(folder)
    else:
        preprocessed = os.environ.get("nnUNet_preprocessed")
        beside = Path(preprocessed) / folder.resolve().name if preprocessed else None
        target = read_validation_dataset(folder, fold, preprocessed=beside)
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
    model: ModelDescription, target: RawDataset, label_map: str | None, predictions: Path, *, tolerance: float
) -> tuple[LabelRelation, list[EvaluationCase]]:
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
        mapping = (read_label_map if is_file else load_label_system)(label_map)
    labels, path = target.dataset_json["labels"], target.folder / MANIFEST_NAME
    relation = relate_labels(model.dataset_json["labels"], labels, mapping)
    annotated = read_manifest(path, labels=labels) if path.is_file() else None
    jobs = []
    for name, (_, reference) in target.cases.items():
        prediction = predictions.resolve() / f"{name}{target.dataset_json['file_ending']}"
        observed = tuple(
            c.target_values if annotated is None else observed_values(c, annotated, name) for c in relation.comparisons
        )
        values = structure_values(labels), structure_values(model.dataset_json["labels"])
        ignore, comparisons = labels.get("ignore"), relation.comparisons
        jobs.append(EvaluationCase(name, reference, prediction, comparisons, observed, *values, ignore, tolerance))
    return relation, jobs


def check_predictions(jobs: Sequence[EvaluationCase], predictions: Path) -> None:
    """Check that each case has a prediction."""
    if not predictions.is_dir():
        raise UsageError(f"--predictions {predictions} is no such folder")
    missing = [job.prediction for job in jobs if not job.prediction.is_file()]
    if missing:
        count = f"{len(missing)} of {len(jobs)} predictions are missing"
        raise DatasetError(f"{count}, first {missing[0]}: choose cases with --cases, or score the others with --chill")


# Results --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StructureSummary:
    """Scores of one structure over all cases.

    Attributes:
        comparison: What is compared.
        mean: Mean of each metric over the cases that have it; None where none has.
        counts: Cases that have the structure in label map and prediction (``scored``), in the label map alone
            (``missed``), in the prediction alone (``spurious``) or in neither (``absent``), or do not annotate it
            (``not_annotated``); the last two have no scores.
    """

    comparison: Comparison
    mean: Mapping[str, float | None]
    counts: Mapping[str, int]

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
    """Scores of all cases.

    Attributes:
        structures: By structure, in the order of the dataset's label values.
        cases: By case, in the order of names.
        jobs: What was scored, by case.
        mean: Mean over structures of their means, for each metric; None where no structure has it.
        warnings: What is suspicious about left and right.
        failed: Why cases could not be scored, by case.
    """

    structures: tuple[StructureSummary, ...]
    cases: Mapping[str, CaseScores]
    jobs: Mapping[str, EvaluationCase]
    mean: Mapping[str, float | None]
    warnings: tuple[str, ...]
    failed: Mapping[str, STUNetError] = field(default_factory=dict)

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
        found = {structure.comparison.name: list[float]() for structure in self.structures}
        for case in self.cases.values():
            for values, score in zip(found.values(), case.scores, strict=True):
                if (value := score.metrics[metric]) is not None:
                    values.append(value)
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
    cases, structures = {name: scores[name] for name in by_name}, []
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
    warnings = []
    for what in ("reference", "prediction"):
        sides = {name: getattr(case, what) for name, case in cases.items()}
        wrong, n = [name for name, of in sides.items() if of.suspicious], sum(of.pairs > 0 for of in sides.values())
        if wrong and (what == "reference" or 2 * len(wrong) > n):
            place, reason = ("label maps", "Their names are swapped") if what == "reference" else _OF_PREDICTIONS
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
