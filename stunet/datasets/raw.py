"""Reading nnU-Net's raw datasets and holding cases out of them.

Parts of nnU-Net are imported where they are needed: that takes longer than importing some cases does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from stunet.errors import DatasetError
from stunet.files import write_json

__all__ = [
    "RawDataset",
    "case_names",
    "check_hold_out",
    "exclusive_labels",
    "hold_out",
    "plane_names",
    "read_image",
    "read_plane_names",
    "read_raw_dataset",
]


@dataclass(frozen=True)
class RawDataset:
    """A dataset in nnU-Net's raw layout.

    Attributes:
        folder: The dataset's folder.
        dataset_json: Content of its ``dataset.json``.
        cases: Image files, one for each channel, and label file of each training case.
    """

    folder: Path
    dataset_json: dict[str, Any]
    cases: dict[str, tuple[list[Path], Path]]


def read_raw_dataset(folder: str | os.PathLike[str]) -> RawDataset:
    """Read what a raw dataset consists of and check that all its files are there.

    Raises:
        DatasetError: No ``dataset.json``, one that is incomplete, or files that are missing.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DatasetError(
            "no such folder",
            got=folder,
            expected="the folder of an nnU-Net raw dataset",
            remedy="Check the path, for example $nnUNet_raw/Dataset004_Hippocampus.",
        )
    try:
        dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        channels, _ = len(dataset_json["channel_names"]), dataset_json["labels"]
        listing = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            "not an nnU-Net raw dataset",
            got=f"{folder}: {type(error).__name__}: {error}",
            expected="dataset.json with channel_names, labels and file_ending, imagesTr and labelsTr",
            remedy="Bring the data into nnU-Net's raw layout (nnU-Net, documentation/dataset_format.md).",
        ) from error
    cases = {
        case: ([Path(image) for image in files["images"]], Path(files["label"])) for case, files in listing.items()
    }
    problems = [f"{f} is missing" for images, label in cases.values() for f in (*images, label) if not f.is_file()]
    problems += [f"{case} has {len(i)} of {channels} channels" for case, (i, _) in cases.items() if len(i) != channels]
    if problems or not cases:
        raise DatasetError(
            "an incomplete dataset",
            got="; ".join(problems[:3]) or f"no cases in {folder}",
            expected=f"{channels} images and one label file for each case",
            remedy="Add the missing files, or remove the cases.",
        )
    return RawDataset(folder, dataset_json, cases)


def case_names(dataset: RawDataset) -> set[str]:
    """Names of all cases that have a label map: those to train on, and those of ``labelsTs``."""
    ending = dataset.dataset_json["file_ending"]
    test = (path.name for path in (dataset.folder / "labelsTs").glob(f"*{ending}"))
    return {*dataset.cases, *(name.removesuffix(ending) for name in test)}


def check_hold_out(dataset: RawDataset, n_held_out: int) -> None:
    """Check that enough cases are left when some are held out.

    Raises:
        DatasetError: Fewer than five cases would be left for nnU-Net's five folds.
    """
    if len(dataset.cases) - n_held_out < 5:
        raise DatasetError(
            "too few cases",
            got=f"{len(dataset.cases)} cases, of which {n_held_out} shall be held out",
            expected="five or more left for training, as nnU-Net makes five folds",
            remedy="Add cases.",
        )


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
    names = sorted(dataset.cases)
    held_out = sorted(np.random.default_rng(seed).choice(names, n_held_out, replace=False).tolist())
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


def read_image(path: str | os.PathLike[str]) -> tuple[npt.NDArray[Any], tuple[float, float, float]]:
    """Read one channel of a case, or its labels, with the reader that nnU-Net takes for such files.

    Args:
        path: An image file of any format that nnU-Net reads.

    Returns:
        Array of shape ``(Z, Y, X)``, and the spacing in mm along these axes.
    """
    volume, properties = _read(path)
    z, y, x = (float(s) for s in properties["spacing"])
    return volume[0], (z, y, x)


def read_plane_names(path: str | os.PathLike[str]) -> tuple[str, str, str]:
    """The planes that lie across the axes of :func:`read_image`'s array: axial, coronal and sagittal in some order."""
    return plane_names(_read(path)[1])


def _read(path: str | os.PathLike[str]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

    reader = determine_reader_writer_from_file_ending(
        "." + Path(path).name.partition(".")[2], str(path), allow_nonmatching_filename=True, verbose=False
    )()
    volume, properties = reader.read_images([str(path)])
    return volume, properties


def plane_names(properties: Mapping[str, Any]) -> tuple[str, str, str]:
    """The anatomical planes across the axes of an array, told by the image's directions.

    Args:
        properties: What nnU-Net's reader notes of an image.

    Returns:
        Names along ``(Z, Y, X)``; those of the axes for images without directions in the patient, such as photographs.
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


def exclusive_labels(
    dataset_json: dict[str, Any],
) -> tuple[dict[str, int], Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]:
    """Names for the label values that predictions of a dataset have, and a function that merges truth into these.

    Regions overlap; nnU-Net writes them into one label map in the order of ``regions_class_order``, later ones over
    earlier ones. Truth has the dataset's own values, which may be finer.

    Args:
        dataset_json: Content of a ``dataset.json``, with regions or without.

    Returns:
        Label value by name, and the function.
    """
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    if "regions_class_order" not in dataset_json:
        return labels, lambda truth: truth
    regions = [(name, v if isinstance(v, list) else [v]) for name, v in labels.items() if v not in (0, [0])]
    names = {name: value for (name, _), value in zip(regions, dataset_json["regions_class_order"], strict=True)}

    def merge(truth: npt.NDArray[Any]) -> npt.NDArray[Any]:
        merged = np.zeros_like(truth)
        for name, values in regions:
            merged[np.isin(truth, values)] = names[name]
        return merged

    return names, merge
