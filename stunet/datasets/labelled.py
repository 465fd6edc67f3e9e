"""Cases of a raw dataset that have label maps: those to train on, to test on, or to validate a fold with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stunet.datasets.raw import RawDataset, read_raw_dataset
from stunet.datasets.side_files import SPLITS_NAME
from stunet.errors import DatasetError

__all__ = ["read_test_dataset", "read_validation_dataset"]


def read_test_dataset(folder: str | os.PathLike[str]) -> RawDataset:
    """A raw dataset whose cases are those of ``imagesTs`` that have a label map in ``labelsTs``.

    Raises:
        DatasetError: No ``dataset.json``, no label maps, or a label map without its images.
    """
    folder = Path(folder).resolve()
    try:
        dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        channels, ending, _ = len(dataset_json["channel_names"]), dataset_json["file_ending"], dataset_json["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            "not an nnU-Net raw dataset",
            got=f"{folder}: {type(error).__name__}: {error}",
            expected="dataset.json with channel_names, labels and file_ending",
            remedy="Bring the data into nnU-Net's raw layout (nnU-Net, documentation/dataset_format.md).",
        ) from error
    cases = {}
    for label in sorted((folder / "labelsTs").glob(f"*{ending}")):
        case = label.name.removesuffix(ending)
        cases[case] = ([folder / "imagesTs" / f"{case}_{c:04d}{ending}" for c in range(channels)], label)
    missing = [image for images, _ in cases.values() for image in images if not image.is_file()]
    if missing or not cases:
        raise DatasetError(
            "test cases that cannot be scored",
            got=f"{missing[0]} is missing" if missing else f"no *{ending} in {folder / 'labelsTs'}",
            expected=f"label maps in labelsTs, and {channels} images of each case in imagesTs",
            remedy="Add the files, or take the training cases with --split train.",
        )
    return RawDataset(folder, dataset_json, cases)


def read_validation_dataset(
    folder: str | os.PathLike[str], fold: int, *, preprocessed: str | os.PathLike[str] | None = None
) -> RawDataset:
    """A raw dataset whose cases are the validation cases of a fold.

    Args:
        folder: The raw dataset.
        fold: Number of the fold.
        preprocessed: The dataset's preprocessed folder, whose ``splits_final.json`` goes before the raw folder's.

    Raises:
        DatasetError: No such fold, or cases that the dataset does not have.
    """
    dataset = read_raw_dataset(folder)
    places = [Path(place) / SPLITS_NAME for place in (preprocessed, folder) if place is not None]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DatasetError(
            "missing folds",
            got=f"no {' and no '.join(map(str, places))}",
            expected=f"{SPLITS_NAME}, which nnU-Net writes when a training begins",
            remedy="Set nnUNet_preprocessed to where the dataset was trained, or leave --fold out.",
        )
    names = _validation_names(path, fold)
    unknown = next((name for name in names if name not in dataset.cases), None)
    if unknown is not None:
        raise DatasetError(
            "folds that do not belong to the dataset",
            got=f"{path}: case {unknown}",
            expected=f"cases of {dataset.folder}",
            remedy=f"Correct {SPLITS_NAME}.",
        )
    return replace(dataset, cases={name: dataset.cases[name] for name in sorted(names)})


def _validation_names(path: Path, fold: int) -> Sequence[str]:
    try:
        splits: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [[str(name) for name in split["val"]] for split in splits]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            "folds that cannot be read",
            got=f"{path}: {type(error).__name__}: {error}",
            expected='[{"train": […], "val": […]}, …]',
            remedy="Correct the file.",
        ) from error
    if not 0 <= fold < len(names) or not names[fold]:
        raise DatasetError(
            "a fold without validation cases",
            got=f"fold {fold}",
            expected=f"one of the {len(names)} folds of {path}, from 0",
            remedy="Correct --fold.",
        )
    return names[fold]
