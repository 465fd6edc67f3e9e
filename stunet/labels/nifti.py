"""NIfTI files chunk by chunk: a volume is never held in memory, however large its file says it is."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from nibabel.spatialimages import HeaderDataError

from stunet.errors import DatasetError
from stunet.files import naming_file
from stunet.labels.inflating import Inflater

__all__ = [
    "CHUNK_VOXELS",
    "VolumeReader",
    "check_finite",
    "check_same_grid",
    "not_numbers",
    "open_volume",
    "write_volume",
]

#: Voxels decoded at a time; with the temporary arrays over them about as much as a processor's cache holds.
CHUNK_VOXELS = 2**18
#: As a fraction of the smallest voxel side, how far apart two grids may lie at any corner and still be one grid.
_TOLERANCE = 0.05
#: ISA-L's, which takes a tenth of the time of zlib's level 1 for label maps, and makes smaller files of them.
_COMPRESSION_LEVEL = 1
_GZIP_WINDOW = 31  # zlib's way to ask for the largest window, and for gzip's header and trailer
_UNREADABLE: tuple[type[Exception], ...] = (
    EOFError,
    HeaderDataError,
    OSError,  # gzip's BadGzipFile among them
    OverflowError,
    ValueError,
    zlib.error,
    cast("type[Exception]", isal_zlib.IsalError),  # declared as an instance
)
_GEOMETRY_FIELDS = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "xyzt_units",
)


@dataclass(frozen=True)
class _Layout:
    """What a header says. Shared by all files whose headers are equal bytes, as those of a case's masks are."""

    header: Any  # nibabel's Nifti1Header or Nifti2Header
    shape: tuple[int, ...]  # (X, Y, Z), without trailing axes of length 1
    affine: npt.NDArray[np.float64]
    dtype: np.dtype[Any]
    scaling: tuple[float, float] | None
    offset: int  # bytes before the first voxel


