"""Find out how the blocks of an image were permuted (jigsaw), rotated (Rubik's cube) and masked (Rubik's cube+)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, islice, permutations
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stunet.network import STUNet
from stunet.pretexts.pretext import Pretext, Step, classified, divided_by, split_blocks


def distant_permutations(n: int, count: int) -> npt.NDArray[np.int64]:
    """Choose permutations that differ from each other in many places, ``(count, n)``, one after the other.

    Each is the one that is farthest from those before it in its nearest Hamming distance, then in the sum of them.
    """
    rng = np.random.default_rng(0)
    if n <= 8:
        candidates = np.array(list(islice(permutations(range(n)), math.factorial(n))))
    else:
        candidates = rng.permuted(np.tile(np.arange(n), (20000, 1)), axis=1)
    chosen = [candidates[rng.integers(len(candidates))]]
    nearest, total = np.full(len(candidates), n), np.zeros(len(candidates))
    for _ in range(min(count, len(candidates)) - 1):
        distance = (candidates != chosen[-1]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(candidates[np.lexsort((total, nearest))[-1]])
    return np.array(chosen)


class Jigsaw(Pretext):
    """Permute the blocks of a patch, and tell which permutation it was.

    The network sees each block by itself, so that the edges between them do not give the answer away; the head gets
    the mean features of all, place by place. Blocks are resized to the nearest size that the network takes.
    """

    family, source, oriented = "predictive", "arXiv 1603.09246, 1912.05396; settings of arXiv 2209.12157", True
    defaults: ClassVar[Mapping[str, Any]] = {"grid": 2, "permutations": 100}
    name = "jigsaw"

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.grid = (self.settings["grid"],) * len(self.patch_size)
        divided_by(self.patch_size, self.grid, self.strides, self.name)
        n_blocks = math.prod(self.grid)
        order = torch.from_numpy(distant_permutations(n_blocks, self.settings["permutations"]))
        self.permutations: Tensor
        self.register_buffer("permutations", order, persistent=False)
        self.head = nn.Linear(n_blocks * self.features[-1], len(order))
        self.chance = {"accuracy": 1 / len(order)}

    def forward(self, images: Tensor) -> Step:
        """Permute, classify."""
        which = torch.randint(len(self.permutations), (len(images),))
        blocks = permuted(split_blocks(images, self.grid), self.permutations[which])
        features = self.by_place(blocks)
        loss, accuracy = classified(self.head(features.flatten(1)), which.to(images.device))
        return Step(loss, {"accuracy": accuracy}, {})

    def by_place(self, blocks: Tensor) -> Tensor:
        """Return the mean features of each of ``(B, blocks, C, x, y[, z])``, ``(B, blocks, C)``."""
        return self.pooled(self.fitted(blocks.flatten(0, 1))).view(*blocks.shape[:2], -1)


def permuted(blocks: Tensor, order: Tensor) -> Tensor:
    """Put at place i of ``(B, blocks, …)`` the block ``order[:, i]``."""
    return torch.stack([case[row] for case, row in zip(blocks, order, strict=True)])


def half_turns(n_axes: int) -> list[tuple[int, ...]]:
    """List the half turns of a block as the axes that they reverse; none is the first. They fit any shape of block.

    >>> half_turns(3)
    [(), (0, 1), (0, 2), (1, 2)]
    """
    return [(), *combinations(range(n_axes), 2)]


class Rubik(Jigsaw):
    """Permute the blocks of a patch and rotate each by half a turn about some axis or none; tell both."""

    source = "arXiv 1910.02241; settings of arXiv 2209.12157"
    name = "rubik"
    mask_share = 0.0

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.turns = half_turns(len(self.grid))
        self.turn_head = nn.Linear(self.features[-1], len(self.turns))
        self.chance = {**self.chance, "accuracy of rotations": 1 / len(self.turns)}

    def forward(self, images: Tensor) -> Step:
        """Permute, rotate and mask, classify."""
        which = torch.randint(len(self.permutations), (len(images),))
        blocks = permuted(split_blocks(images, self.grid), self.permutations[which])
        turned = torch.randint(len(self.turns), blocks.shape[:2])
        blocks = torch.stack(
            [
                torch.stack(
                    [block.flip([1 + axis for axis in self.turns[i]]) for block, i in zip(case, row, strict=True)]
                )
                for case, row in zip(blocks, turned.tolist(), strict=True)
            ]
        )
        features = self.by_place(self.masked(blocks))
        loss, accuracy = classified(self.head(features.flatten(1)), which.to(images.device))
        of_turns, right = classified(self.turn_head(features).flatten(0, 1), turned.flatten().to(images.device))
        return Step(loss + of_turns, {"accuracy": accuracy, "accuracy of rotations": right}, {})

    def masked(self, blocks: Tensor) -> Tensor:
        """Hide nothing."""
        return blocks


class RubikPlus(Rubik):
    """Rubik's cube with random voxels set to 0."""

    source = "Zhu et al., Rubik's Cube+, Medical Image Analysis 2020; settings of arXiv 2209.12157"
    defaults: ClassVar[Mapping[str, Any]] = {**Rubik.defaults, "mask_ratio": 0.25}
    name = "rubik-plus"

    def masked(self, blocks: Tensor) -> Tensor:
        """Set a share of the voxels to 0, the same in all channels."""
        dropped = torch.rand(*blocks.shape[:2], 1, *blocks.shape[3:]) < self.settings["mask_ratio"]
        return blocks.masked_fill(dropped.to(blocks.device), 0.0)
