"""nnU-Net's default resampling of images in little more memory than the result takes.

``resample_data_or_seg_to_shape`` turns the whole image into double precision, pads it and filters it: up to seven times
the image. Spline interpolation to a finer or coarser grid is linear and works on each axis by itself, so along each
axis it is a matrix, whose columns are what interpolation makes of single voxels. Applied to a few planes at a time, the
matrices give the same numbers up to the last bit of single precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from scipy import ndimage

__all__ = ["resample_image"]

#: Smaller entries, the far ends of the spline's filter, change nothing in single precision.
_NEGLIGIBLE = 1e-13
#: Double-precision elements that are worked on at a time.
_BLOCK_ELEMENTS = 2**21

Matrix = npt.NDArray[np.float64]
Image = npt.NDArray[np.float32]


def resample_image(
    image: Image,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order: int,
    force_separate_z: bool | None = None,
    **threshold: float,
) -> Image:
    """Resample an image as nnU-Net's ``resample_data_or_seg_to_shape`` does with ``order_z`` 0.

    Args:
        image: ``(C, X, Y, Z)``.
        new_shape: Voxels ``(X, Y, Z)`` of the result.
        spacing: mm between voxels.
        new_spacing: mm between voxels of the result.
        order: Order of the spline.
        force_separate_z: Whether the planes along one axis are resampled each by itself; None where nnU-Net shall
            decide by the spacings.
        **threshold: ``separate_z_anisotropy_threshold`` where it is not nnU-Net's own.
    """
    new_shape = tuple(int(n) for n in new_shape)
    if image.shape[1:] == new_shape:
        return image
    separate, axis = determine_do_sep_z_and_axis(force_separate_z, spacing, new_spacing, **threshold)
    result = np.empty((len(image), *new_shape), image.dtype)
    for source, target in zip(image, result, strict=True):
        if separate:
            _by_planes(np.moveaxis(source, axis, 0), np.moveaxis(target, axis, 0), order)
        else:
            _by_blocks(source, target, order)
    return result


def _by_planes(source: Image, target: Image, order: int) -> None:
    rows, columns = (
        _matrix(n_in, n_out, order) for n_in, n_out in zip(source.shape[1:], target.shape[1:], strict=True)
    )
    nearest = np.floor((np.arange(len(target)) + 0.5) * (len(source) / len(target))).astype(int)
    known = -1
    for i, index in enumerate(nearest.clip(max=len(source) - 1)):
        if index == known:
            target[i] = target[i - 1]
            continue
        plane, known = source[index], index
        # The overshoot of splines is cut off at the plane's own range.
        target[i] = np.clip(rows @ plane.astype(np.float64) @ columns.T, plane.min(), plane.max())


def _by_blocks(source: Image, target: Image, order: int) -> None:
    planes, rows, columns = (_matrix(*n, order) for n in zip(source.shape, target.shape, strict=True))
    low, high = source.min(), source.max()
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
def _matrix(n_in: int, n_out: int, order: int) -> Matrix:
    """What resampling along one axis makes of each single voxel, ``(n_out, n_in)``."""
    if n_in == n_out:
        return np.eye(n_in)
    zoom: dict[str, Any] = {"order": order, "mode": "nearest", "grid_mode": True}
    matrix: Matrix = ndimage.zoom(np.eye(n_in), (n_out / n_in, 1), **zoom)
    matrix[np.abs(matrix) < _NEGLIGIBLE] = 0
    return matrix
