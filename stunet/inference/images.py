"""Cases of an input: what their headers say, DICOM series as volumes, and their images on the network's grid."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.openers import ImageOpener
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from scipy import ndimage

from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.inference.model import Model
from stunet.volumes import NIFTI_ENDINGS, check_finite, not_numbers, read_volume

#: Formats of volumes that SimpleITK reads, so that a model of one of them can take any.
_VOLUMES = (*NIFTI_ENDINGS, ".mha", ".mhd", ".nrrd")
#: How far a DICOM slice may lie from its place on a regular grid, as a fraction of the distance of slices.
_SLICE_TOLERANCE = 0.25
#: Smaller entries of resampling matrices, the far ends of the spline's filter, change nothing in single precision.
_NEGLIGIBLE = 1e-13
#: Double-precision elements that are resampled at a time.
_BLOCK_ELEMENTS = 2**21
_OPTIONS = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}


@dataclass(frozen=True)
class Case:
    """One case of the input."""

    name: str  # what its prediction is called, without ending
    files: tuple[Path, ...]  # one image for each channel, in order
    slices: tuple[Path, ...] = ()  # files of a DICOM series in place of files, in the order of their positions


@dataclass(frozen=True)
class Geometry:
    """Size and spacing of a case's images."""

    shape: tuple[int, ...]  # voxels in the order of nnU-Net's arrays, (Z, Y, X); (1, Y, X) for an image with two axes
    spacing: tuple[float, ...]  # mm between them
    bytes_per_voxel: int  # what the file's own type takes
    has_unit: bool = True  # whether the file says what unit the spacing has; only NIfTI can leave it out

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape[::-1]))} voxels of {_mm(self.spacing[::-1])}"


def find_cases(images: str | os.PathLike[str], model: Model, series: str | None = None) -> list[Case]:
    """Find the cases of an input.

    Args:
        images: A folder with ``NAME_0000.nii.gz``, ``NAME_0001.nii.gz``, … as nnU-Net names the channels of cases; a
            folder of images with other names, one for each case, where there is one channel; one such image; or the
            folder of a DICOM series.
        model: The model. Those of NIfTI, MetaImage or NRRD files take all three formats.
        series: SeriesInstanceUID of the DICOM series to take.

    Raises:
        UsageError: No such input, no images in it, two of one name, or more than one DICOM series.
    """
    file_ending, n_channels = model.file_ending, model.n_channels if model.reads_volumes else 1
    images = Path(images).resolve()
    if not images.exists():
        raise UsageError(f"the input {images} is missing: correct -i")
    endings = (file_ending, *_VOLUMES) if file_ending in _VOLUMES else (file_ending,)
    pattern = re.compile(rf"(.+?)(_\d{{4}})?({'|'.join(map(re.escape, endings))})")
    entries = [images] if images.is_file() else sorted(p for p in images.iterdir() if p.is_file())
    files = [path for path in entries if not path.name.startswith(".")]
    named = [(path, match) for path in files if (match := pattern.fullmatch(path.name))]
    if not named:
        if images.is_dir() and file_ending in _VOLUMES and (slices := _find_series(images, series)):
            return [Case(images.name, (), slices)]
        shown = ", ".join(path.name for path in files[:3]) + (", …" if len(files) > 3 else "") or "no files"
        text = f"{images} has no images for this model, but {shown}: give CASE_0000{file_ending} for each case, files"
        raise UsageError(f"{text} that end with {', '.join(dict.fromkeys(endings))}, or the folder of a DICOM series")
    if series is not None:
        raise UsageError(f"{images} is no folder of DICOM files: leave --series out")
    cases: dict[str, list[Path]] = {}
    numbered = any(match[2] == "_0000" for _, match in named)
    if n_channels > 1 and not numbered:
        last = f"CASE_{n_channels - 1:04d}{file_ending}"
        raise UsageError(f"{named[0][0]} has no channel number: name the files CASE_0000{file_ending} to {last}")
    for path, match in named:
        if match[2] or not numbered:
            cases.setdefault(match[1] if numbered else match[1] + (match[2] or ""), []).append(path)
    for paths in cases.values():
        if len(paths) > 1 and not numbered:
            raise UsageError(f"{' and '.join(p.name for p in paths)} are images of one name: rename one of them")
    return [Case(name, tuple(paths)) for name, paths in sorted(cases.items())]


