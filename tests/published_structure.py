"""The operations of the published network in the order it does them, as an oracle and to compare costs with.

Interpolate, then convolve; concatenate; every operation a module of its own; every head computed, whoever reads it
(arXiv 2304.06716, figure 2). The modules have the names of this package, so weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stunet.sizes import STUNetSize

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class Block(nn.Module):
    def __init__(self, channels: tuple[int, int], stride: tuple[int, ...], *, project: bool) -> None:
        super().__init__()
        here, out = channels
        conv, norm = CONVS[len(stride)], NORMS[len(stride)]
        self.conv1 = conv(here, out, 3, stride=stride, padding=1)
        self.norm1 = norm(out, affine=True)
        self.act1 = nn.LeakyReLU(inplace=True)
        self.conv2 = conv(out, out, 3, padding=1)
        self.norm2 = norm(out, affine=True)
        self.act2 = nn.LeakyReLU(inplace=True)
        self.projection = conv(here, out, 1, stride=stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projection is not None:
            x = self.projection(x)
        y = y.add_(x) if getattr(self.act2, "inplace", False) else y + x
        return self.act2(y)


def stage(channels: tuple[int, int], stride: tuple[int, ...], depth: int) -> nn.Sequential:
    unit, out = (1,) * len(stride), channels[1]
    blocks = [Block((out, out), unit, project=False) for _ in range(depth - 1)]
    return nn.Sequential(Block(channels, stride, project=True), *blocks)


class Up(nn.Module):
    def __init__(self, channels: tuple[int, int], scale: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.scale = CONVS[len(scale)](*channels, 1), tuple(map(float, scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=self.scale, mode="nearest"))


class PublishedStructure(nn.Module):
    """``forward`` gives the logits of all five levels, finest first; with ``all_outputs`` false the finest alone."""

    def __init__(
        self, size: STUNetSize, input_channels: int, num_classes: int, strides: Sequence[Any], n_axes: int = 3
    ):
        super().__init__()
        self.all_outputs = True
        full = [(stride,) * n_axes if isinstance(stride, int) else tuple(stride) for stride in strides]
        features, unit = size.features, (1,) * len(full[0])
        levels = list(enumerate(pairwise(features)))[::-1]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        channels = pairwise((input_channels, *features))
        self.encoder.stages = nn.ModuleList(map(stage, channels, full, size.depth))
        self.decoder.upsamplings = nn.ModuleList(Up((below, here), full[i + 1]) for i, (here, below) in levels)
        self.decoder.stages = nn.ModuleList(stage((2 * f, f), unit, size.depth[i]) for i, (f, _) in levels)
        self.decoder.seg_layers = nn.ModuleList(CONVS[len(unit)](here, num_classes, 1) for _, (here, _) in levels)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = []
        for down in self.encoder.stages:
            x = down(x)
            skips.append(x)
        skips.pop()
        logits = []
        parts = zip(self.decoder.upsamplings, self.decoder.stages, self.decoder.seg_layers, strict=True)
        for up, level, head in parts:
            x = up(x)
            x = torch.cat((x, skips.pop()), dim=1)
            x = level(x)
            logits.append(head(x))
        return logits[::-1] if self.all_outputs else logits[-1]
