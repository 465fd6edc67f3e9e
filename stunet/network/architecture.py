"""STU-Net: block, encoder, decoder, network (Huang et al., arXiv 2304.06716)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stunet.errors import ArchitectureError
from stunet.network.blocks import CONV_OPS, ConvOp, MergingBlock, ResidualBlock, Upsampling, pointwise
from stunet.network.normalization import is_channels_last
from stunet.settings import ActivationCheckpointing
from stunet.sizes import N_STAGES, STUNetSize, find_size

__all__ = ["ActivationCheckpointing", "STUNet", "build_stunet", "total_stride"]


class _Stage(nn.Sequential):
    """Residual blocks of one resolution, optionally checkpointed block by block."""

    checkpointed = False

    def forward(self, *inputs: Tensor) -> Tensor:
        """One tensor, or in the decoder the way up and the skip connection."""
        for block in self:
            if self.checkpointed and torch.is_grad_enabled():
                # The blocks draw no random numbers, so there is no random state to keep.
                inputs = (checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False),)
            else:
                inputs = (block(*inputs),)
        return inputs[0]


def _stage(first: ResidualBlock, *, n_blocks: int) -> _Stage:
    conv = first.conv2
    block = partial(ResidualBlock, type(conv), conv.in_channels, conv.out_channels, stride=(1,) * len(conv.kernel_size))
    return _Stage(first, *(block(project=False) for _ in range(n_blocks - 1)))


class STUNetEncoder(nn.Module):
    """Six stages of residual blocks; each begins with a strided block.

    Attributes:
        stages: The six stages, finest first.
        strides: Stride of each stage, for each axis.
    """

    def __init__(
        self,
        conv_op: ConvOp,
        input_channels: int,
        features_per_stage: Sequence[int],
        n_blocks_per_stage: Sequence[int],
        strides: Sequence[tuple[int, ...]],
    ) -> None:
        super().__init__()
        channels = (input_channels, *features_per_stage)
        self.strides = tuple(strides)
        self.stages = nn.ModuleList(
            _stage(ResidualBlock(conv_op, c_in, c_out, stride=stride, project=True), n_blocks=n)
            for (c_in, c_out), n, stride in zip(pairwise(channels), n_blocks_per_stage, strides, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, C, X, Y[, Z])`` to the outputs of the six stages, finest first."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class STUNetDecoder(nn.Module):
    """Five levels: up, concatenate the skip connection, residual blocks, segmentation head.

    Attributes:
        deep_supervision: Whether ``forward`` returns the logits of all five levels or of the finest alone. nnU-Net
            switches it for training and inference.
        supervised_levels: How many levels, the finest first, that list has. All five, unless a trainer knows that its
            loss weighs the coarse ones 0; their heads are not computed then.
        upsamplings: The five ways up, coarsest first.
        stages: The five stages of residual blocks, coarsest first.
        seg_layers: The five heads, coarsest first. nnU-Net leaves them out when it loads pre-trained weights.
    """

    def __init__(
        self,
        conv_op: ConvOp,
        num_classes: int,
        features_per_stage: Sequence[int],
        n_blocks_per_stage: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        *,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.supervised_levels = N_STAGES - 1
        levels = list(enumerate(pairwise(features_per_stage)))[::-1]  # (level, (channels here, channels below))
        self.upsamplings = nn.ModuleList(Upsampling(conv_op, below, here) for _, (here, below) in levels)
        self.stages = nn.ModuleList(
            _stage(MergingBlock(conv_op, here, scale=strides[level + 1]), n_blocks=n_blocks_per_stage[level])
            for level, (here, _) in levels
        )
        self.seg_layers = nn.ModuleList(conv_op(here, num_classes, 1) for _, (here, _) in levels)

    def forward(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Encoder features, finest first, to logits ``(B, num_classes, X, Y[, Z])``; a list, finest first, with
        deep supervision.
        """
        *skips, x = features
        logits: list[Tensor] = []
        for upsampling, stage, seg_layer in zip(self.upsamplings, self.stages, self.seg_layers, strict=True):
            x = stage(upsampling(x), skips.pop())
            if not skips or (self.deep_supervision and len(skips) < self.supervised_levels):
                logits.append(pointwise(x, seg_layer) if is_channels_last(x) else seg_layer(x))
        return logits[::-1] if self.deep_supervision else logits[0]


