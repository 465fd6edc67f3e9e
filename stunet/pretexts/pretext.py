"""What self-supervised tasks have in common: a batch of images in, a loss and measures out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.errors import SettingsError
from stunet.network import STUNet, total_stride

Part = Literal["encoder", "decoder"]


class Step(NamedTuple):
    """What a task makes of a batch.

    Attributes:
        loss: To be minimized, a scalar.
        measures: What shows whether it learns, by name: scalars without gradient.
        picture: What it can show of the first case, by title, each ``(X, Y[, Z])``; empty where it shows nothing.
    """

    loss: Tensor
    measures: dict[str, Tensor]
    picture: dict[str, Tensor]


class Pretext(nn.Module):
    """A self-supervised task: its heads beside the encoder, and the decoder, of a STU-Net.

    A subclass sets the class attributes, makes its heads in ``__init__`` and returns a :class:`Step` from ``forward``.
    Its state dict has the network's own keys for the parts that it trains, so a checkpoint is read as any other one.
    Random numbers come from PyTorch's generator of the CPU, so a seed gives the same on every device.

    Args:
        network: What is trained; parts that the task does not train are left out.
        patch_size: Voxels of the patches, ``(X, Y[, Z])``.
        settings: Values of the names in ``defaults``; the others have their default.

    Attributes:
        family: ``predictive``, ``generative``, ``dense predictive``, ``contrastive`` or ``hierarchical``.
        source: Paper of the method.
        trains: Parts of the network that fine-tuning takes.
        defaults: Settings of the task, with the published values.
        chance: Value of each measure for a network that has learned nothing.
        min_batch: Cases that it takes to compare them.
        oriented: Whether it asks how images lie, so that they must not be mirrored or turned far.
        max_gradient_norm: What gradients are clipped to where no labels train the network.
    """

    family: ClassVar[str]
    source: ClassVar[str]
    trains: tuple[Part, ...] = ("encoder",)
    defaults: ClassVar[Mapping[str, Any]] = {}
    min_batch: ClassVar[int] = 1
    oriented: ClassVar[bool] = False
    max_gradient_norm: ClassVar[float] = 12.0  # nnU-Net's
    chance: Mapping[str, float]

    def __init__(self, network: STUNet, patch_size: Sequence[int], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.patch_size, self.strides = tuple(patch_size), total_stride(network.encoder.strides)
        self.settings = {**self.defaults, **(settings or {})}
        self.progress = 0.0
        """Share of the training that is done, for schedules."""
        self.conv_op = network.conv_op
        stages = [cast("nn.Sequential", stage) for stage in network.encoder.stages]
        self.features = [int(stage[0].conv2.out_channels) for stage in stages]  # type: ignore[arg-type, union-attr]
        self.input_channels = int(stages[0][0].conv1.in_channels)  # type: ignore[arg-type, union-attr]
        self.encoder: nn.Module = network.encoder
        if "decoder" in self.trains:
            self.decoder = network.decoder

    def forward(self, images: Tensor) -> Step:
        """Take patches ``(B, C, X, Y[, Z])``."""
        raise NotImplementedError

    def reconstruction_head(self) -> nn.Module:
        """Return a head from the finest features to an image, with small weights.

        With usual ones, the first errors drive the finest features below zero for good, where leaky ReLU all but
        stops gradients: the task goes on, but fine-tuning starts from a decoder that hardly learns.
        """
        head: nn.Conv2d | nn.Conv3d = self.conv_op(self.features[0], self.input_channels, 1)
        head.weight.data.mul_(0.1)
        nn.init.zeros_(cast("Tensor", head.bias))
        return head

    def pooled(self, images: Tensor) -> Tensor:
        """Return the mean of the coarsest features over the voxels, ``(B, C)``."""
        coarsest: Tensor = self.encoder(images)[-1]
        return coarsest.flatten(2).mean(2)

    def after_step(self) -> None:
        """Do what a step of the optimizer is followed by: nothing, in most tasks."""

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the first measure so that higher is better."""
        name, value = next(iter(measures.items()))
        return -value if name == "error" else value

    def fitted(self, images: Tensor) -> Tensor:
        """Resize ``(B, C, X, Y[, Z])`` by linear interpolation to the nearest size that the network takes.

        It has two voxels or more along each axis at the coarsest stage.
        """
        old = tuple(images.shape[2:])
        size = tuple(max(2, round(n / s)) * s for n, s in zip(old, self.strides, strict=True))
        return images if size == old else F.interpolate(images, size, mode="trilinear" if len(old) == 3 else "bilinear")

    def scaled(self, published: int, *, share: float) -> tuple[int, ...]:
        """Return a published length in voxels for each axis, at most a share of the patch there."""
        return tuple(max(1, min(published, int(n * share))) for n in self.patch_size)


