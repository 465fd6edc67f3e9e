"""Images, masks and label maps on disk, NIfTI by nibabel and other formats by SimpleITK; and their grids."""

import errno
import gzip
import math
import os
import re
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.openers import ImageOpener

from stunet.errors import DatasetError
from stunet.files import atomic_path, move_into_place

NIFTI_ENDINGS = (".nii.gz", ".nii")
#: Endings of label maps that are one file with values and geometry.
LABEL_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".png")
#: As a fraction of the smallest voxel side, how far apart two grids may lie at any corner and still be one grid.
GRID_TOLERANCE = 0.05

_NIFTI2 = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 540, the size of its header, in either byte order
_GEOMETRY_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)


@dataclass(frozen=True)
class Volume:
    """A volume as its file holds it.

    Attributes:
        path: The file.
        voxels: ``(X, Y, Z)`` as stored. Zeros that take no memory where only the header was read.
        affine: Voxel indices to mm, ``(4, 4)``; x runs to the patient's right, y forwards, z upwards (RAS).
        header: nibabel's header, or SimpleITK's image.
        scaling: Slope and intercept of the values; None where they are as stored.
    """

    path: Path
    voxels: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    header: Any
    scaling: tuple[float, float] | None = None

    @property
    def values(self) -> npt.NDArray[Any]:
        """The voxels, scaled as the header says, which makes them float64."""
        return self.voxels if self.scaling is None else self.voxels * self.scaling[0] + self.scaling[1]

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """Sides of a voxel in mm, ``(x, y, z)``."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0), np.float64)


def read_volume(path: str | os.PathLike[str], *, header_only: bool = False) -> Volume:
    """Read a volume to its end, so that damage shows here.

    Args:
        path: A NIfTI file of format 1 or 2, or what SimpleITK reads; a flat image has one plane.
        header_only: Whether voxels are left out, and damage with them.

    Raises:
        DatasetError: Missing, damaged, of values that are no single numbers, or with more axes than three.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"missing image file {path}: add it, or leave its case out")
    try:
        return (_read_nifti if _is_nifti(path) else _read_other)(path, header_only)
    except Exception as error:  # the errors of nibabel's and SimpleITK's readers have no class in common
        said = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DatasetError(f"unreadable image file {path} ({said}): get it again, or leave its case out") from error


def _is_nifti(path: Path) -> bool:
    return path.name.casefold().endswith(NIFTI_ENDINGS)


def available_bytes() -> int | None:
    """Return what this machine, or the container of this process, has to spare; None where that is unknown."""
    found = []
    with suppress(OSError, ValueError, AttributeError, TypeError):
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024)  # type: ignore[index]
    with suppress(OSError, ValueError):
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{n}").read_text("ascii") for n in ("max", "current", "stat"))
        cached = re.findall(r"^(?:in)?active_file (\d+)", stat, re.MULTILINE)  # which the system gives up when asked
        found.append(int(limit) - int(used) + sum(map(int, cached)))  # a limit of "max" is none
    return min(found, default=None)


def _check_room(shape: tuple[int, ...], itemsize: int) -> None:
    """Refuse what would take more than all memory, as a few MB of gzip can: the system would kill the process."""
    size, spare = math.prod(shape) * itemsize, available_bytes()
    if spare is not None and size > spare:
        raise ValueError(f"{size / 2**30:.3g} GB of voxels, more than the {spare / 2**30:.3g} GB of memory to spare")


def _read_nifti(path: Path, header_only: bool) -> Volume:
    with ImageOpener(path) as file:
        kind = nib.Nifti2Image if file.read(4) in _NIFTI2 else nib.Nifti1Image
        file.seek(0)
        holder = nib.FileHolder(fileobj=file)
        image = kind.from_file_map({"header": holder, "image": holder}, mmap=False)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if image.dataobj.offset < int(image.header["sizeof_hdr"]):
            raise ValueError("voxels that begin within the header")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape {shape}, not three axes")
        if image.get_data_dtype().kind not in "uif":
            raise ValueError(f"values of type {image.get_data_dtype()}, not single numbers")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
            raise ValueError("an affine that cannot be inverted")
        slope, inter = (float(v) for v in (image.dataobj.slope, image.dataobj.inter))
        scaling = None if (slope, inter) == (1, 0) else (slope, inter)
        voxels = np.broadcast_to(np.uint8(0), shape)
        if not header_only:
            _check_room(shape, image.get_data_dtype().itemsize if scaling is None else 8)
            voxels = image.dataobj.get_unscaled().reshape(shape, order="F")
            while file.read(2**20):  # gzip's checksum stands at the end
                pass
    return Volume(path, voxels, np.asarray(image.affine, np.float64), image.header, scaling)


def _read_other(path: Path, header_only: bool) -> Volume:
    import SimpleITK as sitk

    image: Any = sitk.ImageFileReader()  # type: ignore[no-untyped-call]
    image.SetFileName(str(path))
    image.ReadImageInformation()
    n = image.GetDimension()
    if not header_only:
        if image.GetNumberOfComponents() != 1:
            raise ValueError(f"{image.GetNumberOfComponents()} values in each voxel, not one")
        pixel: Any = sitk.Image([1] * n, image.GetPixelID())  # type: ignore[no-untyped-call]
        _check_room(image.GetSize(), 2 * sitk.GetArrayFromImage(pixel).itemsize)  # its array is a copy
        image = image.Execute()
    affine = np.eye(4)
    affine[:n, :n] = np.reshape(image.GetDirection(), (n, n)) * image.GetSpacing()
    affine[:n, 3] = image.GetOrigin()
    shape = (*image.GetSize(), *(1,) * (3 - n))
    voxels = np.broadcast_to(np.uint8(0), shape) if header_only else sitk.GetArrayFromImage(image).T.reshape(shape)
    return Volume(path, voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, image)  # ITK's x and y run the other way


