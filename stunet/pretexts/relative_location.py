"""Tell where a block lies beside the block at the centre."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stunet.errors import SettingsError
from stunet.network import STUNet
from stunet.pretexts.pretext import Pretext, Step, classified


class RelativeLocation(Pretext):
    """Cut a patch into 3x3x3 cells, and tell from two blocks which neighbour of the centre the second one is.

    A block is smaller than its cell and lies anywhere in it, so that its edges do not give the answer away. Blocks
    that are too small for the network are enlarged by linear interpolation.
    """

    family, source, oriented = "predictive", "arXiv 1505.05192; settings of arXiv 2209.12157", True
    defaults: ClassVar[Mapping[str, Any]] = {"pairs": 4, "block_share": 0.8}

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.cell = tuple(n // 3 for n in self.patch_size)
        self.block = tuple(math.ceil(n * self.settings["block_share"]) for n in self.cell)
        if min(self.cell) < 4:
            raise SettingsError(f"pretext=relative-location: patch_size {[*patch_size]} instead of 12 voxels or more")
        cells = list(product(range(3), repeat=len(self.patch_size)))
        self.centre, self.neighbours = (1,) * len(self.patch_size), [c for c in cells if set(c) != {1}]
        self.head = nn.Linear(2 * self.features[-1], len(self.neighbours))
        self.chance = {"accuracy": 1 / len(self.neighbours)}

    def forward(self, images: Tensor) -> Step:
        """Cut pairs of blocks, classify."""
        pairs = min(self.settings["pairs"], len(self.neighbours))
        which = torch.stack([torch.randperm(len(self.neighbours))[:pairs] for _ in images])
        blocks = [self._cut(image, self.centre) for image in images]
        blocks += [
            self._cut(image, self.neighbours[i]) for image, row in zip(images, which.tolist(), strict=True) for i in row
        ]
        centres, others = torch.split(self.pooled(self.fitted(torch.stack(blocks))), [len(images), len(images) * pairs])
        both = torch.cat((centres.repeat_interleave(pairs, 0), others), 1)
        loss, accuracy = classified(self.head(both), which.flatten().to(images.device))
        return Step(loss, {"accuracy": accuracy}, {})

    def _cut(self, image: Tensor, cell: Sequence[int]) -> Tensor:
        for axis, (index, size, length) in enumerate(zip(cell, self.cell, self.block, strict=True), start=1):
            start = index * size + int(torch.randint(size - length + 1, ()))
            image = image.narrow(axis, start, length)
        return image