def read_geometry(case: Case, n_channels: int) -> Geometry:
    """Read and check the headers of a case.

    Raises:
        DatasetError: Another number of channels, a file that is no image, more or fewer axes than three (or two),
            impossible spacings, or channels of different size.
    """
    if case.slices:
        spacing, _ = _slice_grid(case.slices)
        columns, rows = _slice_header(case.slices[0]).GetSize()[:2]
        return Geometry((len(case.slices), rows, columns), spacing, 4)
    matches = [re.fullmatch(rf"{re.escape(case.name)}_(\d{{4}})\..+", path.name) for path in case.files]
    numbers = [int(match[1]) if match else channel for channel, match in enumerate(matches)]
    if numbers != list(range(n_channels)):
        found, last = ", ".join(f"{n:04d}" for n in numbers), f"{n_channels - 1:04d}"
        raise DatasetError(f"{case.name} has {len(numbers)} channels ({found}), but the model takes 0000 to {last}")
    first = _read_header(case.files[0])
    for path in case.files[1:]:
        geometry = _read_header(path)
        if geometry.shape != first.shape or not np.allclose(geometry.spacing, first.spacing, rtol=1e-3):
            raise DatasetError(f"{path} has {geometry}, but {case.files[0].name} {first}: resample it to that grid")
    return first


@contextmanager
def readable(source: object, problem: str = "cannot be read") -> Iterator[None]:
    """Name the image where reading it fails: readers raise whatever they like for files that are none."""
    try:
        yield
    except STUNetError:
        raise
    except Exception as error:
        said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise DatasetError(f"{source} {problem} ({said[:200]}): get it again, or leave its case out") from error


def _nifti_header(path: Path) -> tuple[Any, tuple[int, ...]]:
    """The header as it is, which nibabel and ITK repair, and the shape without trailing axes of length 1."""
    with ImageOpener(path) as file:
        content = file.read(540)
    kind: Any = nib.Nifti2Header if content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Header
    header = kind(content[: kind.template_dtype.itemsize], check=False)
    if header["sizeof_hdr"] not in (348, 540):
        raise ValueError("no NIfTI header")
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return header, shape


def _read_header(path: Path) -> Geometry:
    with readable(path):
        if path.name.endswith(NIFTI_ENDINGS):
            # ITK repairs what a header must not have; nnU-Net would then predict on a grid that nobody meant.
            header, size = _nifti_header(path)
            spacing = tuple(float(side) for side in header["pixdim"][1 : 1 + len(size)])
            n_bytes, has_unit = int(header["bitpix"]) // 8, bool(int(header["xyzt_units"]) & 7)  # the bits for lengths
        else:
            reader = read_volume(path, header_only=True).header
            size, spacing, has_unit = reader.GetSize(), reader.GetSpacing(), True
            pixel: Any = sitk.Image([1] * len(size), reader.GetPixelID())  # type: ignore[no-untyped-call]
            n_bytes = sitk.GetArrayFromImage(pixel).dtype.itemsize * reader.GetNumberOfComponents()
    if len(size) not in (2, 3):
        raise DatasetError(f"{path} has {len(size)} axes ({' x '.join(map(str, size))}), not three: write each alone")
    if not all(math.isfinite(side) and side > 0 for side in spacing):
        raise DatasetError(f"{path} has an impossible spacing of {_mm(spacing)}: correct its header")
    if len(size) == 2:  # nnU-Net makes one thick plane of it
        size, spacing = (*size, 1), (*spacing, 999 * max(spacing))
    return Geometry(tuple(size[::-1]), tuple(spacing[::-1]), n_bytes, has_unit)


def _mm(sides: Sequence[float]) -> str:
    return f"{' x '.join(f'{side:g}' for side in sides)} mm"


# DICOM ----------------------------------------------------------------------------------------------------------------


