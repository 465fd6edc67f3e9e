"""The files of a predicted case: labels, masks, statistics, preview. Each appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.datasets import plane_names
from stunet.files import move_into_place
from stunet.inference.image_resampling import resample_image
from stunet.inference.images import Case
from stunet.inference.label_names import LabelNames, name_extension
from stunet.inference.statistics import find_structures, measure

__all__ = ["OutputOptions", "WritingJob", "Written", "coarse_grid", "write_outputs"]

_NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class OutputOptions:
    """What is written beside the labels.

    Attributes:
        masks: One mask for each structure, ``CASE/segmentations/NAME.nii.gz`` as TotalSegmentator lays them out.
        statistics: Volume and mean intensity of each structure, ``statistics/CASE.json``.
        names_in_header: Names of the structures in the header of the label map.
        preview: Three planes through the image with the labels over them, ``previews/CASE.png``.
    """

    masks: bool = False
    statistics: bool = False
    names_in_header: bool = False
    preview: bool = False


@dataclass(frozen=True)
class WritingJob:
    """What a process needs to write a case.

    Attributes:
        case: The case.
        labels: File with its labels, an array in the order of the image's reader.
        properties: What the reader noted of the image.
        plans: Content of ``plans.json``.
        file_ending: Of the label map.
        names: Structures by label.
        output: Folder of the predictions.
        scratch: Folder on the same file system.
        options: What is written.
        crop: The part of the image that the labels' grid covers, where that is not the image's own grid.
    """

    case: Case
    labels: Path
    properties: dict[str, Any]
    plans: dict[str, Any]
    file_ending: str
    names: LabelNames
    output: Path
    scratch: Path
    options: OutputOptions
    crop: tuple[slice, ...] | None = None


class Written(NamedTuple):
    """What became of a case.

    Attributes:
        found: Voxels and volume of each structure that was found.
        problem: What is missing and why; None where nothing is.
    """

    found: dict[str, dict[str, Any]]
    problem: str | None


def write_outputs(job: WritingJob) -> Written:
    """Write all files of a case, the label map last: where it stands, the others do.

    Returns:
        What was found, and what is missing: a picture that cannot be drawn does not cost the labels.

    Raises:
        OSError: The disk is full.
    """
    reader = PlansManager(job.plans).image_reader_writer_class()
    labels = job.names.restrict(np.load(job.labels, mmap_mode="r"))
    name = f"{job.case.name}{job.file_ending}"
    finished = job.scratch / name
    _write(reader, labels, job.properties, finished)
    if job.options.names_in_header:
        _name_in_header(finished, job.names)
    if job.options.masks:
        _write_masks(reader, labels, job)
    problem = None
    if job.options.statistics or job.options.preview:
        image, properties = reader.read_images([str(path) for path in job.case.files])
        if job.crop is not None:
            spacings = properties["spacing"], job.properties["spacing"]
            image = np.stack([channel[job.crop] for channel in image])
            image = resample_image(image, labels.shape, *spacings, order=1, force_separate_z=False)
        if job.options.statistics:
            _write_statistics(image, labels, job)
        if job.options.preview:
            try:
                _write_preview(image, labels, job)
            except Exception as error:
                problem = f"no preview: {type(error).__name__}: {str(error)[:200]}"
    move_into_place(finished, job.output / name)
    return Written(find_structures(labels, job.names, job.properties["spacing"] if len(labels) > 1 else None), problem)


def coarse_grid(
    properties: Mapping[str, Any], shape: Sequence[int], transpose_backward: Sequence[int]
) -> tuple[dict[str, Any], tuple[slice, ...]]:
    """What a reader would note of an image on the network's grid, which begins and ends where the cropped image does.

    Args:
        properties: What nnU-Net's reader and preprocessing noted of the image.
        shape: Voxels of the network's grid, axes in the order of the reader.
        transpose_backward: From the network's axes to the reader's.

    Returns:
        The properties, for the reader's ``write_seg``; and the part of the image that was not cropped.
    """
    crop = tuple(slice(*properties["bbox_used_for_cropping"][i]) for i in transpose_backward)
    ratio = np.array([(part.stop - part.start) / n for part, n in zip(crop, shape, strict=True)])
    offset = np.array([part.start for part in crop]) + ratio / 2 - 0.5  # of the first voxel's centre, in voxels
    coarse = {**properties, "spacing": [float(s * r) for s, r in zip(properties["spacing"], ratio, strict=True)]}
    if "sitk_stuff" in properties:
        old = properties["sitk_stuff"]
        n_axes = len(old["spacing"])
        spacing, (scale, shift) = np.array(old["spacing"]), (values[::-1][:n_axes] for values in (ratio, offset))
        origin = np.array(old["origin"]) + np.reshape(old["direction"], (n_axes, n_axes)) @ (spacing * shift)
        coarse["sitk_stuff"] = {**old, "spacing": (spacing * scale).tolist(), "origin": origin.tolist()}
    else:
        old, to_old = properties["nibabel_stuff"], np.diag([*ratio[::-1], 1.0])
        to_old[:3, 3] = offset[::-1]
        if "reoriented_affine" not in old:
            coarse["nibabel_stuff"] = {"original_affine": old["original_affine"] @ to_old}
        else:
            affine = old["reoriented_affine"] @ to_old
            axes = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(old["original_affine"])
            )
            back = affine @ nib.orientations.inv_ornt_aff(axes, tuple(shape[::-1]))
            coarse["nibabel_stuff"] = {"original_affine": back, "reoriented_affine": affine}
    return coarse, crop


def _write(reader: Any, labels: npt.NDArray[Any], properties: Mapping[str, Any], path: Path) -> None:
    """Write with nnU-Net's writer and look whether all of it arrived: ITK says nothing where a disk is full."""
    reader.write_seg(labels, str(path), properties)
    n_bytes = labels.size * (1 if labels.max(initial=0) < 255 else 2)
    size = path.stat().st_size
    if path.name.endswith(".nii.gz"):
        with path.open("rb") as file:
            file.seek(-min(4, size), os.SEEK_END)
            (size,) = struct.unpack("<I", file.read(4).rjust(4, b"\0"))  # bytes before compression, modulo 2^32
    if path.name.endswith(_NIFTI) and not 0 <= (size - n_bytes) % 2**32 < 2**16:  # a header, and extensions
        raise OSError(
            errno.ENOSPC, "the file was not written to its end, which happens where the disk is full", str(path)
        )


