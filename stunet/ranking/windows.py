"""Which windows of a volume have to be run to read features at given points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from stunet.errors import FeatureError

__all__ = ["Window", "assign_windows", "cut_window", "window_starts"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """One window and the points that are read from it.

    Attributes:
        start: Its first voxel on each axis of the volume; below 0 where the volume is smaller than the window, which
            then has padding on both sides.
        points: ``(k,)``, which of the points it holds.
        local: ``(k, n_axes)``, where these lie in the window; of a 2D window, its two axes.
    """

    start: tuple[int, ...]
    points: Integers
    local: Integers


def window_starts(size: int, patch: int, step_size: float = 0.5) -> Integers:
    """Where the windows of nnU-Net's sliding window begin on one axis.

    Equally far apart, at most ``step_size`` of a window, the first at the volume's first voxel and the last at its end.
    A volume smaller than the window lies in its middle, as nnU-Net pads it.

    Args:
        size: Voxels of the volume.
        patch: Voxels of the window.
        step_size: Greatest distance of neighbouring windows, in windows.
    """
    if size <= patch:
        return np.array([-((patch - size) // 2)])
    n_steps = math.ceil((size - patch) / (patch * step_size))
    return np.round(np.arange(n_steps + 1) * ((size - patch) / n_steps)).astype(np.int64)


def assign_windows(
    points: Integers, shape: Sequence[int], patch_size: Sequence[int], *, step_size: float = 0.5
) -> list[Window]:
    """The windows that hold points; each point in the one in which it is most central.

    That is the window which has the greatest weight at this point when nnU-Net merges its predictions: its Gaussian is
    a product over the axes, and so is the choice. With a patch of two axes the windows are slices along the first axis
    of the volume, as in nnU-Net's 2D configurations.

    Args:
        points: ``(n, 3)``, voxels in the volume.
        shape: The volume, ``(X, Y, Z)``.
        patch_size: The window, on all axes or on all but the first.
        step_size: As for :func:`window_starts`.

    Returns:
        The windows in the order of their starts.

    Raises:
        FeatureError: Points outside the volume, a patch of another number of axes, or an impossible step.
    """
    _check(points, shape, patch_size, step_size)
    if len(points) == 0:
        return []
    n_flat = len(shape) - len(patch_size)
    starts = np.empty_like(points)
    starts[:, :n_flat] = points[:, :n_flat]
    for axis, patch in enumerate(patch_size, start=n_flat):
        candidates = window_starts(shape[axis], patch, step_size)
        local = points[:, axis, None] - candidates
        # The Gaussian's centre is not the middle of an even number of voxels, so the nearest may miss the point.
        distances = np.where((local >= 0) & (local < patch), np.abs(local - patch // 2), patch)
        starts[:, axis] = candidates[np.argmin(distances, axis=1)]
    distinct, window_of = np.unique(starts, axis=0, return_inverse=True)
    groups = np.split(np.argsort(window_of.ravel(), kind="stable"), np.cumsum(np.bincount(window_of.ravel()))[:-1])
    return [
        Window(tuple(map(int, start)), group, (points[group] - start)[:, n_flat:])
        for start, group in zip(distinct, groups, strict=True)
    ]


def cut_window(image: npt.NDArray[Any] | Tensor, start: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """One window of an image, padded as nnU-Net pads: with 0, the image in the middle.

    Args:
        image: ``(C, X, Y, Z)``; what lies outside the window is not touched.
        start: The window's first voxel on each of the three axes, as in :class:`Window`.
        patch_size: The window, on all axes or on all but the first.

    Returns:
        ``(C, *patch_size)``, float32, on the CPU.
    """
    n_flat = len(start) - len(patch_size)
    ends = [first + n for first, n in zip(start[n_flat:], patch_size, strict=True)]
    slices = (slice(max(first, 0), end) for first, end in zip(start[n_flat:], ends, strict=True))
    index: Any = (slice(None), *start[:n_flat], *slices)
    cut = image[index]
    cut = cut.detach().float().cpu() if isinstance(cut, Tensor) else torch.from_numpy(np.array(cut, np.float32))
    padded: Tensor = pad_nd_image(cut, tuple(patch_size), "constant", {"value": 0})
    return padded


def _check(points: Integers, shape: Sequence[int], patch_size: Sequence[int], step_size: float) -> None:
    if len(patch_size) not in (len(shape) - 1, len(shape)) or min(patch_size) < 1 or not 0 < step_size <= 1:
        raise FeatureError(
            "windows that cannot be laid over the volume",
            got=f"a patch of {list(patch_size)} and a step of {step_size} for a volume of {list(shape)}",
            expected="a patch with as many axes as the volume or, of a 2D configuration, one less; a step above 0, at "
            "most 1",
            remedy="Take patch_size from the configuration that the images were preprocessed for.",
        )
    if points.ndim != 2 or points.shape[1] != len(shape) or (points < 0).any() or (points >= np.array(shape)).any():
        raise FeatureError(
            "points outside the volume",
            got=f"{points.shape} with values from {points.min(initial=0)} to {points.max(initial=0)}",
            expected=f"(n, {len(shape)}) with voxels of a volume of {list(shape)}",
            remedy="Draw the points from the segmentation that belongs to the image.",
        )
