"""The steps of ``stunet evaluate``: finding model and dataset, relating their labels, scoring."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet.errors import DatasetError, UsageError, reading
from stunet.files import read_json

if TYPE_CHECKING:
    from stunet.datasets import RawDataset
    from stunet.errors import STUNetError
    from stunet.evaluation import CaseScores, EvaluationCase
    from stunet.labels import LabelMap, LabelRelation

__all__ = [
    "ModelNames",
    "check_agreement",
    "check_predictions",
    "choose_cases",
    "choose_label_map",
    "find_target",
    "make_jobs",
    "read_model_names",
    "score_cases",
]


@dataclass(frozen=True)
class ModelNames:
    """What a model folder says without its weights.

    Attributes:
        path: The folder, or the ``dataset.json`` alone.
        dataset_json: Content of its ``dataset.json``.
        plans: Content of its ``plans.json``; empty where there is none.
    """

    path: Path
    dataset_json: dict[str, Any]
    plans: dict[str, Any]

    @property
    def labels(self) -> dict[str, Any]:
        """Label values, or lists of them, by name."""
        return dict(self.dataset_json["labels"])


def read_model_names(model: Path | None, predictions: Path | None) -> ModelNames:
    """Read what the values in a model's segmentations mean.

    Args:
        model: A model folder, or a ``dataset.json``.
        predictions: A folder of segmentations, beside which nnU-Net writes a copy of the ``dataset.json``; taken where
            no model is given.

    Raises:
        DatasetError: There is no ``dataset.json``, or an incomplete one.
        UsageError: Neither is given.
    """
    place = model or predictions
    if place is None:
        raise UsageError(
            "neither a model nor predictions",
            got="no -m and no --predictions",
            expected="a model folder, or segmentations that are there already",
            remedy="Give -m MODEL_FOLDER, or --predictions FOLDER.",
        )
    if not place.exists():
        what, option = ("model folder", "-m") if model else ("folder of segmentations", "--predictions")
        raise UsageError(f"no such {what}", got=place, expected="one that exists", remedy=f"Correct {option}.")
    path = place / "dataset.json" if place.is_dir() else place
    with reading(path, "no names of a model's structures", DatasetError,
                 expected="a model folder with dataset.json, which has labels",
                 remedy="Give a model folder or its dataset.json with -m; see stunet convert."):  # fmt: skip
        dataset_json = read_json(path)
        _ = dict(dataset_json["labels"]), len(dataset_json.get("channel_names", {}))
        plans_path = path.with_name("plans.json")
        plans = read_json(plans_path) if plans_path.is_file() else {}
        _ = [[float(side) for side in own.get("spacing", ())] for own in plans.get("configurations", {}).values()]
    return ModelNames(place, dataset_json, plans)


def find_target(dataset: str, split: str, fold: int | None) -> RawDataset:
    """The dataset to score on, with the cases that were asked for.

    Args:
        dataset: Id, name, or path of a raw dataset.
        split: ``train`` or ``test``.
        fold: A fold whose validation cases are taken.

    Raises:
        DatasetError: It is unknown, or cases are missing.
        UsageError: A fold of test cases.
    """
    from stunet.datasets import read_raw_dataset, read_test_dataset, read_validation_dataset
    from stunet.environment import find_dataset, nnunet_folder

    if split == "test" and fold is not None:
        raise UsageError(
            "impossible choice of cases",
            got=f"--split {split} --fold {fold}",
            expected="--fold with the training cases alone",
            remedy="Correct --split, or leave --fold out.",
        )
    is_path = (Path(dataset) / "dataset.json").is_file()
    folder = Path(dataset) if is_path else nnunet_folder("nnUNet_raw") / find_dataset(dataset)
    if split == "test":
        return read_test_dataset(folder)
    if fold is None:
        return read_raw_dataset(folder)
    preprocessed = os.environ.get("nnUNet_preprocessed")
    beside = Path(preprocessed) / folder.resolve().name if preprocessed else None
    return read_validation_dataset(folder, fold, preprocessed=beside)


def choose_cases(target: RawDataset, names: str | None, predictions: Path | None) -> RawDataset:
    """The dataset with some of its cases.

    Args:
        target: The dataset.
        names: Cases with commas between; all by default.
        predictions: A folder; only cases with a segmentation in it are taken.

    Raises:
        UsageError: An unknown case, or none that has a segmentation.
    """
    wanted = list(target.cases) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in target.cases]
    if unknown or not wanted:
        raise UsageError(
            "an unknown case",
            got=", ".join(unknown) or names,
            expected=f"cases of {target.folder}: {', '.join(list(target.cases)[:5])}, …",
            remedy="Correct --cases; see also --split and --fold.",
        )
    ending = target.dataset_json["file_ending"]
    found = [name for name in wanted if predictions is None or (predictions / f"{name}{ending}").is_file()]
    if not found:
        raise UsageError(
            "no segmentation of any case",
            got=predictions,
            expected=f"files such as {wanted[0]}{ending}",
            remedy="Correct --predictions, or choose other cases with --split and --fold.",
        )
    return replace(target, cases={name: target.cases[name] for name in found})


def choose_label_map(text: str | None) -> LabelMap | None:
    """A label map by its file, or a published system by its name."""
    from stunet.labels import load_label_system, read_label_map

    if text is None:
        return None
    is_file = Path(text).is_file() or text.endswith((".yaml", ".yml")) or os.sep in text
    return read_label_map(text) if is_file else load_label_system(text)


def check_agreement(model: ModelNames, target: RawDataset) -> None:
    """Check that the model takes images such as the dataset has.

    Raises:
        DatasetError: Another number of channels, or another file ending.
    """
    mine, theirs = model.dataset_json.get("channel_names", {}), target.dataset_json["channel_names"]
    if len(mine) != len(theirs):
        raise DatasetError(
            "a dataset of other channels than the model",
            got=f"{target.folder}: {len(theirs)} ({', '.join(map(str, theirs.values()))})",
            expected=f"{len(mine)} ({', '.join(map(str, mine.values()))}), as {model.path} has",
            remedy="Give a model of images with these channels.",
        )
    ending = model.dataset_json.get("file_ending")
    if ending != target.dataset_json["file_ending"]:
        raise DatasetError(
            "a dataset of another file ending than the model",
            got=f"{target.folder}: {target.dataset_json['file_ending']}",
            expected=f"{ending}, as {model.path} has",
            remedy="Convert the dataset's images and label maps, and correct file_ending in its dataset.json.",
        )


def make_jobs(
    target: RawDataset, relation: LabelRelation, model: ModelNames, predictions: Path, *, tolerance: float
) -> list[EvaluationCase]:
    """One job for each case.

    Raises:
        LabelError: A malformed annotation manifest.
    """
    from stunet.evaluation import EvaluationCase
    from stunet.labels import MANIFEST_NAME, observed_values, read_manifest, structure_values

    labels, ending = target.dataset_json["labels"], target.dataset_json["file_ending"]
    path = target.folder / MANIFEST_NAME
    manifest = read_manifest(path, labels=labels) if path.is_file() else None
    return [
        EvaluationCase(
            name=case,
            reference=label,
            prediction=predictions.resolve() / f"{case}{ending}",
            comparisons=relation.comparisons,
            observed=tuple(
                c.target_values if manifest is None else observed_values(c, manifest, case)
                for c in relation.comparisons
            ),
            target_labels=structure_values(labels),
            source_labels=structure_values(model.labels),
            ignore=labels.get("ignore"),
            tolerance=tolerance,
        )
        for case, (_, label) in target.cases.items()
    ]


def check_predictions(jobs: Sequence[EvaluationCase], predictions: Path) -> None:
    """Check that each case has a prediction.

    Raises:
        DatasetError: One has none.
        UsageError: No such folder.
    """
    if not predictions.is_dir():
        raise UsageError(
            "no such folder", got=predictions, expected="a folder of segmentations", remedy="Correct --predictions."
        )
    missing = [job.prediction for job in jobs if not job.prediction.is_file()]
    if missing:
        raise DatasetError(
            "cases without a prediction",
            got=f"{len(missing)} of {len(jobs)}, the first is {missing[0]}",
            expected="a segmentation of each case",
            remedy="Predict them too, choose cases with --cases, or score those that are there with --chill.",
        )


def score_cases(
    jobs: Sequence[EvaluationCase], *, num_processes: int, on_case: Callable[[], None]
) -> tuple[dict[str, CaseScores], dict[str, STUNetError]]:
    """Score cases, several at a time.

    Args:
        jobs: The cases.
        num_processes: Cases at a time.
        on_case: Called after each case.

    Returns:
        Scores by case, and the errors of cases that could not be scored.
    """
    from stunet.errors import STUNetError
    from stunet.evaluation import score_case
    from stunet.processes import run_jobs

    scores: dict[str, CaseScores] = {}
    failed: dict[str, STUNetError] = {}
    for job, result in run_jobs(score_case, jobs, num_processes=num_processes):
        if isinstance(result, STUNetError):
            failed[job.name] = result
        else:
            scores[job.name] = result
        on_case()
    return scores, failed