def _name_in_header(path: Path, names: LabelNames) -> None:
    image: Any = nib.load(path)
    labels = np.asanyarray(image.dataobj)
    image.header.extensions.append(name_extension(names))
    named = path.with_name(f"named.{path.name}")
    nib.save(nib.Nifti1Image(labels, None, image.header), named)
    os.replace(named, path)


def _write_masks(reader: Any, labels: npt.NDArray[Any], job: WritingJob) -> None:
    folder = job.output / job.case.name / "segmentations"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = job.scratch / "mask.nii.gz"
    for name, values in job.names.structures.items():
        _write(reader, _mask(labels, values), job.properties, unfinished)
        move_into_place(unfinished, folder / f"{name.replace(os.sep, '_')}.nii.gz")


def _mask(labels: npt.NDArray[Any], values: Sequence[int]) -> npt.NDArray[np.uint8]:
    mask = labels == values[0] if len(values) == 1 else np.isin(labels, values)
    return mask.view(np.uint8)


def _write_statistics(image: npt.NDArray[Any], labels: npt.NDArray[Any], job: WritingJob) -> None:
    folder = job.output / "statistics"
    folder.mkdir(exist_ok=True)
    measured = measure(image, labels, job.names, job.properties["spacing"])
    unfinished = job.scratch / "statistics.json"
    unfinished.write_text(json.dumps(measured, indent=4) + "\n", encoding="utf-8")
    move_into_place(unfinished, folder / f"{job.case.name}.json")


def _write_preview(image: npt.NDArray[Any], labels: npt.NDArray[Any], job: WritingJob) -> None:
    from stunet.inference.preview import draw_preview  # spares the other processes matplotlib

    folder = job.output / "previews"
    folder.mkdir(exist_ok=True)
    unfinished = job.scratch / "preview.png"
    planes = plane_names(job.properties)
    draw_preview(image[0], labels, job.names, job.properties["spacing"], unfinished, title=job.case.name, planes=planes)
    move_into_place(unfinished, folder / f"{job.case.name}.png")
