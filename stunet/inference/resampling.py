"""Images to the network's grid and labels back to the image's, in little memory, with nnU-Net's numbers.

Images: ``resample_data_or_seg_to_shape`` turns the whole image into double precision, pads it and filters it: up to
seven times the image. Spline interpolation to a finer or coarser grid is linear and works on each axis by itself, so
along each axis it is a matrix, whose columns are what interpolation makes of single voxels. Applied to a few planes at
a time, the matrices give the same numbers up to the last bit of single precision.

Labels: nnU-Net interpolates the logits of all classes linearly to the original grid, rounds them to half precision and
takes the largest. The same labels are found here from planes as they come. Between neighbouring planes, rows and
columns of the network's grid lies a cell of eight logits for each class. Interpolated values lie between the smallest
and the largest of these, and rounding keeps their order, so a class can win somewhere in a cell only if its largest
logit reaches the largest over all classes of the smallest logit. Nearly everywhere one class alone does, and nothing
need be interpolated; where several do, they are interpolated and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from scipy import ndimage

#: Smaller entries, the far ends of the spline's filter, change nothing in single precision.
_NEGLIGIBLE = 1e-13
#: Double-precision elements that are worked on at a time.
_BLOCK_ELEMENTS = 2**21
#: Elements that a tile of all classes has about: as many as stay in a core's cache.
_TILE_ELEMENTS = 2**18
_MAGNITUDE, _SIGN = np.int16(0x7FFF), np.int16(-0x8000)
_OPTIONS = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}

Matrix = npt.NDArray[np.float64]
Image = npt.NDArray[np.float32]
Bits = npt.NDArray[np.int16]
Indices = npt.NDArray[np.intp]
#: For an output plane: which of the input planes it takes values from, and with what weights; None for the whole value.
PlaneTaps = Sequence[tuple[int, Any]]
#: Values of the candidates at all corners of their cells, where those of the corner begin that each output voxel takes,
#: and its weights by row and by column.
Tap = tuple[Matrix, "Indices | int", "Matrix | None", "Matrix | None"]


def is_default_resampling(configuration: Mapping[str, Any], kind: str) -> bool:
    """Tell whether plans resample ``data`` or ``probabilities`` as nnU-Net does by default, but for the order."""
    options = configuration[f"resampling_fn_{kind}_kwargs"]
    is_default = configuration[f"resampling_fn_{kind}"] == "resample_data_or_seg_to_shape"
    return is_default and set(options) <= _OPTIONS and not options.get("is_seg", False)


# Images ---------------------------------------------------------------------------------------------------------------


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


# Labels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AxisMap:
    """Where the voxels of an output axis lie on an input axis.

    Attributes:
        lower: Index of the input voxel at or below each output voxel, ascending, of shape ``(n_out,)``. With the next
            voxel it bounds the cell, so before the first voxel it is the first, and behind the last the last but one.
        weight: How far each lies towards the next input voxel, from 0 to 1; None where each lies on an input voxel or
            takes the nearest one's value.
        ends: For each output voxel which ends of its cell the weights ``1 - weight`` and ``weight`` belong to,
            ``(2, n_out)``: 0 and 1, but the same end twice outside of the first and the last voxel.
    """

    lower: Indices
    weight: Matrix | None
    ends: Indices | None = None

    @property
    def linear(self) -> bool:
        """Whether values between two input voxels are interpolated."""
        return self.weight is not None


def axis_maps(
    shape: Sequence[int],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order_z: int = 0,
    force_separate_z: bool | None = None,
    **threshold: float,
) -> tuple[AxisMap, AxisMap, AxisMap]:
    """Place voxels as ``resample_data_or_seg_to_shape`` of nnU-Net does when its order is 1.

    With ``order_z`` 0 an axis that is resampled separately takes the nearest plane, with 1 it is linear there too.
    """
    separate, axis = determine_do_sep_z_and_axis(force_separate_z, spacing, new_spacing, **threshold)
    nearest = [separate and order_z == 0 and axis == i for i in range(3)]
    x, y, z = (_axis_map(*each) for each in zip(shape, new_shape, nearest, strict=True))
    return x, y, z


def _axis_map(n_in: int, n_out: int, nearest: bool) -> AxisMap:
    if n_in == n_out:
        return AxisMap(np.arange(n_out), None)
    # The borders of the first and last voxel fall together, not their centres.
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    if nearest or n_in == 1:
        return AxisMap(np.floor(position + 0.5).astype(np.intp).clip(0, n_in - 1), None)
    below = np.floor(position).astype(np.intp)
    lower = below.clip(0, n_in - 2)
    ends = np.stack([below, below + 1]).clip(0, n_in - 1) - lower
    return AxisMap(lower, 1 - (1 - (position - below)), ends)  # to the last bit as SciPy's splines have it


class LabelResampler:
    """Takes planes of logits in their order and gives planes of labels as soon as they are certain.

    Args:
        maps: How output lies on input, for the axis along which planes come and the two axes of a plane.
        dtype: Type of the labels.
    """

    def __init__(self, maps: tuple[AxisMap, AxisMap, AxisMap], dtype: npt.DTypeLike = np.uint8) -> None:
        self._planes, self._rows, self._columns = maps
        self._dtype = np.dtype(dtype)
        self._previous: Bits | None = None
        self._next_plane = 0

    def push(self, logits: npt.NDArray[np.float16]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Take the next plane.

        Args:
            logits: Of shape ``(K, Y, Z)`` for ``K`` classes; not kept.

        Yields:
            Index of an output plane and its labels ``(Y, Z)`` on the output grid, in order.
        """
        plane = _to_ordered(logits)
        index, self._next_plane = self._next_plane, self._next_plane + 1
        if not self._planes.linear:
            wanted = _span(self._planes.lower, index, index + 1)
            if wanted:
                labels = self._layer([plane], [[(0, None)]])[0]
                yield from ((i, labels) for i in wanted)
            return
        previous, self._previous = self._previous, plane
        wanted = _span(self._planes.lower, index - 1, index)
        if previous is not None and wanted:
            yield from zip(
                wanted, self._layer([previous, plane], [_taps(self._planes, i) for i in wanted]), strict=True
            )

    def _layer(self, inputs: Sequence[Bits], of_outputs: Sequence[PlaneTaps]) -> npt.NDArray[Any]:
        """Labels ``(n, Y, Z)`` of output planes between two input planes, or on one."""
        n_classes, height, width = inputs[0].shape
        n_rows = height - self._rows.linear
        labels = np.empty((len(of_outputs), len(self._rows.lower), len(self._columns.lower)), self._dtype)
        at_once = max(1, _TILE_ELEMENTS // (n_classes * width))
        for first in range(0, n_rows, at_once):
            last = min(first + at_once, n_rows)
            rows = _span(self._rows.lower, first, last)
            if rows:
                tile = _Tile(inputs, first, last, self._rows, self._columns)
                tile.label(slice(rows.start, rows.stop), of_outputs, labels)
        return labels


class _Tile:
    """Some rows of cells, and which classes can win in each."""

    def __init__(self, inputs: Sequence[Bits], first: int, last: int, rows: AxisMap, columns: AxisMap) -> None:
        self._inputs, self._first, self._rows, self._columns = inputs, first, rows, columns
        smallest, largest = self._extremes(slice(first, last + rows.linear))
        possible = largest >= smallest.max(axis=0)
        self._n_columns = possible.shape[2]
        n_cells = possible.shape[1] * self._n_columns
        classes, cells = np.divmod(np.flatnonzero(possible), n_cells)
        #: The only class that is possible, where there is but one.
        self._winner = np.zeros(n_cells, np.intp)
        self._winner[cells] = classes
        self._count = np.bincount(cells, minlength=n_cells)
        several = self._count[cells] > 1
        by_cell = np.argsort(cells[several], kind="stable")  # ascending classes in each cell
        self._classes, self._cells = classes[several][by_cell], cells[several][by_cell]

    def _extremes(self, rows: slice) -> tuple[Bits, Bits]:
        inputs = [plane[:, rows] for plane in self._inputs]
        smallest, largest = (
            inputs[0] if len(inputs) == 1 else function(*inputs) for function in (np.minimum, np.maximum)
        )
        if self._rows.linear:
            smallest = np.minimum(smallest[:, :-1], smallest[:, 1:])
            largest = np.maximum(largest[:, :-1], largest[:, 1:])
        if self._columns.linear:
            smallest = np.minimum(smallest[:, :, :-1], smallest[:, :, 1:])
            largest = np.maximum(largest[:, :, :-1], largest[:, :, 1:])
        return smallest, largest

    def label(self, rows: slice, of_outputs: Sequence[PlaneTaps], labels: npt.NDArray[Any]) -> None:
        """Fill output rows, which lie between the tile's."""
        cells = (self._rows.lower[rows, None] - self._first) * self._n_columns + self._columns.lower
        labels[:, rows] = self._winner[cells]
        open_rows, open_columns = np.nonzero(self._count[cells] > 1)
        if not len(open_rows):
            return
        cells = cells[open_rows, open_columns]
        in_plane = list(product(_taps(self._rows, open_rows + rows.start), _taps(self._columns, open_columns)))
        planes = [self._corner_values(plane) for plane in self._inputs]
        n_candidates = len(self._cells)
        for out, in_depth in zip(labels[:, rows], of_outputs, strict=True):
            taps: list[Tap] = []
            for plane, weight in in_depth:
                values = (planes[plane] if weight is None else planes[plane] * weight).reshape(-1)
                for (row, by_row), (column, by_column) in in_plane:
                    corner = row * (1 + self._columns.linear) + column
                    taps.append((values, corner * n_candidates, by_row, by_column))
            out[open_rows, open_columns] = self._largest(cells, taps)

    def _corner_values(self, plane: Bits) -> npt.NDArray[np.float64]:
        """Logits ``(corners, candidates)`` of each candidate at the corners of its cell."""
        _, height, width = plane.shape
        row, column = np.divmod(self._cells, self._n_columns)
        index = (self._classes * height + self._first + row) * width + column
        steps = [y * width + x for y in range(1 + self._rows.linear) for x in range(1 + self._columns.linear)]
        return _from_ordered(plane.reshape(-1)[np.stack([index + step for step in steps])])

    def _largest(self, cells: Indices, taps: Sequence[Tap]) -> Indices:
        """The candidate with the largest value at each output voxel, the first of several that are equal."""
        starts = np.searchsorted(self._cells, cells)
        counts = self._count[cells]
        best = _interpolate(starts, taps)
        winner = self._classes[starts]
        open_voxels = np.arange(len(cells))
        for i in range(1, int(counts.max())):
            open_voxels = open_voxels[counts[open_voxels] > i]
            candidate = starts[open_voxels] + i
            value = _interpolate(candidate, taps, open_voxels)
            better = value > best[open_voxels]
            winners = open_voxels[better]
            best[winners], winner[winners] = value[better], self._classes[candidate[better]]
        return winner


def _interpolate(
    candidates: Indices, taps: Sequence[Tap], voxels: Indices | slice = slice(None)
) -> npt.NDArray[np.float16]:
    """Values of candidates at output voxels, multiplied and added in SciPy's order and rounded to half precision.

    Often the exact value lies in the middle between two numbers of half precision, and the last bit decides.
    """
    total = np.zeros(len(candidates))
    for values, offset, by_row, by_column in taps:
        value = values[candidates + (offset if isinstance(offset, int) else offset[voxels])]
        for weight in (by_row, by_column):
            if weight is not None:
                value *= weight[voxels]
        total += value
    return total.astype(np.float16)


def _taps(axis: AxisMap, index: Any) -> list[tuple[Any, Any]]:
    """Which ends of the cell output voxels take values from, and with what weights; None for the whole value."""
    if axis.weight is None or axis.ends is None:
        return [(0, None)]
    weight = axis.weight[index]
    return [(axis.ends[0][index], 1 - weight), (axis.ends[1][index], weight)]


def _to_ordered(logits: npt.NDArray[np.float16]) -> Bits:
    """Whole numbers in the order of half-precision numbers, which processors compare many times faster.

    Both zeros become 0: in the corners of images, where windows weigh next to nothing, many logits are zero.
    """
    bits = np.ascontiguousarray(logits).view(np.int16)
    sign = bits >> 15
    ordered: Bits = bits & _MAGNITUDE
    ordered ^= sign
    ordered -= sign
    return ordered


def _from_ordered(ordered: Bits) -> npt.NDArray[np.float64]:
    sign = ordered >> 15
    bits: Bits = ((ordered ^ sign) - sign) | (sign & _SIGN)
    return bits.view(np.float16).astype(np.float64)


def _span(ascending: Indices, first: int, stop: int) -> range:
    """Indices of the entries from ``first`` to before ``stop``."""
    return range(*(int(i) for i in np.searchsorted(ascending, (first, stop))))
