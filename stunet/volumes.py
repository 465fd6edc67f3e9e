"""Images and label maps as files: what their headers say, their voxels, and whether two of them share a grid.

Imports neither PyTorch nor nnU-Net, which every process that scores a case would load anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.openers import ImageOpener

from stunet.errors import DatasetError, STUNetError

NIFTI_ENDINGS = (".nii.gz", ".nii")
_LABEL_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".png")
#: How far apart two grids may lie at any corner and still be one grid, as a fraction of the smallest voxel side.
_TOLERANCE = 0.05
_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class LabelVolume:
    """A label map with its place in space.

    Attributes:
        path: Its file.
        labels: Label values, uint8 or uint16 of shape ``(Z, Y, X)``; a flat image has one plane.
        affine: Indices ``(x, y, z, 1)`` to mm, ``(4, 4)``; x runs to the patient's left, y backwards, z upwards (LPS).
    """

    path: Path
    labels: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Sides of a voxel in mm along ``(z, y, x)``."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return z, y, x


@contextmanager
def readable(source: object, problem: str = "cannot be read") -> Iterator[None]:
    """Name the image where reading it fails: readers raise whatever they like for files that are none.

    Raises:
        DatasetError: Reading failed.
    """
    try:
        yield
    except STUNetError:
        raise
    except Exception as error:
        said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise DatasetError(f"{source} {problem} ({said[:200]}): get it again, or leave its case out") from error


def nifti_header(path: Path) -> tuple[Any, tuple[int, ...]]:
    """Return a NIfTI header as it is, which nibabel and ITK repair, and its shape without trailing axes of length 1."""
    with ImageOpener(path) as file:
        content = file.read(540)
    kind: Any = nib.Nifti2Header if content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Header
    header = kind(content[: kind.template_dtype.itemsize], check=False)
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return header, shape


def count_values(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Count the voxels of each label value, plane by plane: numpy takes 8 bytes for each voxel that it counts."""
    counts = np.zeros(np.iinfo(labels.dtype).max + 1, np.int64)
    for plane in labels:
        counts += np.bincount(plane.reshape(-1), minlength=len(counts))
    return counts


def read_label_volume(path: Path) -> LabelVolume:
    """Read a label map.

    Raises:
        DatasetError: Missing, unreadable, of another format, or with values that are no labels.
    """
    if not path.name.endswith(_LABEL_ENDINGS):
        raise DatasetError(f"{path} is of a format that cannot be scored: convert it to {', '.join(_LABEL_ENDINGS)}")
    if not path.is_file():
        raise DatasetError(f"the label map {path} is missing: add it, or leave its case out")
    with readable(path), np.errstate(invalid="ignore"):
        read = _read_nifti if path.name.endswith(NIFTI_ENDINGS) else _read_other
        voxels, affine = read(path)
        labels = voxels if voxels.dtype in (np.uint8, np.uint16) else voxels.astype(np.uint16)
        if labels.ndim != 3 or not np.isfinite(affine).all() or not np.linalg.det(affine):
            raise ValueError(f"shape {voxels.shape[::-1]} and affine {affine.tolist()}, not a volume in space")
    if labels is not voxels and not np.array_equal(labels, voxels):
        found = f"{voxels.dtype} from {voxels.min()} to {voxels.max()}"
        raise DatasetError(f"{path} has values that are no labels ({found}): write it with whole numbers up to 65535")
    return LabelVolume(path, labels, affine)


def _read_nifti(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    image: Any = nib.load(path)
    voxels = np.asanyarray(image.dataobj)
    return voxels.reshape(voxels.shape[:3]).T, _FROM_RAS @ image.affine  # without trailing axes of length 1


def _read_other(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    import SimpleITK as sitk

    image: Any = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{image.GetNumberOfComponentsPerPixel()} values in each voxel, a colour and not a label")
    n, voxels, affine = image.GetDimension(), sitk.GetArrayFromImage(image), np.eye(4)
    affine[:n, :n] = np.reshape(image.GetDirection(), (n, n)) * image.GetSpacing()
    affine[:n, 3] = image.GetOrigin()
    return voxels.reshape((1,) * (3 - n) + voxels.shape), affine


def check_same_grid(prediction: LabelVolume, reference: LabelVolume) -> None:
    """Check that a prediction lies on the grid of the label map, to a twentieth of a voxel's side at each corner.

    Raises:
        DatasetError: Another shape, spacing, direction or origin; names the first that differs, and both files.
    """
    shapes = prediction.labels.shape, reference.labels.shape
    if shapes[0] != shapes[1]:
        raise _another(prediction, reference, "shape", *shapes)
    last = np.array(shapes[1][::-1]) - 1
    corners = np.array([[*(last * bits), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (prediction.affine - reference.affine).T)[:, :3], axis=1).max()
    tolerance = _TOLERANCE * min(reference.spacing)
    if apart <= tolerance:
        return
    sides = [np.array(volume.spacing[::-1]) for volume in (prediction, reference)]
    axes = [volume.affine[:3, :3] / side for volume, side in zip((prediction, reference), sides, strict=True)]
    origins = prediction.affine[:3, 3], reference.affine[:3, 3]
    extent = math.hypot(*(last * sides[1])) or 1.0
    # Which difference by itself could move a corner so far, or else where a corner lies.
    for what, (mine, theirs), scale in (
        ("spacing", sides, max(last.max(), 1)), ("direction", axes, extent), ("origin", origins, 1),
    ):  # fmt: skip
        if np.abs(mine - theirs).max() * scale > tolerance / 2:
            raise _another(prediction, reference, what, *(np.round(part, 4).tolist() for part in (mine, theirs)))
    raise _another(prediction, reference, "position", f"{apart:.3g} mm apart", "the same place")


def _another(prediction: LabelVolume, reference: LabelVolume, what: str, mine: object, theirs: object) -> DatasetError:
    return DatasetError(
        f"{prediction.path} has another {what} ({mine}) than its label map {reference.path} ({theirs}): predict the "
        "images that these label maps belong to; resampling would change the scores"
    )
