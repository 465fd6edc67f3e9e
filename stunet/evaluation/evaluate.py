"""Evaluation of a model's segmentations on a dataset with other labels: what is compared of which cases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stunet.datasets import RawDataset, read_raw_dataset, read_test_dataset, read_validation_dataset
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import DatasetError, UsageError, reading
from stunet.evaluation.results import EvaluationResults, score_cases
from stunet.evaluation.scores import EvaluationCase
from stunet.files import read_json
from stunet.labels import (
    MANIFEST_NAME,
    LabelRelation,
    load_label_system,
    observed_values,
    read_label_map,
    read_manifest,
    relate_labels,
    structure_values,
)


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
    dataset: str | os.PathLike[str],
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
    target = choose_cases(os.fspath(dataset), split, fold, cases)
    _, jobs = compare_labels(described, target, label_map, place, tolerance=tolerance)
    check_predictions(jobs, place)
    return score_cases(jobs, num_processes=num_processes)


def read_description(place: Path, option: str = "-m") -> ModelDescription:
    """Read what the values in a model's segmentations mean.

    Args:
        place: A model folder, a ``dataset.json``, or a folder of segmentations, beside which nnU-Net writes it.
        option: Where it was given, for the message.

    Raises:
        DatasetError: There is no ``dataset.json``, or an incomplete one.
        UsageError: No such folder.
    """
    if not place.exists():
        raise UsageError(f"{place} does not exist: correct {option}")
    path = place / "dataset.json" if place.is_dir() else place
    with reading(
        path, "no names of a model's structures; give a model folder or its dataset.json with -m", DatasetError
    ):
        dataset_json = read_json(path)
        _ = dict(dataset_json["labels"]), len(dataset_json.get("channel_names", {}))
        plans_path = path.with_name("plans.json")
        plans = read_json(plans_path) if plans_path.is_file() else {}
        _ = [[float(side) for side in own.get("spacing", ())] for own in plans.get("configurations", {}).values()]
    return ModelDescription(place, dataset_json, plans)


def choose_cases(
    dataset: str, split: str, fold: int | None, names: Sequence[str] | None = None, predictions: Path | None = None
) -> RawDataset:
    """Return the dataset to score on, with the cases that were asked for.

    Args:
        dataset: Id, name, or path of a raw dataset.
        split: ``train`` or ``test``.
        fold: A fold whose validation cases are taken.
        names: Cases; all by default.
        predictions: A folder; only cases with a segmentation in it are taken.

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

    Args:
        model: What the segmentations' values mean.
        target: The dataset, with the cases to score.
        label_map: YAML file, or the name of a published label system.
        predictions: Folder of the segmentations.
        tolerance: Tolerance of the normalised surface Dice in mm.

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
    """Check that each case has a prediction.

    Raises:
        DatasetError: One has none.
        UsageError: No such folder.
    """
    if not predictions.is_dir():
        raise UsageError(f"--predictions {predictions} is no such folder")
    missing = [job.prediction for job in jobs if not job.prediction.is_file()]
    if missing:
        count = f"{len(missing)} of {len(jobs)} predictions are missing"
        raise DatasetError(f"{count}, first {missing[0]}: choose cases with --cases, or score the others with --chill")