class STUNet(nn.Module):
    """Scalable and transferable U-Net (arXiv 2304.06716), as nnU-Net builds it from a plans file.

    Weights fit whatever the patch, the spacing and the strides are, because there are always six stages and all
    kernels are 3x3(x3). Weights are initialised by PyTorch's default; ``network.apply(network.initialize)``, which
    nnU-Net and :func:`build_stunet` call, initialises them after He.

    Args:
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        n_stages: Always 6; here because plans files give it.
        features_per_stage: Channels of each stage.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``; decides the number of axes.
        strides: Stride of each stage for each axis; the first is the stem's.
        n_blocks_per_stage: Residual blocks of each encoder stage. The decoder mirrors the first five.
        deep_supervision: Whether training gets the logits of all five decoder levels, finest first.
        activation_checkpointing: ``none``, ``encoder`` or ``all``: which residual blocks keep only their input for
            the backward pass and compute the rest again. The function and its gradients stay the same.

    Raises:
        ArchitectureError: An argument that no STU-Net can have.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        n_stages: int = N_STAGES,
        features_per_stage: Sequence[int],
        conv_op: ConvOp = nn.Conv3d,
        strides: Sequence[int | Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        deep_supervision: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        _check_channels("input channels", input_channels)
        _check_channels("number of classes", num_classes)
        for name, values in (("features_per_stage", features_per_stage), ("n_blocks_per_stage", n_blocks_per_stage)):
            _check_per_stage(name, values, n_stages)
        self.conv_op = conv_op
        full_strides = _check_strides(strides, next(n for n, op in CONV_OPS.items() if op is conv_op))
        self.encoder = STUNetEncoder(conv_op, input_channels, features_per_stage, n_blocks_per_stage, full_strides)
        self.decoder = STUNetDecoder(
            conv_op,
            num_classes,
            features_per_stage,
            n_blocks_per_stage,
            full_strides,
            deep_supervision=deep_supervision,
        )
        self._total_stride = total_stride(full_strides)
        self._set_activation_checkpointing(activation_checkpointing)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment a patch.

        Args:
            x: Image of shape ``(B, input_channels, X, Y[, Z])``; each axis a multiple of the product of its strides.

        Returns:
            Logits ``(B, num_classes, X, Y[, Z])``; with deep supervision a list of five, finest first.

        Raises:
            ArchitectureError: An axis that the strides do not divide.
        """
        if any(n % stride for n, stride in zip(x.shape[2:], self._total_stride, strict=True)):
            raise ArchitectureError(
                "the strides do not divide the input",
                got=tuple(x.shape[2:]),
                expected=f"multiples of {self._total_stride}",
                remedy="Pad the input, or choose another patch size in the plans.",
            )
        if math.prod(x.shape[2:]) == math.prod(self._total_stride):
            raise ArchitectureError(
                "one voxel at the coarsest stage, which cannot be normalised",
                got=f"{tuple(x.shape[2:])} with strides of {self._total_stride} in all",
                expected="more than one voxel",
                remedy="Choose another patch size in the plans.",
            )
        return cast("Tensor | list[Tensor]", self.decoder(self.encoder(x)))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements of all outputs of convolutions for one image, nnU-Net's measure for memory planning.

        Args:
            input_size: Image size ``(X, Y[, Z])`` in voxels, without batch and channels.
        """
        total, size = 0, list(input_size)
        for level, (stage, stride) in enumerate(zip(self.encoder.stages, self.encoder.strides, strict=True)):
            size = [n // s for n, s in zip(size, stride, strict=True)]
            blocks: list[nn.Module] = [stage]
            if level < N_STAGES - 1:  # the decoder's level of this resolution; its way up convolves one level below
                mirrored = N_STAGES - 2 - level
                blocks += [self.decoder.stages[mirrored], self.decoder.seg_layers[mirrored]]
            if level > 0:
                blocks.append(self.decoder.upsamplings[N_STAGES - 1 - level])
            total += sum(_output_channels(block) for block in blocks) * math.prod(size)
        return total

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He initialisation for leaky rectifiers, biases 0; to be given to ``apply``."""
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, a=1e-2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _set_activation_checkpointing(self, where: ActivationCheckpointing) -> None:
        if where not in ("none", "encoder", "all"):
            raise ArchitectureError(
                "unknown activation checkpointing",
                got=where,
                expected="none, encoder or all",
                remedy="Set activation_checkpointing to one of these.",
            )
        for part, stages in (("encoder", self.encoder.stages), ("decoder", self.decoder.stages)):
            for stage in stages:
                cast(_Stage, stage).checkpointed = where in ("all", part)


def build_stunet(
    size: str | STUNetSize, input_channels: int, num_classes: int, strides: Sequence[int | Sequence[int]], **kwargs: Any
) -> STUNet:
    """Build a STU-Net of a given size with He initialisation.

    Args:
        size: A published size's name, or a size of one's own.
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        strides: Stride of each of the six stages for each axis.
        **kwargs: Further arguments of :class:`STUNet`.
    """
    size = find_size(size) if isinstance(size, str) else size
    network = STUNet(
        input_channels,
        num_classes,
        features_per_stage=size.features,
        n_blocks_per_stage=size.depth,
        strides=strides,
        **kwargs,
    )
    return network.apply(network.initialize)


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """How much coarser the coarsest stage is than the image, for each axis.

    Args:
        strides: Stride of each stage for each axis.
    """
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def _output_channels(module: nn.Module) -> int:
    return sum(conv.out_channels for conv in module.modules() if isinstance(conv, nn.Conv2d | nn.Conv3d))


def _check_channels(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ArchitectureError(
            f"impossible {name}",
            got=value,
            expected="a positive whole number",
            remedy="Check channel_names and labels in dataset.json.",
        )


def _check_per_stage(name: str, values: Sequence[int], n_stages: int) -> None:
    if n_stages != N_STAGES or len(values) != N_STAGES or any(v < 1 for v in values):
        raise ArchitectureError(
            f"impossible {name}",
            got=f"{list(values)} with n_stages={n_stages}",
            expected=f"{N_STAGES} positive whole numbers and n_stages={N_STAGES}",
            remedy="STU-Net has six stages; let `stunet plan` write the plans.",
        )


def _check_strides(strides: Sequence[int | Sequence[int]], n_axes: int) -> list[tuple[int, ...]]:
    full = [(s,) * n_axes if isinstance(s, int) else tuple(s) for s in strides]
    if len(full) != N_STAGES or any(len(s) != n_axes or min(s) < 1 for s in full):
        raise ArchitectureError(
            "impossible strides",
            got=[list(s) for s in full],
            expected=f"{N_STAGES} strides with {n_axes} positive whole numbers each",
            remedy="STU-Net has six stages; let `stunet plan` pad or cut the strides.",
        )
    return full