def _find_series(folder: Path, wanted: str | None) -> tuple[Path, ...] | None:
    """Files of the DICOM series of images that is wanted, or the only one; None where the folder has none.

    GDCM sorts them by their positions, whatever their names and instance numbers say.
    """
    reader: Any = sitk.ImageSeriesReader
    process: Any = sitk.ProcessObject
    warns = process.GetGlobalWarningDisplay()
    process.SetGlobalWarningDisplay(False)  # ITK warns of folders without DICOM files
    found, listed = {}, ""
    for uid in reader.GetGDCMSeriesIDs(str(folder)):
        files = tuple(Path(path) for path in reader.GetGDCMSeriesFileNames(str(folder), uid))
        with suppress(RuntimeError):  # reports and contours have no image
            header, key = _slice_header(files[0]), "0008|103e"
            said = header.GetMetaData(key).strip() if header.HasMetaDataKey(key) else ""
            found[uid], listed = files, f"{listed}\n    {uid}  {len(files)} slices  {said}".rstrip()
    process.SetGlobalWarningDisplay(warns)
    if wanted in found or not found:
        return found.get(wanted)
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    said = f"{len(found)} DICOM series" if wanted is None else f"no DICOM series {wanted}, but {len(found)} others"
    raise UsageError(f"{folder} has {said}: choose one, for example with --series {next(iter(found))}{listed}")


def _slice_header(path: Path) -> Any:
    reader: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _slice_grid(slices: Sequence[Path]) -> tuple[tuple[float, float, float], npt.NDArray[np.float64]]:
    """Spacing ``(Z, Y, X)``, and directions of the axes X, Y and Z, one in each row.

    Slices that make no regular grid are refused: some are missing, doubled, tilted or of another kind.
    """
    irregular = f"{slices[0].parent} is no regular volume: "
    remedy = "; add missing slices, or make a NIfTI file of the right ones, for example with dcm2niix"
    rows = []
    for path in slices:
        with readable(path):
            header = _slice_header(path)
            place, axes = ([float(v) for v in header.GetMetaData(t).split("\\")] for t in ("0020|0032", "0020|0037"))
            rows.append([*(*header.GetSize(), 1)[:3], *header.GetSpacing()[:2], *axes, *place])
    table = np.array(rows)
    if len(other := np.flatnonzero(np.abs(table - table[0])[:, :11].max(axis=1) > 1e-3)):
        names = f"{slices[other[0]].name} and {slices[0].name}"
        raise DatasetError(f"{irregular}{names} differ in size, spacing of pixels or orientation{remedy}")
    if len(slices) < 2 or rows[0][2] != 1:
        raise DatasetError(f"{irregular}one file alone, which holds one slice or all of them{remedy}")
    x, y, row, column, places = *rows[0][3:5], table[0, 5:8], table[0, 8:11], table[:, 11:]
    normal = np.cross(row, column)
    gaps = np.diff(places @ normal)
    distance, usual = float(gaps.mean()), float(np.median(gaps))
    off = np.linalg.norm(places - places[0] - np.outer(np.arange(len(slices)) * distance, normal), axis=1).max()
    if distance <= 0 or off > _SLICE_TOLERANCE * distance:
        odd = int(np.abs(gaps - usual).argmax())
        names = " and ".join(path.name for path in slices[odd : odd + 2])
        found = f"slices are {abs(usual):g} mm apart, but {abs(gaps[odd]):g} mm between {names}"
        if np.allclose(gaps, usual, atol=_SLICE_TOLERANCE * abs(usual)):
            found = f"slices are shifted sideways by {off:g} mm in all, as with a tilted gantry"
        raise DatasetError(f"{irregular}{found}{remedy}")
    return (distance, y, x), np.stack([row, column, normal])


def as_nifti(case: Case, file_ending: str, folder: Path) -> Case:
    """Return the case with images that nnU-Net's readers take: its own, or uncompressed NIfTI files made of them."""
    if not case.slices and all(path.name.endswith((file_ending, *NIFTI_ENDINGS)) for path in case.files):
        return case
    files = []
    for channel, path in enumerate(case.files or case.slices[:1]):
        with readable(path):
            image = _read_series(case.slices) if case.slices else sitk.ReadImage(str(path))
            files.append(folder / f"image_{channel:04d}.nii")
            sitk.WriteImage(image, str(files[-1]))
    return Case(case.name, tuple(files))


