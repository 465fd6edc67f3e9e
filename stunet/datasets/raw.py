"""nnU-Net's raw datasets: reading them, holding cases out, and keeping their preprocessed folder in step.

Parts of nnU-Net are imported where they are needed: that takes longer than importing some cases does.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from stunet.errors import DatasetError, reading
from stunet.files import atomic_path, write_json
from stunet.labels.annotations import MANIFEST_NAME, AnnotationManifest, read_manifest

SPLITS_NAME = "splits_final.json"
"""Name of nnU-Net's file with the folds, which it reads from the preprocessed folder alone."""

_REMEDY = "give dataset.json with channel_names, labels and file_ending, imagesTr and labelsTr"
_NO_RAW_DATASET = ("not an nnU-Net raw dataset", DatasetError, _REMEDY)


@dataclass(frozen=True)
class RawDataset:
    """A dataset in nnU-Net's raw layout."""

    folder: Path
    dataset_json: dict[str, Any]  # content of its dataset.json
    cases: dict[str, tuple[list[Path], Path]]  # image files, one for each channel, and label file of each training case


def read_raw_dataset(folder: str | os.PathLike[str]) -> RawDataset:
    """Read what a raw dataset consists of and check that all its files are there.

    Raises:
        DatasetError: No ``dataset.json``, one that is incomplete, or files that are missing.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder, dataset_json, channels = _read_description(folder)
    with reading(folder, *_NO_RAW_DATASET):
        listing = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
        cases = {case: (list(map(Path, f["images"])), Path(f["label"])) for case, f in listing.items()}
    return _check_complete(RawDataset(folder, dataset_json, cases), folder, channels)


def _check_complete(dataset: RawDataset, place: Path, channels: int) -> RawDataset:
    cases = dataset.cases
    problems = [f"{f} is missing" for images, label in cases.values() for f in (*images, label) if not f.is_file()]
    problems += [f"{case} has {len(i)} of {channels} channels" for case, (i, _) in cases.items() if len(i) != channels]
    if problems or not cases:
        found = "; ".join(problems[:3]) or f"no cases in {place}"
        raise DatasetError(f"incomplete dataset: {found}; each case needs {channels} images and one label file")
    return dataset


def _read_description(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], int]:
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DatasetError(f"no such folder {folder}: give a raw dataset, such as $nnUNet_raw/Dataset004_Hippocampus")
    with reading(folder, *_NO_RAW_DATASET):
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        channels, _, _ = len(content["channel_names"]), content["labels"], content["file_ending"]
    return folder, content, channels


def read_test_dataset(folder: str | os.PathLike[str]) -> RawDataset:
    """Return a raw dataset whose cases are those of ``imagesTs`` that have a label map in ``labelsTs``.

    Raises:
        DatasetError: No ``dataset.json``, no label maps, or a label map without its images.
    """
    folder, dataset_json, channels = _read_description(folder)
    ending = dataset_json["file_ending"]
    cases = {}
    for label in sorted((folder / "labelsTs").glob(f"*{ending}")):
        case = label.name.removesuffix(ending)
        cases[case] = ([folder / "imagesTs" / f"{case}_{c:04d}{ending}" for c in range(channels)], label)
    return _check_complete(RawDataset(folder, dataset_json, cases), folder / "labelsTs", channels)


def read_validation_dataset(folder: str | os.PathLike[str], fold: int) -> RawDataset:
    """Return a raw dataset whose cases are the validation cases of a fold.

    The ``splits_final.json`` of its folder in ``nnUNet_preprocessed`` goes before its own.

    Raises:
        DatasetError: No such fold, or cases that the dataset does not have.
    """
    dataset = read_raw_dataset(folder)
    beside = Path(os.environ.get("nnUNet_preprocessed") or dataset.folder.parent) / dataset.folder.name
    places = [place / SPLITS_NAME for place in dict.fromkeys((beside, dataset.folder))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        both = " and no ".join(map(str, places))
        raise DatasetError(f"missing folds: no {both}; set nnUNet_preprocessed to where it was trained, or omit --fold")
    with reading(path, "a list of folds that cannot be used", DatasetError, 'give [{"train": […], "val": […]}, …]'):
        folds = [[str(name) for name in split["val"]] for split in json.loads(path.read_text(encoding="utf-8"))]
    if not 0 <= fold < len(folds) or not folds[fold]:
        raise DatasetError(f"fold {fold} has no validation cases: choose one of {len(folds)} folds of {path}, from 0")
    if unknown := next((name for name in folds[fold] if name not in dataset.cases), None):
        raise DatasetError(f"{path} has case {unknown}, which {dataset.folder} has not: correct {SPLITS_NAME}")
    return replace(dataset, cases={name: dataset.cases[name] for name in sorted(folds[fold])})


def case_names(dataset: RawDataset) -> set[str]:
    """Return the names of all cases that have a label map: those to train on, and those of ``labelsTs``."""
    ending = dataset.dataset_json["file_ending"]
    test = (path.name for path in (dataset.folder / "labelsTs").glob(f"*{ending}"))
    return {*dataset.cases, *(name.removesuffix(ending) for name in test)}


def check_hold_out(dataset: RawDataset, n_held_out: int) -> None:
    """Check that enough cases are left when some are held out.

    Raises:
        DatasetError: Fewer than five cases would be left for nnU-Net's five folds.
    """
    if len(dataset.cases) - n_held_out < 5:
        raise DatasetError(f"too few cases: {len(dataset.cases)} without {n_held_out} to test on; five folds need five")


def hold_out(dataset: RawDataset, folder: str | os.PathLike[str], *, n_held_out: int, seed: int = 0) -> list[str]:
    """Write a dataset that trains on some cases of another and tests on the rest; training images stay in place.

    Args:
        dataset: The dataset; not changed.
        folder: Folder of the new dataset, which refers to the training files by their path and holds copies of the
            test cases in ``imagesTs`` and ``labelsTs``.
        n_held_out: Number of test cases.
        seed: Equal seeds hold out equal cases.

    Returns:
        Names of the cases held out.

    Raises:
        DatasetError: Fewer than five cases would be left for nnU-Net's five folds.
    """
    check_hold_out(dataset, n_held_out)
    held_out = sorted(np.random.default_rng(seed).choice(sorted(dataset.cases), n_held_out, replace=False).tolist())
    folder, ending = Path(folder), dataset.dataset_json["file_ending"]
    for name in ("imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in held_out:
        images, label = dataset.cases[case]
        for channel, image in enumerate(images):
            shutil.copyfile(image, folder / "imagesTs" / f"{case}_{channel:04d}{ending}")
        shutil.copyfile(label, folder / "labelsTs" / f"{case}{ending}")
    training = {
        case: {"images": [str(image) for image in images], "label": str(label)}
        for case, (images, label) in dataset.cases.items()
        if case not in held_out
    }
    write_json({**dataset.dataset_json, "numTraining": len(training), "dataset": training}, folder / "dataset.json")
    return held_out


def read_image(path: str | os.PathLike[str]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Read one channel of a case, or its labels, with the reader that nnU-Net takes for such files.

    Returns:
        Array of shape ``(Z, Y, X)``, and the reader's properties, with the ``spacing`` in mm along these axes.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

    reader = determine_reader_writer_from_file_ending(
        "." + Path(path).name.partition(".")[2], str(path), allow_nonmatching_filename=True, verbose=False
    )()
    volume, properties = reader.read_images([str(path)])
    return volume[0], properties


def plane_names(properties: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the anatomical planes across the axes ``(Z, Y, X)`` of an array, told by the image's directions.

    For images without directions in the patient, such as photographs, these are names of the axes.
    """
    directions = np.ravel(properties.get("sitk_stuff", {}).get("direction", ()))
    affines = properties.get("nibabel_stuff", {})
    affine = np.eye(4)
    if directions.size == 9:
        affine[:3, :3] = directions.reshape(3, 3)
    elif affines:
        affine = np.asarray(affines.get("reoriented_affine", affines["original_affine"]))
    else:
        return "first axis", "second axis", "third axis"
    # Signs differ between ITK (LPS) and NIfTI (RAS), the planes do not. Arrays have their axes in reverse order.
    z, y, x = (("sagittal", "coronal", "axial")[int(axis)] for axis in io_orientation(affine)[::-1, 0])
    return z, y, x


