"""Segment how much of a second image was mixed into the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stunet.errors import SettingsError
from stunet.loss import PartialDiceCELoss
from stunet.network import STUNet
from stunet.pretexts.pretext import Pretext, Step
from stunet.pretexts.reconstruction import random_box


class VolumeFusion(Pretext):
    """Mix two patches, box by box, at one of K + 1 weights, and segment the weight (Dice and cross-entropy).

    Encoder and decoder learn what a segmentation needs: to tell regions by their look.
    """

    family, source = "dense predictive", "arXiv 2306.16925; settings of nnssl, arXiv 2412.17041"
    trains = ("encoder", "decoder")
    defaults: ClassVar[Mapping[str, Any]] = {
        "fusion_levels": 4,
        "fewest_boxes": 10,
        "most_boxes": 39,
        "smallest_box": 8,
        "largest_box": 0.625,
    }
    min_batch = 2

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        fewest, most = self.settings["fewest_boxes"], self.settings["most_boxes"]
        if fewest > most:
            raise SettingsError(f"fewest_boxes={fewest} and most_boxes={most}: lower the first, or raise the second")
        classes = self.settings["fusion_levels"] + 1
        self.head = self.conv_op(self.features[0], classes, 1)
        self.loss = PartialDiceCELoss(classes, batch_dice=True)
        with torch.random.fork_rng(devices=[]):
            drawn = torch.stack([self._levels(patch_size) for _ in range(8)])
        self.chance = {"Dice": float((drawn > 0).float().mean()) / (classes - 1)}  # of guessing by their shares

    def forward(self, images: Tensor) -> Step:
        """Mix each case with the next one of the batch, segment."""
        levels = self.settings["fusion_levels"]
        target = torch.stack([self._levels(images.shape[2:]) for _ in images])[:, None].to(images.device)
        mixed = mix(images, images.roll(-1, 0), target / levels)
        logits = self.head(self.decoder.finest(self.encoder(mixed)))
        predicted, true = logits.detach().argmax(1), target[:, 0]
        dice = [2 * ((predicted == k) & (true == k)).sum() / ((predicted == k).sum() + (true == k).sum()).clamp_min(1)
                for k in range(1, levels + 1)]  # fmt: skip
        picture = {"input": mixed[0, 0], "output": predicted[0].float(), "truth": true[0].float()}
        return Step(self.loss(logits, target), {"Dice": torch.stack(dice).mean()}, picture)

    def _levels(self, size: Sequence[int]) -> Tensor:
        p, level = self.settings, torch.zeros(tuple(size), dtype=torch.long)
        smallest = [length / n for length, n in zip(self.scaled(p["smallest_box"], share=0.125), size, strict=True)]
        for _ in range(int(torch.randint(p["fewest_boxes"], p["most_boxes"] + 1, ()))):
            level[random_box(size, smallest, p["largest_box"])] = torch.randint(1, p["fusion_levels"] + 1, ())
        return level


def mix(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return ``share`` of the images, ``(B, 1, X, Y[, Z])`` from 0 to 1, and the rest of the others."""
    return share * images + (1 - share) * others
