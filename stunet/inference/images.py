"""Cases of an input, what their files' headers say before any image is read, and images of other formats as NIfTI."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.openers import ImageOpener

from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.volumes import check_finite, read_volume

__all__ = ["Case", "Geometry", "as_nifti", "check_voxels", "find_cases", "read_geometry", "readable"]

_NIFTI = (".nii", ".nii.gz")
#: Formats of volumes that SimpleITK reads, so that a model of one of them can take any.
_VOLUMES = (*_NIFTI, ".mha", ".mhd", ".nrrd")
#: How far a DICOM slice may lie from its place on a regular grid, as a fraction of the distance of slices.
_SLICE_TOLERANCE = 0.25


@dataclass(frozen=True)
class Case:
    """One case of the input.

    Attributes:
        name: What its prediction is called, without ending.
        files: One image for each channel, in order.
        slices: Files of a DICOM series in place of ``files``, in any order.
    """

    name: str
    files: tuple[Path, ...]
    slices: tuple[Path, ...] = ()


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


def find_cases(
    images: str | os.PathLike[str], file_ending: str, n_channels: int = 1, series: str | None = None
) -> list[Case]:
    """Find the cases of an input.

    Args:
        images: A folder with ``NAME_0000.nii.gz``, ``NAME_0001.nii.gz``, … as nnU-Net names the channels of cases; a
            folder of images with other names, one for each case, where there is one channel; one such image; or the
            folder of a DICOM series.
        file_ending: As in ``dataset.json``. Models of NIfTI, MetaImage or NRRD files take all three formats.
        n_channels: Files of a case.
        series: SeriesInstanceUID of the DICOM series to take.

    Raises:
        UsageError: No such input, no images in it, two of one name, or more than one DICOM series.
    """
    images = Path(images).resolve()
    if not images.exists():
        raise UsageError("missing input", got=images, expected="an image, or a folder", remedy="Correct -i.")
    endings = (file_ending, *_VOLUMES) if file_ending in _VOLUMES else (file_ending,)
    pattern = re.compile(rf"(.+?)(_\d{{4}})?({'|'.join(map(re.escape, endings))})")
    entries = [images] if images.is_file() else sorted(p for p in images.iterdir() if p.is_file())
    files = [path for path in entries if not path.name.startswith(".")]
    named = [(path, match) for path in files if (match := pattern.fullmatch(path.name))]
    if not named and images.is_dir() and file_ending in _VOLUMES:
        found = _find_series(images)
        if found:
            return [Case(images.name, (), _choose_series(found, series, images))]
    if not named:
        shown = ", ".join(path.name for path in files[:3]) + (", …" if len(files) > 3 else "")
        raise UsageError(
            "an input without images for this model",
            got=f"{images}: {f'{len(files)} files ({shown})' if files else 'no files'}",
            expected=f"CASE_0000{file_ending} for each case, one file for each channel; or files or folders that end "
            f"with {', '.join(dict.fromkeys(endings))}, or of a DICOM series its folder",
            remedy=f"Correct -i, or convert the images to {file_ending}.",
        )
    if series is not None:
        raise UsageError(
            "--series without a DICOM series",
            got=images,
            expected="a folder of DICOM files",
            remedy="Leave --series out.",
        )
    cases: dict[str, list[Path]] = {}
    if any(match[2] == "_0000" for _, match in named):
        for path, match in named:
            if match[2]:
                cases.setdefault(match[1], []).append(path)
        return [Case(name, tuple(paths)) for name, paths in sorted(cases.items())]
    if n_channels > 1:
        raise UsageError(
            "images without the numbers of their channels",
            got=f"{images}: {named[0][0].name}",
            expected=f"CASE_0000{file_ending} to CASE_{n_channels - 1:04d}{file_ending} for each case",
            remedy=f"Name the files of the {n_channels} channels so, and give their folder with -i.",
        )
    for path, match in named:
        cases.setdefault(match[1] + (match[2] or ""), []).append(path)
    twice = next((paths for paths in cases.values() if len(paths) > 1), None)
    if twice:
        raise UsageError(
            "two images of one name",
            got=" and ".join(path.name for path in twice),
            expected="one file for each case",
            remedy="Remove one of them, or rename it.",
        )
    return [Case(name, tuple(paths)) for name, paths in sorted(cases.items())]


def _find_series(folder: Path) -> dict[str, tuple[tuple[Path, ...], str]]:
    """Files and description of each DICOM series of images, by its SeriesInstanceUID."""
    reader: Any = sitk.ImageSeriesReader
    process: Any = sitk.ProcessObject
    warns = process.GetGlobalWarningDisplay()
    process.SetGlobalWarningDisplay(False)  # ITK warns of folders without DICOM files
    found = {}
    try:
        for uid in reader.GetGDCMSeriesIDs(str(folder)):
            files = tuple(Path(path) for path in reader.GetGDCMSeriesFileNames(str(folder), uid))
            try:
                header = _header_of_slice(files[0])
            except RuntimeError:  # reports and contours have no image
                continue
            key = "0008|103e"
            found[uid] = (files, header.GetMetaData(key).strip() if header.HasMetaDataKey(key) else "")
    finally:
        process.SetGlobalWarningDisplay(warns)
    return found


def _choose_series(
    found: dict[str, tuple[tuple[Path, ...], str]], wanted: str | None, folder: Path
) -> tuple[Path, ...]:
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))[0]
    if wanted in found:
        return found[wanted][0]
    listed = "".join(
        f"\n    {uid}  {len(files)} slice{'' if len(files) == 1 else 's'}  {text}".rstrip()
        for uid, (files, text) in found.items()
    )
    raise UsageError(
        "several DICOM series in one folder" if wanted is None else "a DICOM series that is not in the folder",
        got=f"{folder}{'' if wanted is None else f', --series {wanted}'}; it has{listed}",
        expected="one series",
        remedy=f"Choose one of them: --series {max(found, key=lambda uid: len(found[uid][0]))}",
    )


def read_geometry(case: Case, n_channels: int) -> Geometry:
    """Read and check the headers of a case.

    Args:
        case: The case.
        n_channels: Channels that the model takes.

    Raises:
        DatasetError: Another number of channels, a file that is no image, more or fewer axes than three (or two),
            impossible spacings, or channels of different size.
    """
    if case.slices:
        order, spacing, _ = _slice_grid(case.slices)
        columns, rows = _header_of_slice(case.slices[0]).GetSize()[:2]
        return Geometry((len(order), rows, columns), spacing, 4)
    matches = [re.fullmatch(rf"{re.escape(case.name)}_(\d{{4}})\..+", path.name) for path in case.files]
    numbers = [int(match[1]) if match else channel for channel, match in enumerate(matches)]
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
    check_finite(read_volume(path))


def _describe(geometry: Geometry) -> str:
    size, spacing = (values[::-1] for values in (geometry.shape, geometry.spacing))
    return f"{' x '.join(map(str, size))} voxels of {' x '.join(f'{s:g}' for s in spacing)} mm"


def _read_header(path: Path) -> Geometry:
    has_unit = True
    with readable(path):
        if path.name.endswith(_NIFTI):
            has_unit = _check_nifti(path)
        reader: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
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


@contextmanager
def readable(source: object) -> Iterator[None]:
    """Say which image it was where reading fails: readers raise whatever they like for files that are none.

    Raises:
        DatasetError: Reading failed.
    """
    try:
        yield
    except STUNetError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DatasetError(
            "an image that cannot be read",
            got=f"{source}: {(lines or [type(error).__name__])[-1][:200]}",
            expected="whole image files, on one grid",
            remedy="Get them again from where they came from, or leave the case out.",
        ) from error


def as_nifti(case: Case, file_ending: str, folder: Path) -> Case:
    """The case with images that nnU-Net's readers take: its own, or uncompressed NIfTI files made of them.

    Args:
        case: The case.
        file_ending: That the model's reader takes.
        folder: For the new files.

    Raises:
        DatasetError: Files that cannot be read.
    """
    if not case.slices and all(path.name.endswith((file_ending, *_NIFTI)) for path in case.files):
        return case
    files = []
    for channel, path in enumerate(case.files or case.slices[:1]):
        with readable(path):
            image = _read_series(case.slices) if case.slices else sitk.ReadImage(str(path))
            files.append(folder / f"image_{channel:04d}.nii")
            sitk.WriteImage(image, str(files[-1]))
    return Case(case.name, tuple(files))


def _read_series(slices: Sequence[Path]) -> Any:
    order, spacing, direction = _slice_grid(slices)
    reader: Any = sitk.ImageSeriesReader()  # type: ignore[no-untyped-call]
    reader.SetFileNames([str(slices[i]) for i in order])
    reader.SetOutputPixelType(sitk.sitkFloat32)  # else the first slice's, which may hold no fractions
    image: Any = reader.Execute()
    image.SetSpacing(spacing[::-1])
    image.SetDirection(direction.T.ravel().tolist())
    return image


def _header_of_slice(path: Path) -> Any:
    reader: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _slice_grid(slices: Sequence[Path]) -> tuple[list[int], tuple[float, float, float], npt.NDArray[np.float64]]:
    """Order of the slices, spacing ``(Z, Y, X)``, and directions of the axes X, Y and Z, one in each row.

    Raises:
        DatasetError: The slices make no regular grid: some are missing, doubled, tilted or of another kind.
    """
    folder, headers = slices[0].parent, []
    for path in slices:
        with readable(path):
            reader = _header_of_slice(path)
            position, axes = (
                [float(v) for v in reader.GetMetaData(tag).split("\\")] for tag in ("0020|0032", "0020|0037")
            )
            headers.append((reader.GetSize(), reader.GetSpacing()[:2], axes, position))
    for path, (size, spacing, axes, _) in zip(slices, headers, strict=True):
        (wanted, same_spacing, same_axes), first = headers[0][:3], slices[0].name
        if size != wanted or not np.allclose((*spacing, *axes), (*same_spacing, *same_axes), atol=1e-3):
            raise _irregular(folder, f"{path.name} and {first} differ in size, spacing of pixels or orientation")
    if len(slices) < 2 or headers[0][0][2:] not in ((), (1,)):
        raise _irregular(folder, "one file alone, which holds one slice or all of them")
    row, column = np.array(headers[0][2]).reshape(2, 3)
    normal = np.cross(row, column)
    positions = np.array([position for *_, position in headers])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    gaps = np.diff(positions @ normal)
    distance = float(gaps.mean())
    off = np.linalg.norm(positions - positions[0] - np.outer(np.arange(len(slices)) * distance, normal), axis=1)
    if distance <= 0 or off.max() > _SLICE_TOLERANCE * distance:
        widest = int(gaps.argmax())
        before, after = (slices[order[i]].name for i in (widest, widest + 1))
        usual = float(np.median(gaps))
        got = f"slices {usual:g} mm apart, but {gaps[widest]:g} mm between {before} and {after}"
        if np.allclose(gaps, usual, atol=_SLICE_TOLERANCE * abs(usual)):
            got = f"slices that are shifted sideways, by {off.max():g} mm in all, as with a tilted gantry"
        elif gaps.min() < 0.01 * usual or usual <= 0:
            got = f"several slices at one place, such as {slices[order[int(gaps.argmin())]].name}"
        raise _irregular(folder, got)
    x, y = headers[0][1]
    return [int(i) for i in order], (distance, float(y), float(x)), np.stack([row, column, normal])


def _irregular(folder: Path, got: str) -> DatasetError:
    return DatasetError(
        "a DICOM series that is no regular volume",
        got=f"{folder}: {got}",
        expected="parallel slices of one size at equal distances, each in a file",
        remedy="Add missing slices, or make a NIfTI file of the right ones, for example with dcm2niix.",
    )
