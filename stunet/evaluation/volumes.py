"""Label maps with their place in space, and whether two of them share it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import DatasetError
from stunet.volumes import GRID_TOLERANCE, LABEL_ENDINGS, corner_distance, read_labels

__all__ = ["LabelVolume", "check_same_geometry", "check_values", "read_label_volume"]

_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class LabelVolume:
    """A label map.

    Attributes:
        path: Its file.
        labels: Label values, uint8 or uint16 of shape ``(Z, Y, X)``.
        affine: Indices ``(x, y, z, 1)`` to mm, ``(4, 4)``; x runs to the patient's left, y backwards, z upwards (LPS).
        values: The values that occur.
    """

    path: Path
    labels: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    values: frozenset[int]

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Sides of a voxel in mm along ``(z, y, x)``."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return z, y, x


def read_label_volume(path: Path) -> LabelVolume:
    """Read a label map.

    Args:
        path: A file with one of the endings :data:`LABEL_ENDINGS`; a flat image has one plane.

    Raises:
        DatasetError: Missing, unreadable, of another format, or with values that are no labels.
    """
    if not path.name.endswith(LABEL_ENDINGS):
        raise DatasetError(
            "a label map of a format that cannot be scored",
            got=path,
            expected=f"a file that ends in {', '.join(LABEL_ENDINGS)}",
            remedy="Convert label maps and predictions to one of these formats.",
        )
    volume = read_labels(path)
    values = frozenset(np.unique(volume.voxels).tolist())
    return LabelVolume(path, volume.voxels.T, _FROM_RAS @ volume.affine, values)


def check_values(volume: LabelVolume, known: Collection[int], *, of: str) -> None:
    """Check that a label map has no values that its ``dataset.json`` does not list.

    Args:
        volume: The label map.
        known: The values that are listed.
        of: Whose they are, for the message.

    Raises:
        DatasetError: It has.
    """
    unknown = sorted(volume.values - set(known))
    if unknown:
        raise DatasetError(
            "label values that dataset.json does not list",
            got=f"{volume.path}: {', '.join(map(str, unknown[:5]))}{' …' if len(unknown) > 5 else ''}",
            expected=f"values of {of}: {', '.join(map(str, sorted(known)[:5]))} … up to {max(known)}",
            remedy="Give the dataset.json that these label maps belong to, or list the values.",
        )


def check_same_geometry(prediction: LabelVolume, reference: LabelVolume) -> None:
    """Check that a prediction lies on the grid of the label map, to a twentieth of a voxel's side at each corner.

    Raises:
        DatasetError: Another shape, spacing, direction or origin; names the first that differs, and both files.
    """
    if prediction.labels.shape != reference.labels.shape:
        _refuse(prediction, reference, "shape", prediction.labels.shape, reference.labels.shape)
    last = np.array(reference.labels.shape[::-1]) - 1
    apart = corner_distance(prediction.affine, reference.affine, reference.labels.shape[::-1])
    tolerance = GRID_TOLERANCE * min(reference.spacing)
    if apart <= tolerance:
        return
    mine, theirs = _parts(prediction), _parts(reference)
    extent = math.hypot(*(last * reference.spacing[::-1])) or 1.0
    for what, scale in (("spacing", float(max(last.max(), 1))), ("direction", extent), ("origin", 1.0)):
        # Which difference by itself could move a corner so far, or else the most visible one.
        if np.abs(mine[what] - theirs[what]).max() * scale > tolerance / 2:
            rounded = (np.round(parts[what], 4).tolist() for parts in (mine, theirs))
            _refuse(prediction, reference, what, next(rounded), next(rounded), f" (up to {apart:.3g} mm apart)")
    _refuse(prediction, reference, "position", f"{apart:.3g} mm apart", "the same place")


def _parts(volume: LabelVolume) -> dict[str, npt.NDArray[np.float64]]:
    sides = np.array(volume.spacing[::-1])
    return {"spacing": sides, "direction": volume.affine[:3, :3] / sides, "origin": volume.affine[:3, 3]}


def _refuse(
    prediction: LabelVolume, reference: LabelVolume, what: str, got: object, expected: object, detail: str = ""
) -> None:
    raise DatasetError(
        f"a prediction of another {what} than the label map",
        got=f"{prediction.path}: {got}{detail}",
        expected=f"{expected}, as {reference.path} has",
        remedy="Predict the images that these label maps belong to, and check that label map and image share their "
        "grid; resampling would change the scores.",
    )