def sync_to_preprocessed(
    raw: str | os.PathLike[str], preprocessed: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Copy manifest and folds from a dataset's raw folder into its preprocessed one.

    Args:
        raw: For example ``$nnUNet_raw/Dataset101_TotalSegmentator``.
        preprocessed: The folder of the same name in ``nnUNet_preprocessed``; made where it does not exist.
        overwrite: Whether files that differ are replaced. Otherwise they are left alone: they may belong to data that
            was preprocessed before the raw dataset changed.

    Returns:
        The files that differ and were left alone.
    """
    left = []
    for name in (MANIFEST_NAME, SPLITS_NAME):
        source, target = Path(raw) / name, Path(preprocessed) / name
        content, present = (path.read_bytes() if path.is_file() else None for path in (source, target))
        if content == present or (content is None and name == SPLITS_NAME):
            continue  # nnU-Net makes folds of its own where the raw folder has none
        if present is not None and not overwrite:
            left.append(target)
        elif content is None:
            target.unlink()
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                temporary.write_bytes(content)
    return left


def _dataset_folders(dataset_name: str) -> list[Path]:
    """The dataset's folders in ``nnUNet_raw`` and ``nnUNet_preprocessed``, those that are set."""
    variables = ("nnUNet_raw", "nnUNet_preprocessed")
    return [Path(value) / dataset_name for variable in variables if (value := os.environ.get(variable))]


def has_annotations(dataset_name: str) -> bool:
    """Whether a dataset, such as ``Dataset101_TotalSegmentator``, has a manifest, raw or preprocessed."""
    return any((folder / MANIFEST_NAME).is_file() for folder in _dataset_folders(dataset_name))


def read_annotations(dataset_name: str, dataset_json: Mapping[str, Any]) -> AnnotationManifest:
    """Read what the cases of a preprocessed dataset annotate; what trainers call, in the process of rank 0 first.

    The preprocessed folder's manifest counts, since it belongs to the data beside it; where it is missing, the raw
    folder's is copied, with the folds. Where they differ, only the user can know whether the data was preprocessed
    before or after the change, and training on the wrong one would teach that annotated structures are background.

    Raises:
        DatasetError: Raw and preprocessed manifest differ.
        LabelError: The manifest is malformed, or does not fit ``dataset.json``.
    """
    folders = _dataset_folders(dataset_name)
    if not folders:
        raise DatasetError("neither nnUNet_raw nor nnUNet_preprocessed is set: set at least one of these variables")
    # Training may run where the raw data is not; then there is nothing to compare with.
    if len(folders) == 2 and (folders[0] / "dataset.json").is_file():
        left = [path for path in sync_to_preprocessed(*folders) if path.name == MANIFEST_NAME]
        changed = _first_difference(left[0], folders[0] / MANIFEST_NAME) if left else ""
        if changed:
            got = f"annotations have changed since preprocessing, {left[0]} differs from the raw dataset's ({changed})"
            remedy = f"run stunet labels carry -d {dataset_name}, after nnUNetv2_preprocess if label maps changed too"
            raise DatasetError(f"{got}: {remedy}")
    return read_manifest(folders[-1] / MANIFEST_NAME, labels=dataset_json["labels"])


def _first_difference(old_path: Path, new_path: Path) -> str:
    """Where two manifests differ; nowhere where bytes differ and the meaning does not."""
    if not new_path.is_file():
        return "it was removed"
    try:
        old, new = (dict(json.loads(path.read_text(encoding="utf-8"))) for path in (old_path, new_path))
    except (OSError, ValueError, TypeError):
        return "they cannot be compared"
    key = min((key for key in {*old, *new} if old.get(key, {}) != new.get(key, {})), default="")
    a, b = (content.get(key, {}) for content in (old, new))
    if isinstance(a, dict) and isinstance(b, dict) and a != b:
        return f"{key}, {min(name for name in {*a, *b} if a.get(name) != b.get(name))}"
    return str(key)
