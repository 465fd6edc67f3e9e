"""One case's label map with the label values of a union; what the processes of an import do.

Nothing here imports torch or nnU-Net, which each process would load anew.
"""

from __future__ import annotations

import errno
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import DatasetError
from stunet.files import atomic_path, move_into_place, write_json
from stunet.labels.label_maps import NIFTI_ENDINGS, array_of, count_values, read_other
from stunet.labels.mask_cases import ImportedCase, fingerprint, finished_record
from stunet.labels.nifti import VolumeReader, open_volume, write_volume

__all__ = ["LABEL_ENDINGS", "LabelCase", "relabel_case"]

LABEL_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".png")
"""File endings of label maps that are one file with values and geometry."""

_N_VALUES = 2**16
_SPACING_TOLERANCE = 1e-5  # of the spacing, as nnU-Net's integrity check has it


@dataclass(frozen=True)
class LabelCase:
    """A case whose label map is to be written anew.

    Attributes:
        name: Name of the case in the union.
        images: Its images, which stay where they are.
        source: Its label map.
        lookup: Value in the union by value in the source, for all values that the source lists.
        highest: The highest label value of the union, which decides the type: uint8 up to 255, else uint16.
        annotated: Structures of the union that it annotates; go into the record.
        label: Where the label map goes.
        record: Where the record goes, whose presence says that the label map is whole.
    """

    name: str
    images: tuple[Path, ...]
    source: Path
    lookup: tuple[tuple[int, int], ...]
    highest: int
    annotated: tuple[str, ...]
    label: Path
    record: Path


def relabel_case(case: LabelCase) -> ImportedCase:
    """Write the label map of a case with other values, and then its record, each whole or not at all.

    What an earlier run has finished is kept where neither the source's label map nor the output have changed since.

    Raises:
        DatasetError: A file that cannot be read, a label map on another grid than its image, or values that the source
            does not list.
    """
    source = fingerprint([case.source], [str(case.lookup), str(case.highest)])
    record = finished_record(case.record, case.label)
    if record is not None and record["source"] == source and record["annotated"] == list(case.annotated):
        return ImportedCase(True, record)
    (_relabel_nifti if case.source.name.endswith(NIFTI_ENDINGS) else _relabel_other)(case)
    record = {"source": source, "output": fingerprint([case.label]), "annotated": list(case.annotated)}
    write_json(record, case.record)
    return ImportedCase(False, record)


def _relabel_nifti(case: LabelCase) -> None:
    with open_volume(case.source) as volume:
        for image in case.images:
            with open_volume(image) as reference:
                _check_grid(case, image, _grid(volume), _grid(reference))
        labels = np.empty(math.prod(volume.shape), _dtype(case))
        with _remapping(case) as (table, counts):
            for start, chunk in volume.chunks():
                labels[start : start + chunk.size] = table[count_values(chunk, case.source, counts)]
        _begin(case)
        with atomic_path(case.label) as temporary:
            write_volume(labels, volume, temporary, compress=case.label.suffix == ".gz")


def _relabel_other(case: LabelCase) -> None:
    import SimpleITK as sitk

    source = read_other(case.source)
    for path in case.images:
        image: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
        image.SetFileName(str(path))
        try:
            image.ReadImageInformation()
        except RuntimeError as error:
            raise DatasetError(
                "an unreadable image",
                got=f"{path}: {str(error).strip().splitlines()[-1]}",
                expected="an image file that SimpleITK reads",
                remedy="Get the file again from where it came from, or leave its case out.",
            ) from error
        grids = ((i.GetSize(), i.GetSpacing()) for i in (source, image))
        _check_grid(case, path, *grids)
    with _remapping(case) as (table, counts):
        labels = table[count_values(array_of(source), case.source, counts)]
    result: Any = sitk.GetImageFromArray(labels)
    result.CopyInformation(source)
    _begin(case)
    # SimpleITK goes by the file's ending, which a temporary file beside the label map could not have.
    staging = case.record.with_name(case.label.name)
    try:
        sitk.WriteImage(result, str(staging), useCompression=True)
    except RuntimeError as error:
        staging.unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error).strip().splitlines()[-1], str(staging)) from error
    move_into_place(staging, case.label)


def _begin(case: LabelCase) -> None:
    # Only now: a case that fails before this leaves nothing behind, and what an earlier run wrote as it was.
    case.record.write_text("{}", encoding="utf-8")


def _dtype(case: LabelCase) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if case.highest <= 255 else np.uint16


@contextmanager
def _remapping(case: LabelCase) -> Iterator[tuple[npt.NDArray[Any], Counter[int]]]:
    """Yield a table of new values and counts of old ones, which must be known when the block ends."""
    lookup = dict(case.lookup)
    table = np.zeros(_N_VALUES, _dtype(case))
    table[list(lookup)] = list(lookup.values())
    counts: Counter[int] = Counter()
    yield table, counts
    unknown = sorted(set(counts) - set(lookup))
    if unknown:
        more = " …" if len(unknown) > 5 else ""
        raise DatasetError(
            "label values that the dataset.json of the source does not list",
            got=f"{case.source}: {', '.join(map(str, unknown[:5]))}{more}",
            expected=f"values from {min(lookup)} to {max(lookup)} that it lists",
            remedy="Correct the label map, or list the values.",
        )


def _grid(volume: VolumeReader) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return volume.shape, tuple(np.linalg.norm(volume.affine[:3, :3], axis=0).tolist())


def _check_grid(
    case: LabelCase,
    image: Path,
    mine: tuple[tuple[int, ...], tuple[float, ...]],
    others: tuple[tuple[int, ...], tuple[float, ...]],
) -> None:
    """Check what nnU-Net's integrity check insists on: shape and spacing. Of position and direction it only warns."""
    same_shape = mine[0] == others[0]
    if not same_shape or not np.allclose(mine[1], others[1], rtol=_SPACING_TOLERANCE, atol=0):
        what, i = ("spacing", 1) if same_shape else ("shape", 0)
        raise DatasetError(
            f"a label map of another {what} than its image",
            got=f"{os.fspath(case.source)}: {mine[i]}",
            expected=f"{others[i]}, as {image} has",
            remedy="Resample the label map to its image, or leave the case out.",
        )
