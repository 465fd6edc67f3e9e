"""Reconstruct an image: as it is (autoencoder), or from a distorted (Models Genesis) or a masked one (MAE)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from stunet.loss import to_device
from stunet.network import STUNet
from stunet.pretexts.pretext import Part, Pretext, Step, cut, random_choice, to_unit_range

#: Of patches of nothing but air no error is worth a thousand others.
LEAST_VARIANCE = 0.01


class Autoencoder(Pretext):
    """Reconstruct the patch; the mean square error of all voxels counts relative to the variance of the batch.

    So one learning rate is right for all intensities.

    With ``pretext_skips=false`` the decoder gets zeros in place of the skip connections, so that all has to pass
    through the coarsest features. It is no part of the network then, but a head: fine-tuning takes the encoder alone.
    """

    family, source = "generative", "settings of arXiv 2209.12157"
    max_gradient_norm = 1.0  # squared errors have larger gradients than labels, see reconstruction_head
    trains: tuple[Part, ...] = ("encoder", "decoder")  # the encoder alone without skips
    defaults: ClassVar[Mapping[str, Any]] = {"pretext_skips": True}

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        self.skips = {**self.defaults, **(settings or {})}["pretext_skips"]
        self.trains = ("encoder", "decoder") if self.skips else ("encoder",)
        super().__init__(network, patch_size, settings)
        if not self.skips:
            self.reconstruction = network.decoder
        self.head = self.reconstruction_head()
        self.chance = {"error": 1.0}

    def forward(self, images: Tensor) -> Step:
        """Corrupt, reconstruct. Errors are in units of the standard deviation of what counts: 1 is its mean."""
        corrupted, counts = self.corrupt(images)
        output = self.reconstruct(corrupted)
        counted = counts.expand_as(images)
        n = counted.sum().clamp_min(1)  # not by indexing, which would wait for the GPU
        variance = (((images - (images * counted).sum() / n) * counted).square().sum() / n).clamp_min(LEAST_VARIANCE)
        loss, of_input = (((x - images) * counted).square().sum() / n / variance for x in (output, corrupted))
        measures = {"error": loss.detach().sqrt(), "error of the input": of_input.sqrt()}  # the identity's
        picture = {"input": corrupted[0, 0], "output": output[0, 0].detach(), "truth": images[0, 0]}
        return Step(loss, measures, picture)

    def corrupt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network sees, and where the error counts, ``(B, 1, X, Y[, Z])``, boolean."""
        return images, torch.ones_like(images[:, :1], dtype=torch.bool)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return ``(B, C, X, Y[, Z])``."""
        features = self.encoder(images)
        if self.skips:
            return cast("Tensor", self.head(self.decoder.finest(features)))
        return cast(
            "Tensor", self.head(self.reconstruction.finest([*map(torch.zeros_like, features[:-1]), features[-1]]))
        )


class MAE(Autoencoder):
    """Set most blocks of the patch to 0 and reconstruct them; the mean square error counts there alone."""

    source = "arXiv 2111.06377; settings of nnssl, arXiv 2412.17041"
    defaults: ClassVar[Mapping[str, Any]] = {**Autoencoder.defaults, "mask_ratio": 0.75, "mask_block": 16}

    def corrupt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask blocks."""
        block = self.scaled(self.settings["mask_block"], share=0.25)
        masked = block_mask(len(images), images.shape[2:], block, self.settings["mask_ratio"])
        masked = to_device(masked, images.device)
        return images * ~masked, masked


def block_mask(n: int, size: Sequence[int], block: Sequence[int], ratio: float) -> Tensor:
    """Draw for each case the same number of blocks, ``(n, 1, X, Y[, Z])``, boolean; true where masked.

    Blocks at the end of an axis are smaller where they do not divide it.
    """
    grid = [math.ceil(length / b) for length, b in zip(size, block, strict=True)]
    n_blocks = math.prod(grid)
    ranks = torch.rand(n, n_blocks).argsort(1).argsort(1)
    masked = (ranks < round(ratio * n_blocks)).view(n, 1, *grid)
    for axis, (length, b) in enumerate(zip(size, block, strict=True), start=2):
        masked = masked.repeat_interleave(b, axis).narrow(axis, 0, length)
    return masked