class WithLabels(NamedTuple):
    """What a batch gives where some of its cases have labels: the network's logits, and the task's step."""

    logits: Tensor | list[Tensor]
    step: Step


class PretextNetwork(nn.Module):
    """A STU-Net and a task that trains it.

    Args:
        network: The STU-Net.
        pretext: A task that was made for it.
        with_labels: Whether labels train it as well. Otherwise what the task does not train is frozen.
    """

    def __init__(self, network: STUNet, pretext: Pretext, *, with_labels: bool) -> None:
        super().__init__()
        self.network, self.pretext, self.with_labels = network, pretext, with_labels
        self.freeze()

    def freeze(self) -> None:
        """Switch gradients off for what nothing trains; without labels that includes the heads for structures."""
        if not self.with_labels:
            heads = {id(head) for head in self.network.decoder.seg_layers.parameters()}
            trained = {id(parameter) for parameter in self.pretext.parameters()} - heads
            for parameter in self.network.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def forward(self, images: Tensor) -> Step | WithLabels | Any:
        """Take patches ``(B, C, X, Y[, Z])``; with labels, logits alone in evaluation mode."""
        if not self.with_labels:
            return self.pretext(images)
        logits = self.network(images)
        return WithLabels(logits, self.pretext(images)) if self.training else logits

    def heads(self) -> dict[str, Tensor]:
        """Return what the state dict of the task has beside the network's parameters."""
        return {k: v for k, v in self.pretext.state_dict().items() if not k.startswith(("encoder.", "decoder."))}

    def load_heads(self, heads: Mapping[str, Tensor]) -> None:
        """Load what :meth:`heads` gave."""
        shared = {k: v for k, v in self.pretext.state_dict().items() if k not in self.heads()}
        self.pretext.load_state_dict({**shared, **heads})


def cut(image: Tensor, box: Sequence[slice]) -> Tensor:
    """Return a box of ``(C, X, Y[, Z])``, a view."""
    where: tuple[slice, ...] = (slice(None), *box)
    return image[where]


def classified(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and accuracy of logits ``(B, K)`` for classes ``(B,)``."""
    return F.cross_entropy(logits, target), (logits.detach().argmax(1) == target).float().mean()


def projector(channels: int, hidden: int, outputs: int, *, centred: bool = False) -> nn.Sequential:
    """Return two linear layers with batch norm between, and after them where the embedding is to be centred.

    Batch norm takes away what all cases have in common. At first that is nearly everything, as the means of
    instance-normalized features hardly differ between cases: without it, contrast collapses.
    """
    layers = [nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    last = [nn.Linear(hidden, outputs, bias=not centred), *[nn.BatchNorm1d(outputs, affine=False)] * centred]
    return nn.Sequential(*layers, *last)


def split_blocks(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Cut ``(B, C, X, Y[, Z])`` into a grid of blocks ``(B, blocks, C, x, y[, z])``, the last axis fastest.

    >>> split_blocks(torch.arange(4.0).view(1, 1, 2, 2), (2, 2)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    n = len(grid)
    size = [length // parts for length, parts in zip(images.shape[2:], grid, strict=True)]
    cut = images.reshape(*images.shape[:2], *(k for pair in zip(grid, size, strict=True) for k in pair))
    order = [0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)]
    return cut.permute(order).reshape(len(images), math.prod(grid), images.shape[1], *size)


def to_unit_range(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rescale each channel of each case to [0, 1]; return that with its lowest value and its range."""
    low = images.flatten(2).amin(2).view(*images.shape[:2], *[1] * (images.ndim - 2))
    span = images.flatten(2).amax(2).view_as(low) - low
    return (images - low) / span.clamp_min(1e-8), low, span


def divided_by(patch_size: Sequence[int], grid: Sequence[int], strides: Sequence[int], name: str) -> None:
    """Refuse a patch that a grid of blocks does not divide, and name one that it does, and that the network takes."""
    if any(n % parts for n, parts in zip(patch_size, grid, strict=True)):
        steps = [math.lcm(parts, stride) for parts, stride in zip(grid, strides, strict=True)]
        nearest = [max(1, round(n / step)) * step for n, step in zip(patch_size, steps, strict=True)]
        raise SettingsError(f"pretext={name}: patch_size {[*patch_size]} for blocks {[*grid]}: set it to {nearest}")


def random_choice(probability: float, count: int) -> Tensor:
    """Draw which of so many cases something happens to, ``(count,)``, boolean."""
    return torch.rand(count) < probability
