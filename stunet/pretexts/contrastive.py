"""Recognize two views of one image among others: by contrast (SimCLR), or by prediction (BYOL)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.errors import SettingsError
from stunet.network import STUNet
from stunet.pretexts.pretext import Pretext, Step, cut, projector


class _TwoViews(Pretext):
    """Two crops of each patch that overlap, each with intensities of its own."""

    family = "contrastive"
    shared_defaults: ClassVar[Mapping[str, Any]] = {"crop_size": 64, "crop_overlap": 0.5, "embedding": 128}
    hidden: ClassVar[int] = 2048
    centred: ClassVar[bool] = True
    min_batch = 2

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        wanted = self.scaled(self.settings["crop_size"], share=0.75)
        self.crop = tuple(max(1, n // s) * s for n, s in zip(wanted, self.strides, strict=True))
        if self.crop == self.strides:
            raise SettingsError(
                f"crops of {[*self.crop]} in a patch {[*patch_size]} leave one voxel at the coarsest stage: "
                "enlarge patch_size or crop_size"
            )
        self.projector = projector(self.features[-1], self.hidden, self.settings["embedding"], centred=self.centred)

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return two views of each case, ``(B, C, *crop)`` each."""
        pairs = [overlapping_crops(image.shape[1:], self.crop, self.settings["crop_overlap"]) for image in images]
        first, second = (
            torch.stack([cut(image, boxes[i]) for image, boxes in zip(images, pairs, strict=True)]) for i in (0, 1)
        )
        return vary_intensities(first), vary_intensities(second)


def overlapping_crops(
    size: Sequence[int], crop: Sequence[int], overlap: float
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Draw two boxes that share at least this fraction of their voxels."""
    least = overlap ** (1 / len(crop))  # along each axis
    first, second = [], []
    for n, c in zip(size, crop, strict=True):
        a = int(torch.randint(n - c + 1, ()))
        shift = math.floor(c * (1 - least))
        low, high = max(0, a - shift), min(n - c, a + shift)
        b = int(torch.randint(low, high + 1, ()))
        first.append(slice(a, a + c))
        second.append(slice(b, b + c))
    return tuple(first), tuple(second)


def vary_intensities(images: Tensor) -> Tensor:
    """Change contrast, brightness and gamma of each case, and add noise, in units of its standard deviation."""
    shape = (len(images), 1, *[1] * (images.ndim - 2))

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(shape)).to(images)

    mean = images.flatten(1).mean(1).view(shape)
    std = images.flatten(1).std(1).clamp_min(1e-6).view(shape)
    x = (images - mean) / std
    x = x.sign() * x.abs().pow(uniform(0.7, 1.5))
    x = x * uniform(0.6, 1.4) + uniform(-0.5, 0.5) + torch.randn(x.shape).to(x) * uniform(0, 0.2)
    return x * std + mean


class SimCLR(_TwoViews):
    """Recognize the other view of a case among all views of a batch (NT-Xent)."""

    source = "arXiv 2002.05709; settings of nnssl, arXiv 2412.17041"
    defaults: ClassVar[Mapping[str, Any]] = {**_TwoViews.shared_defaults, "temperature": 0.5}

    def forward(self, images: Tensor) -> Step:
        """Embed both views, contrast."""
        z = F.normalize(self.projector(self.pooled(torch.cat(self.views(images)))), dim=1)
        loss, accuracy = nt_xent(z, self.settings["temperature"])
        self.chance = {"accuracy": 1 / (len(z) - 1)}
        return Step(loss, {"accuracy": accuracy, **({} if self.training else spread(z))}, {})


def nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the normalized, temperature-scaled cross-entropy (arXiv 2002.05709, equation 1), and the accuracy.

    Args:
        z: Unit vectors ``(2 B, D)``; row i and row i + B are views of one case.
        temperature: Divides similarities.
    """
    n = len(z) // 2
    similarity = (z @ z.T).float() / temperature
    similarity = similarity.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner), (similarity.detach().argmax(1) == partner).float().mean()


def spread(z: Tensor) -> dict[str, Tensor]:
    """Return alignment and uniformity (arXiv 2005.10242) and rank of unit vectors; rows i and i + B are one case's.

    Alignment is the mean square distance of two views: 0 is best. Uniformity is the logarithm of the mean Gaussian
    potential of all pairs: 0 where all vectors are the same, which is the collapse, lower where they spread. The rank
    is the exponential of the entropy of the normalized singular values: 1 at the collapse.
    """
    z = z.detach().float()
    n = len(z) // 2
    if not bool(z.isfinite().all()):
        return dict.fromkeys(("alignment", "uniformity", "rank"), z.new_tensor(torch.nan))
    alignment = (z[:n] - z[n:]).square().sum(1).mean()
    distances = torch.pdist(z)
    singular = torch.linalg.svdvals(z.cpu())
    share = singular / singular.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return {
        "alignment": alignment,
        "uniformity": distances.square().mul(-2).exp().mean().log(),
        "rank": rank.to(z.device),
    }


class BYOL(_TwoViews):
    """Predict the embedding that a moving average of the network gives to the other view.

    The target starts as a copy, takes no gradient, and follows after each step. The loss is as low where all embeddings
    are the same, so the first measure is SimCLR's: whether the other view of a case is the most similar one.
    """

    source = "arXiv 2006.07733; settings of arXiv 2209.12157"
    defaults: ClassVar[Mapping[str, Any]] = {**_TwoViews.shared_defaults, "ema_momentum": 0.996}
    centred = False

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        self.predictor = projector(self.settings["embedding"], self.hidden, self.settings["embedding"])
        self.target = nn.ModuleDict(
            {"encoder": copy.deepcopy(self.encoder), "projector": copy.deepcopy(self.projector)}
        ).requires_grad_(False)
        self.is_started: Tensor
        self.register_buffer("is_started", torch.tensor(False))

    def forward(self, images: Tensor) -> Step:
        """Predict either view's target from the other one."""
        if self.training and not bool(self.is_started):
            self._follow(0.0)
        views = torch.cat(self.views(images))
        z = self.projector(self.pooled(views))
        with torch.no_grad():
            target = self.target["projector"](self.target["encoder"](views)[-1].flatten(2).mean(2))
        swapped = F.normalize(target, dim=1).roll(len(images), 0)
        loss = (F.normalize(self.predictor(z), dim=1) - swapped).square().sum(1).mean()
        z = F.normalize(z, dim=1)
        _, accuracy = nt_xent(z, 1.0)
        self.chance = {"accuracy": 1 / (len(z) - 1)}
        measures = {"accuracy": accuracy, "distance": loss.detach(), **({} if self.training else spread(z))}
        return Step(loss, measures, {})

    def after_step(self) -> None:
        """Let the target follow the network."""
        self._follow(1 - (1 - self.settings["ema_momentum"]) * (math.cos(math.pi * self.progress) + 1) / 2)

    def _follow(self, momentum: float) -> None:
        for name, module in self.target.items():
            follow(module, getattr(self, name), momentum)
        self.is_started.fill_(True)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Set each parameter to ``momentum`` of itself and the rest of the source's."""
    for mine, other in zip(target.parameters(), source.parameters(), strict=True):
        mine.lerp_(other, 1 - momentum)
