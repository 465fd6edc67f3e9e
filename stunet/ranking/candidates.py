"""Checkpoints as networks that features of a target dataset can be read from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from stunet.errors import CheckpointError
from stunet.labels import Outputs
from stunet.network import CONV_OPS, STUNet, total_stride
from stunet.ranking.heads import SourceHead, source_head
from stunet.weights import (
    SourceWeights,
    StemPolicy,
    UNetWeights,
    adapt_stem,
    open_any_weights,
    source_outputs,
    transfer_weights,
)
from stunet.weights.loading import describe_mismatch
from stunet.weights.transfer import check_policies

__all__ = ["CandidateDescription", "CandidateNetwork", "Target", "build_candidate", "load_candidate"]

_HEADS = "decoder.seg_layers."


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the target's plans say about the networks that shall read its images.

    Attributes:
        input_channels: Channels of the images.
        patch_size: Voxels of a patch; two axes in a 2D configuration.
        strides: Stride of each of STU-Net's six stages for each axis, see :func:`stunet.planning.fit_strides`.
        trust: Classes that the plans of candidates may name, see :func:`stunet.weights.check_network`.
    """

    input_channels: int
    patch_size: Sequence[int]
    strides: Sequence[Sequence[int]]
    trust: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class CandidateDescription:
    """What a candidate is.

    Attributes:
        path: The checkpoint.
        network: For example ``STU-Net base`` or ``PlainConvUNet``.
        parameters: Number of parameters, heads left out.
        n_axes: 2 or 3.
        source_channels: Channels of the images that it was trained on.
        input_channels: Channels of the target's images.
        stem: What was done where these differ; empty where they do not.
        n_outputs: Outputs that it was trained for, background included.
        outputs: What these stand for; None where nothing says it.
        exclusive: Whether a softmax over the outputs gives each voxel one of them.
        epoch: Epochs that it was trained for, where the file says it.
    """

    path: str
    network: str
    parameters: int
    n_axes: int
    source_channels: int
    input_channels: int
    stem: str
    n_outputs: int
    outputs: tuple[str, ...] | None
    exclusive: bool
    epoch: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateNetwork:
    """A network with a checkpoint's weights.

    Attributes:
        network: In evaluation mode, on the CPU. Its own heads are those of a target and say nothing.
        head: The checkpoint's finest head; None where its outputs are regions, which exclude each other not.
        description: What it is.
        total_stride: How much coarser its coarsest stage is than the image, for each axis.
    """

    network: nn.Module
    head: SourceHead | None
    description: CandidateDescription
    total_stride: tuple[int, ...]

    def fit_patch(self, patch_size: Sequence[int]) -> tuple[int, ...]:
        """The smallest patch of at least this size that the network takes.

        A STU-Net built for a target takes the target's own. One of nnU-Net's networks has the strides that it was
        trained with.

        Args:
            patch_size: The target's patch.
        """
        fitted = [math.ceil(n / stride) * stride for n, stride in zip(patch_size, self.total_stride, strict=True)]
        if tuple(fitted) == self.total_stride:  # norms need more than one voxel at the coarsest stage
            fitted[0] *= 2
        return tuple(fitted)


def load_candidate(
    path: str | os.PathLike[str], network: nn.Module, *, stem: StemPolicy = "repeat-scaled"
) -> CandidateNetwork:
    """Put a checkpoint's weights into a network that was built for the target's plans, in place.

    All parameters but those of the heads are taken; the stem is adapted where the target has other channels.

    Args:
        path: As for :func:`stunet.weights.open_any_weights`.
        network: A :class:`stunet.network.STUNet` or one of nnU-Net's networks.
        stem: What to do with the stem, see :func:`stunet.weights.adapt_stem`.

    Raises:
        CheckpointError: The file cannot be read, its weights are not finite, or belong to a network of another kind,
            size or number of axes; names what differs. The network is not changed then.
        UsageError: An unknown policy.
    """
    return _load(open_any_weights(path), network, stem)


def build_candidate(
    path: str | os.PathLike[str], target: Target, *, stem: StemPolicy = "repeat-scaled"
) -> CandidateNetwork:
    """Build the network that a checkpoint belongs to, for a target's images, and load it.

    A STU-Net of whatever size gets the target's strides, on which its weights do not depend. One of nnU-Net's networks
    keeps its own: its transposed convolutions have their shape.

    Args:
        path: As for :func:`stunet.weights.open_any_weights`.
        target: The target's images and plans.
        stem: What to do with the stem, see :func:`stunet.weights.adapt_stem`; what it leaves fresh is the same for
            every checkpoint of one shape.

    Raises:
        ArchitectureError: Strides or channels that no STU-Net has.
        CheckpointError: As for :func:`load_candidate`.
        UsageError: An unknown policy.
    """
    weights = open_any_weights(path, target.trust)
    n_axes = weights.architecture.n_axes
    if n_axes != len(target.patch_size):
        raise CheckpointError(
            f"{n_axes}D weights for {len(target.patch_size)}D patches",
            got=f"{weights.path}: {_name(weights)}",
            expected=f"a checkpoint of a {len(target.patch_size)}D network",
            remedy=f"Choose a {n_axes}D configuration of the target, or leave this checkpoint out.",
        )
    return _load(weights, _network_for(weights, target), stem)