def _read_series(slices: Sequence[Path]) -> Any:
    spacing, direction = _slice_grid(slices)
    reader: Any = sitk.ImageSeriesReader()  # type: ignore[no-untyped-call]
    reader.SetFileNames(list(map(str, slices)))
    reader.SetOutputPixelType(sitk.sitkFloat32)  # else the first slice's, which may hold no fractions
    image: Any = reader.Execute()
    image.SetSpacing(spacing[::-1])
    image.SetDirection(direction.T.ravel().tolist())
    return image


# What the network sees ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseArray:
    """An array of a case between two steps: its image on the network's grid, or its labels."""

    case: Case  # the case; its files are in the scratch folder where they had to be converted
    path: Path  # file with the array, (C, X, Y, Z) or (Z, Y, X), in a scratch folder of the case
    properties: dict[str, Any]  # what nnU-Net notes of the original grid


class _LowMemoryConfiguration(ConfigurationManager):
    """A configuration whose images are resampled in little memory, and whose masks of non-zero voxels are not."""

    @property
    def resampling_fn_data(self) -> Callable[..., Any]:
        kwargs = self.configuration["resampling_fn_data_kwargs"]
        if is_default_resampling(self.configuration, "data") and kwargs.get("order_z", 0) == 0:
            return partial(resample_image, **{k: v for k, v in kwargs.items() if k not in ("is_seg", "order_z")})
        usual: Callable[..., Any] = super().resampling_fn_data
        return usual

    @property
    def resampling_fn_seg(self) -> Callable[..., Any]:
        # After normalization, which comes first, only training looks at the mask.
        return lambda mask, *_: np.zeros((1,) * mask.ndim, mask.dtype)


def prepare(case: Case, model: Model, scratch: Path, *, preprocessed: bool = True) -> CaseArray:
    """Read and preprocess a case as nnU-Net does, and write the result into a folder of its name in ``scratch``.

    Without preprocessing, images that the model's reader does not take are converted and no more.

    Raises:
        DatasetError: The files cannot be read, hold values that are no numbers, or cannot be preprocessed.
    """
    properties: dict[str, Any] = {}
    folder = scratch / case.name
    folder.mkdir(exist_ok=True)
    case = as_nifti(case, model.file_ending, folder)
    if preprocessed:
        read = [read_images(case, model)]
        with readable(case.name, "cannot be preprocessed"):
            image, properties = preprocess(model, read)
        np.save(folder / "image.npy", image)
    return CaseArray(case, folder / "image.npy", properties)


