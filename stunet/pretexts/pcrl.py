"""Restore distorted crops and recognize the two of a case: generation and contrast at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.network import STUNet
from stunet.pretexts.contrastive import SimCLR, nt_xent, overlapping_crops, spread
from stunet.pretexts.pretext import Step, cut
from stunet.pretexts.reconstruction import Genesis


class PCRL(SimCLR):
    """Restore two distorted crops of a case through the decoder, and contrast their coarsest features.

    The published method conditions restoration on the transformation by an attention module and contrasts with a
    memory bank; with one network and the batch's own views this is its preservational and its contrastive loss.
    """

    family, source = "generative + contrastive", "arXiv 2109.04379, 2301.00772"
    trains = ("encoder", "decoder")
    max_gradient_norm = Genesis.max_gradient_norm
    defaults: ClassVar[Mapping[str, Any]] = {
        **SimCLR.defaults,
        **{k: v for k, v in Genesis.defaults.items() if k != "pretext_skips"},
    }

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.head = self.reconstruction_head()

    def forward(self, images: Tensor) -> Step:
        """Crop, distort, restore, contrast."""
        pairs = [overlapping_crops(image.shape[1:], self.crop, self.settings["crop_overlap"]) for image in images]
        truth = torch.stack([cut(image, boxes[i]) for i in (0, 1) for image, boxes in zip(images, pairs, strict=True)])
        distorted, _ = Genesis.corrupt(self, truth)  # type: ignore[arg-type] # reads the settings alone
        features = self.encoder(distorted)
        restored = self.head(self.decoder.finest(features))
        z = F.normalize(self.projector(features[-1].flatten(2).mean(2)), dim=1)
        contrast, accuracy = nt_xent(z, self.settings["temperature"])
        restoration = F.mse_loss(restored, truth) / truth.var(correction=0).clamp_min(1e-6)
        self.chance = {"error": 1.0, "accuracy": 1 / (len(z) - 1)}
        picture = {"input": distorted[0, 0], "output": restored[0, 0].detach(), "truth": truth[0, 0]}
        return Step(
            restoration + contrast,
            {"error": restoration.detach().sqrt(), "accuracy": accuracy, **spread(z.detach())},
            picture,
        )