def _network_for(weights: SourceWeights | UNetWeights, target: Target) -> nn.Module:
    architecture = weights.architecture

    def build() -> nn.Module:
        # One output, which nobody looks at: a map of logits for a hundred classes would take more than the features.
        if isinstance(weights, UNetWeights):
            return weights.architecture.build(target.input_channels, 1)
        size = weights.architecture.size
        return STUNet(
            target.input_channels,
            1,
            features_per_stage=size.features,
            n_blocks_per_stage=size.depth,
            conv_op=CONV_OPS[architecture.n_axes],
            strides=target.strides,
        )

    return _uninitialised(build)


def _uninitialised(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without the time that initialisation takes: NaN where weights are to come, so that none can be missed.

    Heads are 0, and the stem is drawn with a seed of its own, for the policies that leave some of it fresh.
    """
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    initialize = cast("Callable[[nn.Module], None]", network.initialize)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in network.named_parameters():
            parameter.fill_(0.0 if name.startswith(_HEADS) else torch.nan)
        for name in _stem_modules(network):
            initialize(network.get_submodule(name))
    return network


def _load(weights: SourceWeights | UNetWeights, network: nn.Module, stem: StemPolicy) -> CandidateNetwork:
    check_policies(stem)
    if isinstance(weights, SourceWeights):
        stunet = _checked_kind(weights, network, isinstance(network, STUNet))
        n_outputs = stunet.decoder.seg_layers[-1].out_channels
        outputs = Outputs(tuple(f"output {i}" for i in range(n_outputs)), exclusive=True)
        input_channels = transfer_weights(weights, stunet, outputs, stem=stem, head="fresh").input_channels[1]
    else:
        _checked_kind(weights, network, type(network).__name__ == weights.architecture.name.rpartition(".")[2])
        input_channels = _transfer_unet(weights, network, stem)
    network.eval()
    origin, architecture = source_outputs(weights), weights.architecture
    return CandidateNetwork(
        network=network,
        head=source_head(weights),
        description=CandidateDescription(
            path=str(weights.path),
            network=_name(weights),
            parameters=sum(p.numel() for name, p in network.named_parameters() if not name.startswith(_HEADS)),
            n_axes=architecture.n_axes,
            source_channels=architecture.input_channels,
            input_channels=input_channels,
            stem=stem if stem == "random" or architecture.input_channels != input_channels else "",
            n_outputs=architecture.num_classes,
            outputs=None if origin is None else origin.names,
            exclusive=origin is None or origin.exclusive,
            epoch=weights.epoch,
        ),
        total_stride=total_stride([tuple(stride) for stride in cast(Any, network).encoder.strides]),
    )


def _checked_kind(weights: SourceWeights | UNetWeights, network: nn.Module, fits: bool) -> Any:
    if not fits:
        raise CheckpointError(
            "weights of another kind of network",
            got=f"{weights.path}: {_name(weights)}",
            expected=f"weights of a {type(network).__name__}",
            remedy="Build the network from the checkpoint, or give another checkpoint.",
        )
    return network


def _transfer_unet(weights: UNetWeights, network: nn.Module, stem: StemPolicy) -> int:
    """As :func:`stunet.weights.transfer_weights` for nnU-Net's networks; returns the target's channels."""
    target = network.state_dict()
    modules = _stem_modules(network)
    stems = [key for key in target if key.endswith(tuple(f"{name}.weight" for name in modules))]
    expected = {key: tensor.to("meta") for key, tensor in target.items() if not key.startswith(_HEADS)}
    channels = weights.architecture.input_channels
    for key in stems:  # of any number of channels, on their second axis
        shape = list(target[key].shape)
        expected[key] = torch.empty(shape[0], channels, *shape[2:], device="meta")
    given = {key: tensor for key, tensor in weights.tensors.items() if not key.startswith(_HEADS)}
    if mismatch := describe_mismatch(given, expected):
        raise CheckpointError(
            "weights of another architecture than the network",
            got=f"{weights.path}, a {_name(weights)}: {mismatch}",
            expected=f"the {type(network).__name__} that the plans describe",
            remedy="Build the network from the checkpoint instead of from the target's plans.",
        )
    n_target = int(target[stems[0]].shape[1])
    if stem == "random":
        given = {key: t for key, t in given.items() if not key.endswith(tuple(f"{name}.bias" for name in modules))}
    if stem == "random" or n_target != channels:
        given |= {key: adapt_stem(given[key], target[key], stem) for key in stems}
    network.load_state_dict({**target, **given}, strict=True)
    return n_target


def _stem_modules(network: nn.Module) -> tuple[str, ...]:
    """The modules whose weights depend on the input channels."""
    if isinstance(network, STUNet):
        return "encoder.stages.0.0.conv1", "encoder.stages.0.0.projection"
    return tuple(cast("Sequence[str]", network.keys_to_in_proj))  # each of nnU-Net's networks says it


def _name(weights: SourceWeights | UNetWeights) -> str:
    if isinstance(weights, UNetWeights):
        return weights.architecture.name
    return f"STU-Net {weights.architecture.size.name}"
