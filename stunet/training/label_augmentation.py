"""Rotating and scaling label maps of many structures in a fraction of the time, with the same result."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

__all__ = ["LocalLabelTransform"]

#: What an indicator counts inside its label; half precision rounds the scores, so it decides on ties.
_SCALE = 1000.0
#: Voxels by which a coordinate computed here may differ from grid_sample's own.
_MARGIN = 0.01


class LocalLabelTransform(SpatialTransform):
    """batchgeneratorsv2's spatial transform, with each label interpolated only where it can count.

    The original interpolates the indicator of every label over the whole patch, and a voxel gets the label with the
    highest score; time grows with the number of labels. Yet inside a structure the nearest label wins anyway, and
    elsewhere only labels of which a voxel is near can win. The scores that are left to compute come from the same
    ``grid_sample``, so the result is equal to the last bit. Settings that nnU-Net does not use go to the original.
    """

    @classmethod
    def like(cls, transform: SpatialTransform) -> LocalLabelTransform:
        """One with the settings of another."""
        local = cls.__new__(cls)
        local.__dict__.update(vars(transform))
        return local

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        grid = params["grid"]
        if grid is None or not self._is_known(segmentation):
            original: Tensor = super()._apply_to_segmentation(segmentation, **params)
            return original
        pad_label = int(self.padding_value_seg) if self.border_mode_seg == "constant" else 0
        reaches_outside = self._may_reach_outside(grid, segmentation.shape[1:])
        channels = []
        for channel in segmentation.contiguous():
            boxes = _boxes(channel)
            if len(boxes.keys() | ({pad_label} if reaches_outside else set())) < 3:
                # The original decides between two labels by the score of one of them.
                channels.append(super()._apply_to_segmentation(channel[None], **params)[0])
                continue
            nearest, points = _nearest_and_doubtful(channel, grid, pad_label)
            doubtful = _Doubtful(grid.reshape(-1, 3)[points], nearest.flatten()[points], channel.shape)
            if reaches_outside:
                boxes.setdefault(pad_label, ())
            for label in sorted(boxes):
                doubtful.score(channel, label, boxes[label], outside=reaches_outside and label == pad_label)
            nearest.view(-1)[points] = doubtful.winners()
            channels.append(nearest)
        return torch.stack(channels)

    def _is_known(self, segmentation: Tensor) -> bool:
        return (
            segmentation.ndim == 4
            and min(segmentation.shape[1:]) > 2
            and self.mode_seg == "bilinear"
            and self.seg_tiebreak == "nearest"
            and self.border_mode_seg in ("zeros", "constant")
            and not self.align_corners
        )


def _boxes(labels: Tensor) -> dict[int, tuple[slice, ...]]:
    """Each label of a map and the box that holds it."""
    lowest = int(labels.min())
    found = ndimage.find_objects((labels - (lowest - 1)).numpy())
    return {lowest + i: box for i, box in enumerate(found) if box is not None}


def _nearest_and_doubtful(labels: Tensor, grid: Tensor, pad_label: int) -> tuple[Tensor, Tensor]:
    """The nearest label at each point, and the places, in the flattened patch, where another one may win.

    These are the points whose nearest voxel has another label among its neighbours, or is at the border of the map or
    outside of it: every voxel that counts at a point is the nearest one or its neighbour.
    """
    low = high = labels
    for axis in range(labels.ndim):
        inner = labels.shape[axis] - 2
        low_0, low_1, low_2 = (low.narrow(axis, start, inner) for start in range(3))
        high_0, high_1, high_2 = (high.narrow(axis, start, inner) for start in range(3))
        low = torch.minimum(torch.minimum(low_0, low_1), low_2)
        high = torch.maximum(torch.maximum(high_0, high_1), high_2)
    # Both in one number, which is 0 outside: twice the label, and 1 where all neighbours have it too.
    code = (labels.int() - pad_label) * 2
    code[1:-1, 1:-1, 1:-1] += low == high
    code = _sample(code.float(), grid, "nearest").int()
    return ((code >> 1) + pad_label).to(labels.dtype), torch.nonzero((code & 1).flatten() == 0)[:, 0]


def _sample(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    return grid_sample(volume[None, None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0, 0]


class _Doubtful:
    """The points at which labels compete, and how far the competition is.

    Args:
        grid: Where the points are, ``(N, 3)``, as grid_sample wants it.
        nearest: The nearest label at each, ``(N,)``.
        shape: Shape of the label map.
    """

    def __init__(self, grid: Tensor, nearest: Tensor, shape: torch.Size) -> None:
        self._grid, self._nearest = grid, nearest
        # grid_sample counts from -1 to 1 over the whole map, and the last axis first
        self._voxels = [((grid[:, -1 - axis] + 1) * size - 1) / 2 for axis, size in enumerate(shape)]
        self._best = torch.full_like(nearest, float("-inf"), dtype=torch.float16)
        self._best_of_nearest = self._best.clone()
        self._winner = nearest.clone()
        self._indicator = torch.zeros(shape)

    def score(self, labels: Tensor, label: int, box: tuple[slice, ...], *, outside: bool) -> None:
        """Let a label compete. Labels come in ascending order, as the lower one wins ties.

        Args:
            labels: The map.
            label: The label.
            box: Where in the map it is.
            outside: Whether it is also all around the map; then its indicator is less by one, as zeros are there.
        """
        if outside:
            chosen = torch.arange(len(self._grid))
            indicator = (labels == label).float().sub_(1).mul_(_SCALE)
        else:
            chosen = self._near(box)
            indicator = self._indicator
            indicator[box] = (labels[box] == label).float().mul_(_SCALE)
        scores = _sample(indicator, self._grid[chosen].view(-1, 1, 1, 3), "bilinear").flatten()
        if not outside:
            indicator[box] = 0
        scores = (scores.add_(_SCALE) if outside else scores).half()
        better = scores > self._best[chosen]
        self._best[chosen[better]] = scores[better]
        self._winner[chosen[better]] = label
        own = self._nearest[chosen] == label
        self._best_of_nearest[chosen[own]] = scores[own]

    def _near(self, box: tuple[slice, ...]) -> Tensor:
        near = torch.ones(len(self._grid), dtype=torch.bool)
        for voxels, cut in zip(self._voxels, box, strict=True):
            near &= (voxels > cut.start - 1 - _MARGIN) & (voxels < cut.stop + _MARGIN)
        return torch.nonzero(near)[:, 0]

    def winners(self) -> Tensor:
        """The label of each point, ``(N,)``; the nearest one wins ties that it takes part in."""
        return torch.where(self._best_of_nearest == self._best, self._nearest, self._winner)