class Genesis(Autoencoder):
    """Change intensities, shuffle voxels locally, paint boxes over; reconstruct the patch (Models Genesis).

    For the distortions, intensities are rescaled to [0, 1] and back: the network sees them as in fine-tuning. Voxels
    are shuffled in 500 boxes, and not in 10,000 as in the method's own code: those take a second in 128x128x128 voxels.
    """

    source = "arXiv 1908.06912; settings of nnssl, arXiv 2412.17041"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Autoencoder.defaults,
        "nonlinear": 0.9,
        "shuffling": 0.5,
        "painting": 0.9,
        "outer_painting": 0.8,
    }

    def corrupt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distort each case by itself."""
        p, (distorted, low, span) = self.settings, to_unit_range(images)
        chosen = [random_choice(p[name], len(images)).tolist() for name in ("nonlinear", "shuffling", "painting")]
        for case, curve, shuffle, paint in zip(distorted, *chosen, strict=True):
            if shuffle:
                shuffle_locally(case)
            if curve:
                case.copy_(change_intensities(case, torch.rand(4), reverse=bool(torch.rand(()) < 0.5)))
            if paint:
                paint_over(case, outside=bool(torch.rand(()) < p["outer_painting"]))
        return distorted * span + low, torch.ones_like(images[:, :1], dtype=torch.bool)


def change_intensities(image: Tensor, points: Tensor, *, reverse: bool) -> Tensor:
    """Map values from [0, 1] by a cubic Bezier curve from (0, 0) to (1, 1), or from (0, 1) to (1, 0).

    Args:
        image: Values from 0 to 1.
        points: The two inner control points, x first: ``(4,)``, from 0 to 1.
        reverse: Whether dark becomes bright.
    """
    t = torch.linspace(0, 1, 256, dtype=torch.float64)
    (x1, y1), (x2, y2) = points.double().view(2, 2).tolist()
    x, y = (3 * t * (1 - t) ** 2 * a + 3 * t**2 * (1 - t) * b + t**3 for a, b in ((x1, x2), (y1, y2)))
    values = torch.linspace(0, 1, 1024, dtype=torch.float64)
    # x rises with t, as its control points lie in [0, 1].
    right = torch.searchsorted(x, values).clamp(1, len(x) - 1)
    left = right - 1
    share = ((values - x[left]) / (x[right] - x[left]).clamp_min(1e-12)).clamp(0, 1)
    table = (y[left] + share * (y[right] - y[left])).to(image)
    if reverse:
        table = table.flip(0)
    index = (image * (len(table) - 1)).round().long().clamp(0, len(table) - 1)
    return cast("Tensor", table[index])


def shuffle_locally(image: Tensor, *, windows: int = 500, share: float = 0.1) -> None:
    """Permute the voxels within many small boxes of ``(C, X, Y[, Z])``, in place.

    Args:
        image: Changed in place; channels alike.
        windows: Number of boxes.
        share: Largest side of a box, as a share of the image's.
    """
    for _ in range(windows):
        box = cut(image, random_box(image.shape[1:], 0.0, share))
        order = torch.randperm(box[0].numel())
        box.copy_(box.flatten(1)[:, order.to(box.device)].view_as(box))


def random_box(size: Sequence[int], smallest: float | Sequence[float], largest: float) -> tuple[slice, ...]:
    """Draw a box with sides between these shares of an image's; the smallest one may differ between axes."""
    box = []
    for n, least in zip(size, smallest if isinstance(smallest, Sequence) else [smallest] * len(size), strict=True):
        low, high = max(1, int(n * least + 1e-9)), max(1, int(n * largest))
        side = int(torch.randint(low, max(low, high) + 1, ()))
        start = int(torch.randint(n - side + 1, ()))
        box.append(slice(start, start + side))
    return tuple(box)


def paint_over(image: Tensor, *, outside: bool, boxes: int = 5) -> None:
    """Replace boxes of ``(C, X, Y[, Z])``, or all outside of some boxes, by noise, in place.

    Boxes have a sixth to a third of the image's sides; those that stay, three to four seventh.
    """
    noise = torch.rand(image.shape).to(image)
    if outside:
        kept = image.clone()
        image.copy_(noise)
        for _ in range(boxes):
            box = random_box(image.shape[1:], 3 / 7, 4 / 7)
            cut(image, box).copy_(cut(kept, box))
        return
    for _ in range(boxes):
        box = random_box(image.shape[1:], 1 / 6, 1 / 3)
        filled = cut(noise, box)
        cut(image, box).copy_(torch.rand(()).to(noise) if torch.rand(()) < 0.5 else filled)
