"""Label maps: made of masks, and counted."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import DatasetError
from stunet.labels.nifti import VolumeReader, check_same_grid, open_volume

__all__ = ["NIFTI_ENDINGS", "MergedMasks", "array_of", "count_labels", "count_values", "merge_masks", "read_other"]

NIFTI_ENDINGS = (".nii.gz", ".nii")

_WORD = 8  # bytes that a processor handles as one number


@dataclass(frozen=True)
class MergedMasks:
    """A label map made of masks.

    Attributes:
        labels: Label values in the file's order, uint8 or uint16 of shape ``(X * Y * Z,)``.
        voxels: Voxels by label value, for each mask; 0 where a mask is blank or others cover it wholly.
        overlaps: How many voxels one structure has lost to another, by (loser's value, winner's value). A voxel that
            three masks claim is lost by the first to the second and by the second to the third.
    """

    labels: npt.NDArray[Any]
    voxels: dict[int, int]
    overlaps: dict[tuple[int, int], int]


def merge_masks(masks: Sequence[tuple[int, Path]], reference: VolumeReader, n_labels: int) -> MergedMasks:
    """Merge one mask per structure into one label map; later masks are painted over earlier ones.

    Masks are decoded chunk by chunk into the label map, which is all that is held in memory. Their values, scaled as
    their headers say, are 0 outside and 1 inside, or 0 and 255.

    Args:
        masks: Label value and file of each mask, in the order in which they are painted.
        reference: The image that they belong to.
        n_labels: The highest label value of the dataset, which decides the type: uint8 up to 255, else uint16.

    Raises:
        DatasetError: A mask that cannot be read, lies on another grid, or has other values.
    """
    n_voxels = math.prod(reference.shape)
    # A few voxels more, so that the last chunk can be painted word by word too.
    labels = np.zeros(n_voxels + -n_voxels % _WORD, np.uint8 if n_labels <= 255 else np.uint16)
    voxels = {value: 0 for value, _ in masks}
    overlaps: Counter[tuple[int, int]] = Counter()
    blank: set[bytes] = set()
    fitting = None
    for value, path in masks:
        with open_volume(path) as mask:
            if mask.payload in blank:  # as many masks of a scan of the trunk are, all with the same bytes
                continue
            if mask.affine is not fitting:  # masks with equal headers share their affine
                check_same_grid(mask, reference)
                fitting = mask.affine
            voxels[value], lost = _paint(mask, value, labels)
        for loser, n in lost.items():
            overlaps[loser, value] += n
            voxels[loser] -= n
        if mask.payload is not None and not voxels[value]:
            blank.add(mask.payload)
    return MergedMasks(labels[:n_voxels], voxels, dict(overlaps))


def _paint(mask: VolumeReader, value: int, labels: npt.NDArray[Any]) -> tuple[int, Counter[int]]:
    """Paint a mask: voxels inside it, and how many of them had each other value before."""
    n_inside, lost = 0, Counter[int]()
    found: set[float] = set()
    for start, chunk in mask.chunks():
        if mask.scaling is not None:
            chunk = chunk.round(4)  # slope and intercept have 32 bits: 255 times 1/255 is not quite 1
        lowest, highest = chunk.min(), chunk.max()
        if lowest == highest == 0:  # most of most masks
            continue
        if highest == 1 and chunk.dtype == labels.dtype == np.uint8:
            found.add(1)
            n, covered = _paint_words(chunk, value, labels[start : start + chunk.size + -chunk.size % _WORD])
        else:
            inside = np.flatnonzero(chunk)
            found.update(np.unique(chunk[inside]).tolist() if lowest != highest else [highest.item()])
            part = labels[start : start + chunk.size]
            n, covered = inside.size, part[inside]
            part[inside] = value
        n_inside += n
        covered = covered[covered != 0]
        if covered.size:
            lost.update({v: n for v, n in enumerate(np.bincount(covered).tolist()) if n})
        if found not in ({1}, {255}):
            raise _no_mask(mask, f"values {', '.join(f'{v:g}' for v in sorted(found)[:5])}{', …' * (len(found) > 5)}")
    if n_inside == math.prod(mask.shape) and mask.scaling is not None:
        raise _no_mask(mask, f"1 everywhere, by slope {mask.scaling[0]:g} and intercept {mask.scaling[1]:g}")
    return n_inside, lost


def _no_mask(mask: VolumeReader, got: str) -> DatasetError:
    return DatasetError(
        "a mask with other values than 0 and 1, or 0 and 255",
        got=f"{mask.path}: {got}",
        expected="0 outside the structure and 1 (or 255) inside, scl_slope and scl_inter of the header applied",
        remedy="Write the mask again: of probabilities what is above 0.5, of a label map one mask for each structure.",
    )


def _paint_words(
    chunk: npt.NDArray[np.uint8], value: int, labels: npt.NDArray[np.uint8]
) -> tuple[int, npt.NDArray[np.uint8]]:
    """Paint zeros and ones eight voxels at a time, in half the time: voxels inside, and values covered among zeros."""
    if chunk.size < labels.size:
        chunk = np.append(chunk, np.zeros(labels.size - chunk.size, np.uint8))
    mask, painted = chunk.view(np.uint64), labels.view(np.uint64)
    near = np.flatnonzero(mask != 0)
    ones, before = mask[near], painted[near]
    covered = before & (ones * np.uint64(255))  # each byte of 1 becomes one of 255: no byte reaches into the next
    painted[near] = (before ^ covered) | (ones * np.uint64(value))
    return int(ones.view(np.uint8).sum(dtype=np.int64)), covered.view(np.uint8)


def count_labels(path: str | os.PathLike[str]) -> dict[int, int]:
    """Count the voxels of each label value in a label map of any format that nnU-Net takes.

    Returns:
        Voxels by label value, for the values that occur.

    Raises:
        DatasetError: Unreadable, or with values that are no whole numbers from 0 to 65535.
    """
    path = Path(path)
    counts: Counter[int] = Counter()
    if not path.name.endswith(NIFTI_ENDINGS):
        count_values(array_of(read_other(path)), path, counts)
        return dict(sorted(counts.items()))
    with open_volume(path) as volume:
        for _, chunk in volume.chunks():
            count_values(chunk, path, counts)
    return dict(sorted(counts.items()))


def count_values(values: npt.NDArray[Any], path: Path, counts: Counter[int]) -> npt.NDArray[Any]:
    """Count values, and return them as uint8 or uint16."""
    whole = values
    if values.dtype not in (np.uint8, np.uint16):
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.uint16)
        if not np.array_equal(whole, values):
            raise DatasetError(
                "a label map with values that are no labels",
                got=f"{path}: {values.dtype} from {values.min()} to {values.max()}",
                expected="whole numbers from 0 to 65535",
                remedy="Write the label map again with whole numbers.",
            )
    found = np.bincount(whole.ravel())
    for value in np.flatnonzero(found).tolist():
        counts[value] += int(found[value])
    return whole


def read_other(path: Path) -> Any:
    """A label map of another format than NIfTI, as SimpleITK's image.

    Raises:
        DatasetError: SimpleITK cannot read it, or it has several values in each voxel.
    """
    import SimpleITK as sitk

    try:
        image: Any = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DatasetError(
            "an unreadable label map",
            got=f"{path}: {str(error).strip().splitlines()[-1]}",
            expected="an image file that SimpleITK reads",
            remedy="Write it again.",
        ) from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DatasetError(
            "a label map with several values in each voxel",
            got=f"{path}: {image.GetNumberOfComponentsPerPixel()}",
            expected="one value, not a colour",
            remedy="Write it again with label values, or leave its case out.",
        )
    return image


def array_of(image: Any) -> npt.NDArray[Any]:
    """The voxels of SimpleITK's image, of shape ``(Z, Y, X)`` or ``(Y, X)``."""
    import SimpleITK as sitk

    return np.asarray(sitk.GetArrayFromImage(image))
