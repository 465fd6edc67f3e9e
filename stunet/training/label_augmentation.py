"""Rotate and scale label maps of many structures in a fraction of the time, with the same result."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

#: What an indicator counts inside its label; half precision rounds the scores, so it decides on ties.
_SCALE = 1000.0
#: Voxels by which a coordinate computed here may differ from grid_sample's own.
_MARGIN = 0.01


class LocalLabelTransform(SpatialTransform):
    """batchgeneratorsv2's spatial transform, with each label interpolated only where it can count.

    The original interpolates the indicator of every label over the whole patch, and a voxel gets the label with the
    highest score; time grows with the number of labels. Yet between voxels of one label that one wins anyway, and
    elsewhere only labels of which a voxel is near can win. The scores that are left to compute come from the same
    ``grid_sample``, so the result is equal to the last bit. Settings that nnU-Net does not use go to the original.
    """

    @classmethod
    def like(cls, transform: SpatialTransform) -> LocalLabelTransform:
        """Make one with the settings of another."""
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
            result, places = _certain_labels(channel, grid)
            doubtful = _Doubtful(channel, grid.reshape(-1, 3)[places], pad_label)
            if reaches_outside:
                boxes.setdefault(pad_label, ())
            for label in sorted(boxes):
                doubtful.score(label, boxes[label], outside=reaches_outside and label == pad_label)
            result.view(-1)[places] = doubtful.winners()
            channels.append(result)
        return torch.stack(channels)

    def _is_known(self, segmentation: Tensor) -> bool:
        return (
            segmentation.ndim == 4
            and min(segmentation.shape[1:]) > 1
            and self.mode_seg == "bilinear"
            and self.seg_tiebreak == "nearest"
            and self.border_mode_seg in ("zeros", "constant")
            and not self.align_corners
        )


def _boxes(labels: Tensor) -> dict[int, tuple[slice, ...]]:
    """Find the box that holds each label of a map."""
    lowest = int(labels.min())
    found = ndimage.find_objects((labels.int() - (lowest - 1)).numpy())
    return {lowest + i: box for i, box in enumerate(found) if box is not None}


def _certain_labels(labels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Label the points between eight voxels of one label, and find the places of all others in the flattened patch."""
    low = high = labels
    for axis, size in enumerate(labels.shape):
        low = torch.minimum(low.narrow(axis, 0, size - 1), low.narrow(axis, 1, size - 1))
        high = torch.maximum(high.narrow(axis, 0, size - 1), high.narrow(axis, 1, size - 1))
    # A map of these cells, which has a voxel less than the labels along each axis and is half a voxel further; 0 where
    # it is not certain, and outside.
    lowest = int(labels.min())
    cells = (low.float() - (lowest - 1)) * (low == high)
    sizes = torch.tensor(labels.shape).flip(0)  # grid_sample has the last axis first
    sampled = _sample(cells, grid * (sizes / (sizes - 1)), "nearest")
    return (sampled + (lowest - 1)).to(labels.dtype), torch.nonzero(sampled.flatten() == 0)[:, 0]


def _sample(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    return grid_sample(volume[None, None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0, 0]


class _Doubtful:
    """Points at which labels compete, and the scores so far.

    Args:
        labels: The map, ``(X, Y, Z)``.
        grid: Where the points are, ``(N, 3)``, as grid_sample wants it.
        pad_label: The label around the map.
    """

    def __init__(self, labels: Tensor, grid: Tensor, pad_label: int) -> None:
        self._labels, self._grid = labels, grid
        self._voxels = [((grid[:, -1 - axis] + 1) * size - 1) / 2 for axis, size in enumerate(labels.shape)]
        self._indicator = labels.float().sub_(pad_label)
        nearest = _sample(self._indicator, grid.view(-1, 1, 1, 3), "nearest").flatten().add_(pad_label)
        self._indicator.zero_()
        self._nearest = nearest.to(labels.dtype)
        self._best = torch.full_like(nearest, float("-inf"), dtype=torch.float16)
        self._best_of_nearest = self._best.clone()
        self._winner = self._nearest.clone()

    def score(self, label: int, box: tuple[slice, ...], *, outside: bool) -> None:
        """Let a label compete. Labels come in ascending order, as the lower one wins ties.

        Args:
            label: The label.
            box: Where in the map it is.
            outside: Whether it is also all around the map; then its indicator is less by one, as zeros are there.
        """
        if outside:
            box, chosen = (), torch.arange(len(self._grid))
        else:
            chosen = self._near(box)
        indicator = self._indicator[box]
        torch.eq(self._labels[box], label, out=indicator)
        if outside:
            indicator.sub_(1)
        indicator.mul_(_SCALE)
        scores = _sample(self._indicator, self._grid[chosen].view(-1, 1, 1, 3), "bilinear").flatten()
        indicator.zero_()
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
        """Return the label of each point, ``(N,)``; the nearest one wins ties that it takes part in."""
        return torch.where(self._best_of_nearest == self._best, self._nearest, self._winner)
