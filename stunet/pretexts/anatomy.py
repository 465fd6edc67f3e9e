"""Learn the hierarchy of anatomy: structures differ from each other, and parts make up a whole (Adam/Eden)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.network import STUNet
from stunet.pretexts.contrastive import follow, spread, vary_intensities
from stunet.pretexts.pretext import Pretext, Step, divided_by, projector, split_blocks


class Anatomy(Pretext):
    """Locality and compositionality, from coarse to fine.

    Each patch is cut into 2x2x2 parts, then their parts, as training proceeds. *Locality*: a part is to be recognized
    in another view among the parts of all cases, except those that look too similar, as they may show the same
    structure. *Compositionality*: the embeddings of the eight parts together give that of the whole. The published
    methods take their negatives from a memory bank, and the second one also tells parts from the whole.
    """

    family, source = "hierarchical", "arXiv 2309.15358, 2404.15672"
    defaults: ClassVar[Mapping[str, Any]] = {
        "anatomy_levels": 2,
        "embedding": 128,
        "temperature": 0.2,
        "pruned_above": 0.8,
        "ema_momentum": 0.996,
    }
    hidden = 2048
    min_batch = 2

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(network, patch_size, settings)
        n_axes, size = len(self.patch_size), self.settings["embedding"]
        self.grid = (2,) * n_axes
        divided_by(self.patch_size, (2 ** self.settings["anatomy_levels"],) * n_axes, self.strides, "anatomy")
        self.projector = projector(self.features[-1], self.hidden, size, centred=True)
        self.composer = projector(2**n_axes * size, self.hidden, size)
        self.target = nn.ModuleDict(
            {"encoder": copy.deepcopy(self.encoder), "projector": copy.deepcopy(self.projector)}
        ).requires_grad_(False)
        self.is_started: Tensor
        self.register_buffer("is_started", torch.tensor(False))
        self.chance = {"accuracy": 1 / 2**n_axes}

    def forward(self, images: Tensor) -> Step:
        """Embed wholes and parts at a level that training has come to; contrast and compose."""
        if self.training and not bool(self.is_started):
            self._follow(0.0)
        reached = min(int(self.progress * self.settings["anatomy_levels"]), self.settings["anatomy_levels"] - 1)
        level = int(torch.randint(reached + 1, ()))
        whole = images
        for _ in range(level):  # one part at random of each
            parts = split_blocks(whole, self.grid)
            which = torch.randint(parts.shape[1], (len(parts),)).tolist()
            whole = torch.stack([case[i] for case, i in zip(parts, which, strict=True)])
        parts = split_blocks(whole, self.grid)
        n_parts = parts.shape[1]
        parts = self.fitted(parts.flatten(0, 1))
        z = self._embed(vary_intensities(parts))
        with torch.no_grad():
            of_parts = self._target(vary_intensities(parts))
            of_whole = self._target(self.fitted(whole))
        locality, accuracy = pruned_contrast(z, of_parts, self.settings["temperature"], self.settings["pruned_above"])
        composed = F.normalize(self.composer(z.view(len(images), -1)), dim=1)
        distance = (composed - of_whole).square().sum(1).mean()
        measures = {"accuracy": accuracy, "compositionality": distance.detach()}
        self.chance = {"accuracy": 1 / (len(images) * n_parts)}
        measures |= {} if self.training else spread(torch.cat((z, of_parts)))
        return Step(locality + distance, measures, {})

    def after_step(self) -> None:
        """Let the target follow the network."""
        self._follow(self.settings["ema_momentum"])

    def _follow(self, momentum: float) -> None:
        for name, module in self.target.items():
            follow(module, getattr(self, name), momentum)
        self.is_started.fill_(True)

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.pooled(images)), dim=1)

    def _target(self, images: Tensor) -> Tensor:
        features = self.target["encoder"](images)[-1].flatten(2).mean(2)
        return F.normalize(self.target["projector"](features), dim=1)


def pruned_contrast(z: Tensor, other: Tensor, temperature: float, pruned_above: float) -> tuple[Tensor, Tensor]:
    """Contrast rows of ``z`` ``(N, D)`` with the same rows of another view, without negatives that are too similar.

    Args:
        z: Unit vectors.
        other: Those of the other view.
        temperature: Divides similarities.
        pruned_above: Negatives whose similarity within ``other`` is above this do not count.
    """
    similarity = (z @ other.T).float()
    same = torch.eye(len(z), dtype=torch.bool, device=z.device)
    pruned = (other @ other.T > pruned_above) & ~same
    partner = torch.arange(len(z), device=z.device)
    loss = F.cross_entropy((similarity / temperature).masked_fill(pruned, -torch.inf), partner)
    return loss, (similarity.detach().argmax(1) == partner).float().mean()
