"""Cases of an input folder, and what their files' headers say, before any image is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.openers import ImageOpener

from stunet.errors import DatasetError, UsageError
from stunet.labels.nifti import check_finite, open_volume

__all__ = ["Case", "Geometry", "check_voxels", "find_cases", "read_geometry"]

_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Case:
    """One case of the input folder.

    Attributes:
        name: What its prediction is called, without ending.
        files: One image for each channel, in order.
    """

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Geometry:
    """Size and spacing of a case's images.

    Attributes:
        shape: Voxels in the order of nnU-Net's arrays, ``(Z, Y, X)``; ``(1, Y, X)`` for an image with two axes.
        spacing: mm between them.
        bytes_per_voxel: What the file's own type takes.
        has_unit: Whether the file says what unit the spacing has; only NIfTI can leave it out.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    bytes_per_voxel: int
    has_unit: bool = True

    @property
    def n_voxels(self) -> int:
        """Voxels of one channel."""
        return math.prod(self.shape)


def find_cases(folder: str | os.PathLike[str], file_ending: str) -> list[Case]:
    """Find the cases of a folder: ``NAME_0000.nii.gz``, ``NAME_0001.nii.gz``, … as nnU-Net names them.

    Args:
        folder: The input folder.
        file_ending: As in ``dataset.json``.

    Raises:
        UsageError: No such folder, or no such files in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(
            "missing input folder", got=folder, expected="a folder with images", remedy="Correct -i, or create it."
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    cases: dict[str, list[Path]] = {}
    for path in files:
        if match := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(file_ending)}", path.name):
            cases.setdefault(match[1], []).append(path)
    if not cases:
        found = ", ".join(path.name for path in files[:3]) + (", …" if len(files) > 3 else "")
        raise UsageError(
            "an input folder without images for this model",
            got=f"{folder}: {f'{len(files)} files ({found})' if files else 'no files'}",
            expected=f"CASE_0000{file_ending} for each case, one file for each channel",
            remedy=f"Convert the images to {file_ending}, and number their channels from 0000.",
        )
    return [Case(name, tuple(paths)) for name, paths in sorted(cases.items())]


def read_geometry(case: Case, n_channels: int) -> Geometry:
    """Read and check the headers of a case.

    Args:
        case: The case.
        n_channels: Channels that the model takes.

    Raises:
        DatasetError: Another number of channels, a file that is no image, more or fewer axes than three (or two),
            impossible spacings, or channels of different size.
    """
    numbers = [int(path.name[len(case.name) + 1 :][:4]) for path in case.files]
    if numbers != list(range(n_channels)):
        raise DatasetError(
            "a case with other channels than the model's",
            got=f"{case.name}: {len(numbers)} channels ({', '.join(f'{n:04d}' for n in numbers)})",
            expected=f"{n_channels} channels (0000{f' to {n_channels - 1:04d}' if n_channels > 1 else ''})",
            remedy="Add the missing channels, remove surplus ones, or choose another model.",
        )
    geometries = [_read_header(path) for path in case.files]
    for path, geometry in zip(case.files, geometries, strict=True):
        if geometry.shape != geometries[0].shape or not np.allclose(geometry.spacing, geometries[0].spacing, rtol=1e-3):
            raise DatasetError(
                "channels of one case on different grids",
                got=f"{path}: {_describe(geometry)}",
                expected=f"{_describe(geometries[0])}, as {case.files[0].name} has",
                remedy="Resample the channels to one grid.",
            )
    return geometries[0]


def check_voxels(path: Path) -> None:
    """Read a NIfTI file to its end. ITK takes what is missing from a truncated file, and what is no number, for 0.

    Args:
        path: An image whose header was checked. Files of other formats are left to their readers.

    Raises:
        DatasetError: The file is truncated or damaged, or holds values that are no numbers.
    """
    if not path.name.endswith(_NIFTI) or len(_nifti_shape(_nifti_header(path))) != 3:
        return
    with open_volume(path) as volume:
        check_finite(volume)


def _describe(geometry: Geometry) -> str:
    size, spacing = (values[::-1] for values in (geometry.shape, geometry.spacing))
    return f"{' x '.join(map(str, size))} voxels of {' x '.join(f'{s:g}' for s in spacing)} mm"


def _read_header(path: Path) -> Geometry:
    has_unit = True
    try:
        if path.name.endswith(_NIFTI):
            has_unit = _check_nifti(path)
        reader: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except DatasetError:
        raise
    except Exception as error:  # readers raise whatever they like for files that are none
        raise DatasetError(
            "an image that cannot be read",
            got=f"{path}: {_last_line(error)}",
            expected="a whole image file",
            remedy="Get the file again from where it came from, or leave its case out.",
        ) from error
    size, spacing = reader.GetSize(), reader.GetSpacing()
    if len(size) not in (2, 3):
        raise _wrong_axes(path, size)
    _check_spacing(path, spacing)
    if len(size) == 2:  # nnU-Net makes one thick plane of it
        size, spacing = (*size, 1), (*spacing, 999 * max(spacing))
    dtype = sitk.GetArrayFromImage(sitk.Image([1] * len(size), reader.GetPixelID())).dtype  # type: ignore[no-untyped-call]
    z, y, x = size[::-1]
    c, b, a = spacing[::-1]
    return Geometry((z, y, x), (c, b, a), dtype.itemsize * reader.GetNumberOfComponents(), has_unit)


def _check_nifti(path: Path) -> bool:
    """Whether the header says the unit of its spacing."""
    # ITK repairs what a header must not have; nnU-Net would then predict on a grid that nobody meant.
    header = _nifti_header(path)
    shape = _nifti_shape(header)
    if len(shape) not in (2, 3):
        raise _wrong_axes(path, shape)
    _check_spacing(path, [float(s) for s in header["pixdim"][1 : 1 + len(shape)]])
    return bool(int(header["xyzt_units"]) & 7)  # the bits for lengths


def _nifti_header(path: Path) -> Any:
    """The header as it is; nibabel and ITK repair it when they load an image."""
    with ImageOpener(path) as file:
        content = file.read(540)
    nifti_2 = content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 540, the size of its header
    header_class: Any = nib.Nifti2Header if nifti_2 else nib.Nifti1Header
    return header_class(content[: 540 if nifti_2 else 348], check=False)


def _nifti_shape(header: Any) -> tuple[int, ...]:
    """Voxels, without trailing axes of length 1."""
    n_axes = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : 1 + n_axes])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_spacing(path: Path, spacing: Sequence[float]) -> None:
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise DatasetError(
            "an image with an impossible spacing",
            got=f"{path}: {' x '.join(f'{s:g}' for s in spacing)} mm",
            expected="a positive number of mm between voxels along each axis",
            remedy="Correct the header: without its spacing an image cannot be resampled to the model's.",
        )


def _wrong_axes(path: Path, size: Sequence[int]) -> DatasetError:
    return DatasetError(
        "an image with the wrong number of axes",
        got=f"{path}: {len(size)} axes, {' x '.join(map(str, size))}",
        expected="three axes",
        remedy="Write each time point or channel of the image into a file of its own.",
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
