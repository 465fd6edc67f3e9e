"""Tell by how much an image was rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from stunet.errors import SettingsError
from stunet.network import STUNet
from stunet.pretexts.pretext import Pretext, Step, classified

Turn = tuple[int, tuple[int, int]]
"""Quarter turns, and the two axes of their plane."""


def turns(n_axes: int) -> list[Turn]:
    """List the rotations to tell apart: none, and 90, 180 and 270 degrees in each plane; 10 in 3D, 4 in 2D.

    >>> turns(2)
    [(0, (0, 1)), (1, (0, 1)), (2, (0, 1)), (3, (0, 1))]
    """
    return [(0, (0, 1)), *((k, plane) for plane in combinations(range(n_axes), 2) for k in (1, 2, 3))]


def turn(image: Tensor, how: Turn) -> Tensor:
    """Rotate ``(C, X, Y[, Z])``."""
    k, (a, b) = how
    return torch.rot90(image, k, (1 + a, 1 + b))


class Rotation(Pretext):
    """Rotate each patch by one of ten rotations, and tell which from the pooled features.

    Patches are cropped to the largest cube, as a quarter turn exchanges axes.
    """

    family, source, oriented = "predictive", "arXiv 1803.07728; settings of arXiv 2209.12157", True

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        largest = max(self.strides)
        self.side = min(self.patch_size) // largest * largest
        if self.side < 2 * largest:
            raise SettingsError(
                f"pretext=rotation: no cube of 2 x {largest} voxels in a patch {[*patch_size]}: enlarge patch_size"
            )
        self.turns = turns(len(self.patch_size))
        self.head = nn.Linear(self.features[-1], len(self.turns))
        self.chance = {"accuracy": 1 / len(self.turns)}

    def forward(self, images: Tensor) -> Step:
        """Rotate, classify."""
        for axis, n in enumerate(images.shape[2:], start=2):
            images = images.narrow(axis, (n - self.side) // 2, self.side)
        which = torch.randint(len(self.turns), (len(images),))
        turned = torch.stack([turn(image, self.turns[i]) for image, i in zip(images, which.tolist(), strict=True)])
        loss, accuracy = classified(self.head(self.pooled(turned)), which.to(images.device))
        return Step(loss, {"accuracy": accuracy}, {})