def read_labels(path: str | os.PathLike[str]) -> Volume:
    """Read a label map; its voxels become uint8 or uint16.

    Raises:
        DatasetError: Unreadable, or with values that are no whole numbers from 0 to 65535.
    """
    volume = read_volume(path)
    values = volume.values
    labels = values
    if values.dtype not in (np.uint8, np.uint16):
        with np.errstate(invalid="ignore"):
            labels = values.astype(np.uint16)
        if not np.array_equal(labels, values):
            found = f"{values.dtype} from {values.min()} to {values.max()}"
            raise DatasetError(f"{path} has values that are no labels, {found}: write whole numbers up to 65535")
    return replace(volume, voxels=labels, scaling=None)


def count_labels(path: str | os.PathLike[str]) -> dict[int, int]:
    """Count the voxels of each label value in a label map of any format that nnU-Net takes.

    Returns:
        Voxels by label value, for the values that occur.

    Raises:
        DatasetError: Unreadable, or with values that are no labels.
    """
    return _value_counts(read_labels(path).voxels)


def _value_counts(voxels: npt.NDArray[Any]) -> dict[int, int]:
    counts = np.zeros(int(voxels.max()) + 1, np.int64)
    for plane in voxels.T:  # one by one, since bincount takes 8 bytes for each voxel
        counts += np.bincount(plane.ravel(order="K"), minlength=len(counts))
    return {value: n for value, n in enumerate(counts.tolist()) if n}


def check_listed(volume: Volume, known: Collection[int]) -> None:
    """Check that a label map, as :func:`read_labels` reads it, has no other values than its ``dataset.json`` lists.

    Raises:
        DatasetError: It has.
    """
    if unknown := [value for value in _value_counts(volume.voxels) if value not in known]:
        shown = ", ".join(map(str, unknown[:8])) + " …" * (len(unknown) > 8)
        raise DatasetError(f"{volume.path} has values that its dataset.json does not list: {shown}; correct either")


def write_labels(labels: npt.NDArray[Any], like: Volume, path: str | os.PathLike[str]) -> None:
    """Write a label map atomically, on the grid of another volume. Equal labels and grids give equal bytes.

    Args:
        labels: uint8 or uint16 of shape ``(X, Y, Z)``.
        like: The volume whose shape, spacing, position, orientation and kind of format it has.
        path: A file of the same format.
    """
    path = Path(path)
    if _is_nifti(path):
        header = type(like.header)(endianness="<")
        header["pixdim"][:4] = like.header["pixdim"][:4]
        for name in _GEOMETRY_FIELDS:
            header[name] = like.header[name]
        header.set_data_dtype(labels.dtype)
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        content = kind(labels, like.affine, header).to_bytes()
        with atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix.casefold() == ".gz" else content)
        return
    import SimpleITK as sitk

    image: Any = sitk.GetImageFromArray(labels.reshape(like.header.GetSize()).T)
    image.CopyInformation(like.header)
    # In a folder, since SimpleITK goes by the file's ending.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as staging:
        try:
            sitk.WriteImage(image, f"{staging}/{path.name}", useCompression=True)
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error).strip().splitlines()[-1], str(path)) from error
        move_into_place(f"{staging}/{path.name}", path)


def check_finite(volume: Volume) -> None:
    """Check that all voxels are numbers; one NaN makes all logits around it NaN.

    Raises:
        DatasetError: Some are NaN or infinite.
    """
    if volume.voxels.dtype.kind == "f" and (n_bad := volume.voxels.size - int(np.isfinite(volume.voxels).sum())):
        raise not_numbers(volume.path, n_bad)


def not_numbers(source: object, n_bad: int) -> DatasetError:
    """The error for an image with voxels that are NaN or infinite."""
    return DatasetError(f"{source}: {n_bad} voxels are NaN or infinite: replace them, for example by that of air")


def check_same_grid(volume: Volume, reference: Volume) -> None:
    """Check that a mask or label map has the voxels of its image, to a twentieth of a voxel's side at each corner.

    Raises:
        DatasetError: Another shape or affine; names both files.
    """
    check_shape(volume, reference)
    # Two grids of one shape lie farthest apart at one of their corners.
    corners = np.array([[*((np.array(volume.voxels.shape) - 1) * bits), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (volume.affine - reference.affine).T)[:, :3], axis=1).max()
    if apart > GRID_TOLERANCE * reference.spacing.min():
        mine, theirs = (np.round(each.affine[:3], 4).tolist() for each in (volume, reference))
        got = f"{volume.path} lies {apart:.3g} mm elsewhere, by its affine {mine}, than {reference.path} by {theirs}"
        raise DatasetError(f"{got}: make it anew on the grid of its image, or take the image that it belongs to")


def check_shape(volume: Volume, reference: Volume) -> None:
    """Check that a mask or label map has the shape of its image.

    Raises:
        DatasetError: It has another one; names both files.
    """
    mine, others = volume.voxels.shape, reference.voxels.shape
    if mine != others:
        raise DatasetError(f"{volume.path} has another shape, {mine}, than {reference.path}, {others}")
