"""The voxels of a case at which features are read: the same ones for every checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import DatasetError, UsageError

__all__ = ["CasePoints", "draw_points"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CasePoints:
    """Voxels drawn from one case.

    Attributes:
        case: Name of the case.
        shape: The volume that they lie in, ``(X, Y, Z)``.
        balanced: ``(n, 3)``, voxels of each class in turn.
        labels: ``(n,)``, their classes.
        whole: ``(m, 3)``, voxels of the whole volume, whatever their class.
        per_class: How many of each class were asked for.
        n_whole: How many of the whole volume were asked for.
        voxels: For each class in the case how many voxels it has.
    """

    case: str
    shape: tuple[int, ...]
    balanced: Integers
    labels: Integers
    whole: Integers
    per_class: int
    n_whole: int
    voxels: Mapping[int, int]

    @property
    def fewer(self) -> dict[int, int]:
        """Classes with fewer voxels than were asked for, and how many they have."""
        return {label: count for label, count in self.voxels.items() if count < self.per_class}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was asked for, what there was."""
        return {
            "case": self.case,
            "per_class": self.per_class,
            "voxels": {str(label): count for label, count in self.voxels.items()},
            "fewer": {str(label): count for label, count in self.fewer.items()},
            "whole": {"asked": self.n_whole, "drawn": len(self.whole)},
        }


def draw_points(
    segmentation: npt.NDArray[np.integer[Any]],
    *,
    case: str,
    per_class: int,
    n_whole: int,
    seed: int = 0,
    ignore_label: int | None = None,
) -> CasePoints:
    """Draw voxels of a case without replacement: some of each class that it has, and some of the whole volume.

    Voxels below 0 (nnU-Net marks -1 what lies outside the image's nonzero part) and those of the ignore label are never
    drawn. What is drawn depends on the seed, the case's name and its labels alone: neither on the order of the cases
    nor, for the voxels of one class, on what other classes there are. Where a class, or the volume, has fewer voxels
    than asked for, all of them are taken.

    Args:
        segmentation: Labels ``(X, Y, Z)``, as nnU-Net's preprocessing leaves them.
        case: Name of the case.
        per_class: Voxels of each class, background included.
        n_whole: Voxels of the whole volume.
        seed: Any whole number from 0.
        ignore_label: Label of voxels that nobody annotated.

    Raises:
        DatasetError: No label map of three axes, or one without a voxel to draw.
        UsageError: A number of points or a seed that cannot be.
    """
    _check_numbers(per_class=(per_class, 1), n_whole=(n_whole, 1), seed=(seed, 0))
    if segmentation.ndim != 3 or not np.issubdtype(segmentation.dtype, np.integer):
        raise DatasetError(
            f"labels of case {case} that are no label map",
            got=f"{segmentation.dtype} of shape {segmentation.shape}",
            expected="whole numbers of shape (X, Y, Z)",
            remedy="Give the segmentation without its channel axis, as whole numbers.",
        )
    counts = _count_by_plane(segmentation)
    if ignore_label is not None:
        counts.pop(ignore_label, None)
    if not counts:
        raise DatasetError(
            f"case {case} has no voxel to draw",
            got=f"shape {segmentation.shape}, with voxels outside the image or of the ignore label alone",
            expected="at least one voxel with a label",
            remedy="Leave this case out, or annotate it.",
        )
    digest = int.from_bytes(hashlib.sha256(case.encode()).digest()[:16], "big")
    parts, labels = [], []
    for label, by_plane in sorted(counts.items()):
        ranks = _draw(np.random.default_rng([seed, digest, label + 1]), int(by_plane.sum()), per_class)
        parts.append(_locate(segmentation, by_plane, ranks, label, ignore_label))
        labels.append(np.full(len(ranks), label, np.int64))
    everything = np.sum(list(counts.values()), axis=0)
    ranks = _draw(np.random.default_rng([seed, digest, 0]), int(everything.sum()), n_whole)
    return CasePoints(
        case=case,
        shape=segmentation.shape,
        balanced=np.concatenate(parts),
        labels=np.concatenate(labels),
        whole=_locate(segmentation, everything, ranks, None, ignore_label),
        per_class=per_class,
        n_whole=n_whole,
        voxels={label: int(by_plane.sum()) for label, by_plane in sorted(counts.items())},
    )


def _count_by_plane(segmentation: npt.NDArray[np.integer[Any]]) -> dict[int, Integers]:
    """Voxels of each label from 0 in each plane of the first axis."""
    counts: dict[int, Integers] = {}
    for index, plane in enumerate(segmentation):
        # Counting needs indices of 64 bits, which of a plane cost little and of a volume eight bytes a voxel.
        found = np.bincount(np.maximum(plane.ravel().astype(np.int64), -1) + 1)
        for label in np.flatnonzero(found[1:]):
            by_plane = counts.setdefault(int(label), np.zeros(len(segmentation), np.int64))
            by_plane[index] = found[label + 1]
    return counts


def _draw(generator: np.random.Generator, available: int, asked: int) -> Integers:
    """Ranks among the available voxels, ascending."""
    if available <= asked:
        return np.arange(available)
    return np.sort(generator.choice(available, size=asked, replace=False))


def _locate(
    segmentation: npt.NDArray[np.integer[Any]],
    by_plane: Integers,
    ranks: Integers,
    label: int | None,
    ignore_label: int | None,
) -> Integers:
    """The voxels of given ranks among those of a label, or among all that may be drawn: ``(len(ranks), 3)``."""
    ends = np.cumsum(by_plane)
    planes = np.searchsorted(ends, ranks, side="right")
    points = np.empty((len(ranks), 3), np.int64)
    points[:, 0] = planes
    for index in np.unique(planes):
        plane = segmentation[index]
        if label is not None:
            candidates = np.flatnonzero(plane == label)
        else:
            candidates = np.flatnonzero(plane >= 0 if ignore_label is None else (plane >= 0) & (plane != ignore_label))
        here = planes == index
        chosen = candidates[ranks[here] - (ends[index] - by_plane[index])]
        points[here, 1], points[here, 2] = np.unravel_index(chosen, plane.shape)
    return points


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise UsageError(
                f"impossible {name}", got=value, expected=f"a whole number from {least}", remedy=f"Correct {name}."
            )