def preprocess(model: Model, read: list[tuple[npt.NDArray[Any], dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Bring an image ``(C, Z, Y, X)`` to the network's grid as nnU-Net does, and return it with nnU-Net's properties.

    The list is emptied: it has the only reference to the voxels, so that they are freed once nnU-Net has its own copy.
    """
    configuration, properties = _LowMemoryConfiguration(model.configuration_manager.configuration), read[0][1]
    image, _, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
        read.pop()[0], None, properties, model.plans_manager, configuration, model.dataset_json
    )
    return np.asarray(image, dtype=np.float32), properties


def read_images(case: Case, model: Model) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Read the images ``(C, Z, Y, X)`` of a case with the model's reader, and check that they are whole and finite."""
    with readable(", ".join(map(str, case.files))):
        for path in case.files:  # ITK takes what is missing from a truncated file, and what is no number, for 0
            if path.name.endswith(NIFTI_ENDINGS) and len(_nifti_header(path)[1]) == 3:
                check_finite(read_volume(path))
        voxels, properties = model.plans_manager.image_reader_writer_class().read_images(list(map(str, case.files)))
    if n_bad := sum(int(plane.size - np.isfinite(plane).sum()) for channel in voxels for plane in channel):
        raise not_numbers(case.name, n_bad)
    return voxels, properties


# Resampling -----------------------------------------------------------------------------------------------------------
#
# nnU-Net's ``resample_data_or_seg_to_shape`` turns the whole image into double precision, pads it and filters it: up to
# seven times the image. Spline interpolation to a finer or coarser grid is linear and works on each axis by itself, so
# along each axis it is a matrix, whose columns are what interpolation makes of single voxels. Applied to a few planes
# at a time, the matrices give the same numbers up to the last bit of single precision.


def is_default_resampling(configuration: Mapping[str, Any], kind: str) -> bool:
    """Tell whether plans resample ``data`` or ``probabilities`` as nnU-Net does by default, but for the order."""
    options = configuration[f"resampling_fn_{kind}_kwargs"]
    is_default = configuration[f"resampling_fn_{kind}"] == "resample_data_or_seg_to_shape"
    return is_default and set(options) <= _OPTIONS and not options.get("is_seg", False)


def resample_image(
    image: npt.NDArray[np.float32],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order: int,
    force_separate_z: bool | None = None,
    **threshold: float,
) -> npt.NDArray[np.float32]:
    """Resample an image ``(C, X, Y, Z)`` as nnU-Net's ``resample_data_or_seg_to_shape`` does with ``order_z`` 0.

    Args:
        image: ``(C, X, Y, Z)``.
        new_shape: Voxels ``(X, Y, Z)`` of the result.
        spacing: mm between voxels.
        new_spacing: mm between voxels of the result.
        order: Order of the spline.
        force_separate_z: Whether the planes along one axis are resampled each by itself; None for nnU-Net's choice.
        **threshold: ``separate_z_anisotropy_threshold`` where it is not nnU-Net's own.
    """
    new_shape = tuple(int(n) for n in new_shape)
    if image.shape[1:] == new_shape:
        return image
    separate, axis = determine_do_sep_z_and_axis(force_separate_z, spacing, new_spacing, **threshold)
    result = np.empty((len(image), *new_shape), image.dtype)
    for source, target in zip(image, result, strict=True):
        if not separate:
            _resample(source, target, order)
            continue
        planes, results = np.moveaxis(source, axis, 0), np.moveaxis(target, axis, 0)
        nearest = np.floor((np.arange(len(results)) + 0.5) * (len(planes) / len(results))).astype(int)
        for i, index in enumerate(nearest.clip(max=len(planes) - 1)):
            _resample(planes[index : index + 1], results[i : i + 1], order)
    return result


def _resample(source: npt.NDArray[np.float32], target: npt.NDArray[np.float32], order: int) -> None:
    planes, rows, columns = (_matrix(*n, order) for n in zip(source.shape, target.shape, strict=True))
    low, high = source.min(), source.max()  # where the overshoot of splines is cut off
    at_once = max(1, _BLOCK_ELEMENTS // (source.shape[1] * source.shape[2]))
    for start in range(0, len(target), at_once):
        block = planes[start : start + at_once]
        used = np.flatnonzero(block.any(axis=0))
        first, last = used[0], used[-1] + 1
        mixed = np.empty((len(block), *source.shape[1:]))
        n_rows = max(1, _BLOCK_ELEMENTS // ((last - first) * source.shape[2]))
        for row in range(0, source.shape[1], n_rows):
            part = source[first:last, row : row + n_rows].astype(np.float64)
            mixed[:, row : row + n_rows] = np.tensordot(block[:, first:last], part, axes=1)
        for plane, out in zip(mixed, target[start : start + at_once], strict=True):
            out[:] = np.clip(rows @ plane @ columns.T, low, high)


@lru_cache(maxsize=16)
def _matrix(n_in: int, n_out: int, order: int) -> npt.NDArray[np.float64]:
    """What resampling along one axis makes of each single voxel, ``(n_out, n_in)``."""
    if n_in == n_out:
        return np.eye(n_in)
    matrix = ndimage.zoom(np.eye(n_in), (n_out / n_in, 1), order=order, mode="nearest", grid_mode=True)
    return np.where(np.abs(matrix) < _NEGLIGIBLE, 0.0, matrix)