class VolumeReader:
    """An open NIfTI file.

    Attributes:
        path: The file.
        header: Its header, as nibabel understands it.
        shape: ``(X, Y, Z)``, without trailing axes of length 1.
        affine: Voxel indices to mm, ``(4, 4)``; one array for all files with equal headers.
        scaling: Slope and intercept of the values; None where they are as stored.
        payload: Equal for small files of equal content; None where this was not found out.
    """

    def __init__(self, path: Path, stream: Inflater, layout: _Layout, position: int) -> None:
        self.path = path
        self.header = layout.header
        self.shape = layout.shape
        self.affine = layout.affine
        self.scaling = layout.scaling
        self.payload = stream.payload
        self._layout = layout
        self._stream = stream
        self._skip = layout.offset - position

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the voxels in the file's order, first axis fastest, and check the file to its end.

        Yields:
            Index of the first voxel, and up to :data:`CHUNK_VOXELS` values, scaled as the header says (which makes
            them float64; others keep their type). The array is read-only.

        Raises:
            DatasetError: The file is truncated, or its checksum wrong.
        """
        dtype, scaling = self._layout.dtype, self.scaling
        n_voxels = math.prod(self.shape)
        with _explained(self.path):
            while self._skip > 0 and (skipped := self._stream.read(min(self._skip, CHUNK_VOXELS))):
                self._skip -= len(skipped)
            for start in range(0, n_voxels, CHUNK_VOXELS):
                n = min(CHUNK_VOXELS, n_voxels - start)
                content = self._stream.read(n * dtype.itemsize)
                if len(content) < n * dtype.itemsize:
                    raise EOFError(f"ends before voxel {n_voxels} of {self.shape}")
                values = np.frombuffer(content, dtype)
                yield start, values if scaling is None else values * scaling[0] + scaling[1]
            while self._stream.read(CHUNK_VOXELS):  # the checksum stands at the end
                pass


@contextmanager
def open_volume(path: Path) -> Iterator[VolumeReader]:
    """Open a NIfTI file, compressed or not.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file of format 1 or 2 and either byte order.

    Raises:
        DatasetError: Missing, not NIfTI, of values that are no single numbers, or with more axes than three.
    """
    with _explained(path):
        stream = Inflater(path)
    with stream:
        with _explained(path):
            content = stream.read(348)
            if content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c"):  # 540, the size of a NIfTI-2 header
                content += stream.read(192)
            layout = _parse(content)
        yield VolumeReader(path, stream, layout, len(content))


@lru_cache(maxsize=16)
def _parse(content: bytes) -> _Layout:
    if len(content) not in (348, 540):
        raise EOFError("ends within the header")
    header = (nib.Nifti1Header if len(content) == 348 else nib.Nifti2Header)(content)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise HeaderDataError("no NIfTI file that holds header and voxels")
    dtype = header.get_data_dtype()
    if dtype.kind not in "uif":
        raise HeaderDataError(f"values of type {dtype}, not single numbers")
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise HeaderDataError(f"shape {shape}, not three axes")
    slope, inter = header.get_slope_inter()
    scaling = None if slope is None or (slope == 1 and not inter) else (float(slope), float(inter or 0))
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise HeaderDataError("an affine that cannot be inverted")
    return _Layout(header, shape, affine, dtype, scaling, max(int(header["vox_offset"]), len(content)))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            "missing image file", got=path, expected="a NIfTI file", remedy="Add it, or leave its case out."
        ) from error
    except _UNREADABLE as error:
        raise DatasetError(
            "an unreadable NIfTI file",
            got=f"{path}: {error or type(error).__name__}",
            expected="a whole .nii.gz or .nii file",
            remedy="Get the file again from where it came from, or leave its case out.",
        ) from error


def check_finite(volume: VolumeReader) -> None:
    """Read a volume to its end, and check that its values are numbers.

    Raises:
        DatasetError: The file is truncated or damaged, or has voxels that are NaN or infinite.
    """
    n_bad = sum(v.size - int(np.isfinite(v).sum()) for _, v in volume.chunks() if v.dtype.kind == "f")
    if n_bad:
        raise not_numbers(volume.path, n_bad)


def not_numbers(source: object, n_bad: int) -> DatasetError:
    """The error for voxels that are NaN or infinite."""
    return DatasetError(
        "an image with voxels that are no numbers",
        got=f"{source}: {n_bad} voxels are NaN or infinite",
        expected="finite intensities; one NaN makes all logits around it NaN",
        remedy="Replace them, for example by the intensity of air.",
    )


def check_same_grid(volume: VolumeReader, reference: VolumeReader) -> None:
    """Check that two volumes have the same voxels, to a twentieth of a voxel's side at each corner.

    Raises:
        DatasetError: Another shape or affine; names both files.
    """
    if volume.shape != reference.shape:
        _refuse_grid(volume, reference, "shape", volume.shape, reference.shape)
    if volume.affine is reference.affine or np.array_equal(volume.affine, reference.affine):
        return
    last = np.array(reference.shape) - 1
    corners = np.array([[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (volume.affine - reference.affine).T)[:, :3], axis=1).max()
    spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)
    if apart > _TOLERANCE * spacing.min():
        affines = (str(np.round(v.affine[:3], 4).tolist()) for v in (volume, reference))
        _refuse_grid(volume, reference, "affine", next(affines), next(affines), f" (up to {apart:.3g} mm apart)")


def _refuse_grid(
    volume: VolumeReader, reference: VolumeReader, what: str, got: object, expected: object, detail: str = ""
) -> None:
    raise DatasetError(
        f"a mask of another {what} than its image",
        got=f"{volume.path}: {got}{detail}",
        expected=f"{expected}, as {reference.path} has",
        remedy="Resample the mask to its image, or leave the case out.",
    )


def write_volume(
    labels: npt.NDArray[Any], reference: VolumeReader, path: str | os.PathLike[str], *, compress: bool = True
) -> None:
    """Write a label map on the grid of another volume. Equal labels and grids give equal bytes.

    Args:
        labels: Whole numbers in the file's order, first axis fastest, of shape ``(X * Y * Z,)``.
        reference: The volume whose shape, spacing, position and orientation it has.
        path: A file whose name need not end in ``.nii.gz``.
        compress: Whether the content is that of a ``.nii.gz`` file, else that of a ``.nii`` file.
    """
    source = reference.header
    header = type(source)(endianness="<")
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(reference.shape)
    header["pixdim"][:4] = source["pixdim"][:4]
    for name in _GEOMETRY_FIELDS:
        header[name] = source[name]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = len(header.binaryblock) + 4
    little_endian = labels.dtype.newbyteorder("<")
    packer: Any = isal_zlib.compressobj(_COMPRESSION_LEVEL, isal_zlib.DEFLATED, _GZIP_WINDOW) if compress else None
    with naming_file(Path(path)), Path(path).open("wb") as file:

        def put(content: bytes) -> None:
            file.write(packer.compress(content) if packer else content)

        put(header.binaryblock + bytes(4))  # four bytes: no extension follows
        for start in range(0, labels.size, CHUNK_VOXELS):
            put(labels[start : start + CHUNK_VOXELS].astype(little_endian, copy=False).tobytes())
        if packer:
            file.write(packer.flush())
