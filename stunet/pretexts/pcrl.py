"""Restore distorted crops and recognize the two of a case: generation and contrast at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.network import STUNet
from stunet.pretexts.contrastive import SimCLR, nt_xent, overlapping_crops, spread, vary_intensities
from stunet.pretexts.pretext import Step, cut
from stunet.pretexts.reconstruction import LEAST_VARIANCE, Autoencoder, random_box


class PCRL(SimCLR):
    """Restore two distorted crops of a case through the decoder, and contrast their coarsest features.

    Crops are distorted much as in PCRLv2: intensities vary as for SimCLR, which has no blur, and small boxes change
    places. The published methods also contrast several scales and small local crops; this is their preservational and
    their contrastive loss.
    """

    family, source = "generative + contrastive", "arXiv 2109.04379, 2301.00772"
    trains = ("encoder", "decoder")
    max_gradient_norm = Autoencoder.max_gradient_norm
    defaults: ClassVar[Mapping[str, Any]] = {**SimCLR.defaults, "swaps": 100}

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.head = self.reconstruction_head()

    def forward(self, images: Tensor) -> Step:
        """Crop, distort, restore, contrast."""
        pairs = [overlapping_crops(image.shape[1:], self.crop, self.settings["crop_overlap"]) for image in images]
        truth = torch.stack([cut(image, boxes[i]) for i in (0, 1) for image, boxes in zip(images, pairs, strict=True)])
        distorted = truth.clone()
        for crop in distorted:
            swap_boxes(crop, self.settings["swaps"])
        distorted = vary_intensities(distorted)
        features = self.encoder(distorted)
        restored = self.head(self.decoder.finest(features))
        z = F.normalize(self.projector(features[-1].flatten(2).mean(2)), dim=1)
        contrast, accuracy = nt_xent(z, self.settings["temperature"])
        variance = truth.var(correction=0).clamp_min(LEAST_VARIANCE)
        restoration, of_input = (F.mse_loss(x, truth) / variance for x in (restored, distorted))
        self.chance = {"error": 1.0, "accuracy": 1 / (len(z) - 1)}
        picture = {"input": distorted[0, 0], "output": restored[0, 0].detach(), "truth": truth[0, 0]}
        measures = {"error": restoration.detach().sqrt(), "error of the input": of_input.sqrt(), "accuracy": accuracy}
        return Step(restoration + contrast, {**measures, **({} if self.training else spread(z))}, picture)


def swap_boxes(image: Tensor, count: int) -> None:
    """Let pairs of boxes, each an eighth of the sides of ``(C, X, Y[, Z])``, change places, in place.

    Pairs that overlap stay where they are.
    """
    for _ in range(count):
        first, second = (random_box(image.shape[1:], 1 / 8, 1 / 8) for _ in range(2))
        if any(abs(a.start - b.start) >= a.stop - a.start for a, b in zip(first, second, strict=True)):
            kept = cut(image, first).clone()
            cut(image, first).copy_(cut(image, second))
            cut(image, second).copy_(kept)
