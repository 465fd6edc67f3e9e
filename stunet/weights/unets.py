"""Weights of nnU-Net's own networks, with the architecture that their checkpoint's plans describe."""

from __future__ import annotations

import os
import pydoc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stunet.errors import CheckpointError, reading
from stunet.weights.loading import describe_mismatch
from stunet.weights.networks import STUNET, UNETS, check_network, described_network, unusable_plans
from stunet.weights.sources import SourceWeights, stunet_weights
from stunet.weights.states import finite_float32, known_args, read_state, sort_paths, strip_prefixes

__all__ = ["UNetArchitecture", "UNetWeights", "open_any_weights"]

# nnU-Net's decoders own the encoder too, so that its parameters are saved under a second name.
_STEMS = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")
_MARK = "decoder.transpconvs.0.weight"


@dataclass(frozen=True)
class UNetArchitecture:
    """One of nnU-Net's own networks.

    Attributes:
        name: ``PlainConvUNet`` or ``ResidualEncoderUNet``; the full name of a class that the user trusts.
        arguments: Its arguments but for channels and classes; layers as classes.
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        n_axes: 2 or 3.
    """

    name: str
    arguments: Mapping[str, Any]
    input_channels: int
    num_classes: int
    n_axes: int

    def build(self, input_channels: int, num_classes: int) -> nn.Module:
        """Build it without deep supervision and as PyTorch initialises it.

        Args:
            input_channels: Channels of the image.
            num_classes: Outputs of each head.

        Raises:
            TypeError, ValueError, AssertionError, and others: Arguments that this network does not take.
        """
        from dynamic_network_architectures.architectures import unet

        # The name is one of two, or of a class that the user trusts.
        network_class: Any = getattr(unet, self.name) if self.name in UNETS.values() else pydoc.locate(self.name)
        network: nn.Module = network_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=False, **self.arguments
        )
        return network


@dataclass(frozen=True)
class UNetWeights:
    """Weights of one of nnU-Net's own networks and what their checkpoint says about them.

    Attributes:
        path: The checkpoint.
        tensors: The weights by nnU-Net's names, fp32, on the CPU; mapped from the file where that is possible.
        architecture: The network that they belong to.
        init_args: ``plans``, ``configuration``, ``dataset_json``.
        epoch: Epochs that the weights were trained for.
    """

    path: Path
    tensors: dict[str, Tensor]
    architecture: UNetArchitecture
    init_args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None


def open_any_weights(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> SourceWeights | UNetWeights:
    """Read the weights of a STU-Net, or of one of nnU-Net's own networks, without running code out of the file.

    Args:
        path: A file as for :func:`stunet.weights.open_weights`, a checkpoint of nnU-Net v2 with a
            ``PlainConvUNet`` or a ``ResidualEncoderUNet``, or a model folder with one fold.
        trust: Further classes that the plans may name, see :func:`stunet.weights.check_network`.

    Raises:
        CheckpointError: The file is missing, truncated or unsafe, the weights are not finite, of another network, or
            not those of the network that the plans in the checkpoint describe.
    """
    path, _ = sort_paths([Path(path)])
    content, state, kind = read_state(path)
    if not any(isinstance(key, str) and key.endswith(_MARK) for key in state):
        return stunet_weights(path, content, state, kind, trust=trust)
    with reading(path, "a checkpoint that cannot be used"):
        named = strip_prefixes(state, path, names=4)
        init_args = known_args(content.get("init_args"))
        architecture = _architecture(named, init_args, path, trust)
        tensors = {name: finite_float32(name, tensor, path) for name, tensor in named.items()}
    epoch = content.get("current_epoch")
    return UNetWeights(path, tensors, architecture, init_args, epoch if isinstance(epoch, int) else None)


def _architecture(
    state: Mapping[str, Tensor], init_args: Mapping[str, Any], path: Path, trust: Sequence[str]
) -> UNetArchitecture:
    """The architecture in the checkpoint's plans, which its tensors must fit to the last."""
    stem = next((state[key] for key in _STEMS if key in state), None)
    heads = {int(match[1]): key for key in state if (match := _HEAD.fullmatch(key))}
    if stem is None or stem.ndim not in (4, 5) or not heads or state[heads[max(heads)]].ndim != stem.ndim:
        raise _other_network(path, "weights without the stem or the heads of nnU-Net's networks")
    described = described_network(init_args, path)
    if described is None:
        raise unusable_plans(path, "no configuration with an architecture")
    name, arguments = check_network(described, source=str(path), trust=trust)
    if name == STUNET:
        raise _other_network(path, "weights of another network than the STU-Net in its plans")
    outputs = state[heads[max(heads)]].shape[0]
    architecture = UNetArchitecture(UNETS.get(name, name), arguments, stem.shape[1], outputs, stem.ndim - 2)
    try:
        with torch.device("meta"):
            expected = architecture.build(stem.shape[1], outputs).state_dict()
    except Exception as error:  # whatever constructors raise at arguments that only a foreign file can have
        raise unusable_plans(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    if mismatch := describe_mismatch(state, expected):
        raise unusable_plans(path, f"of a {name} that they describe, {mismatch}")
    return architecture


def _other_network(path: Path, got: str) -> CheckpointError:
    return CheckpointError("weights of a network that cannot be built here", got=f"{path}: {got}",
                           expected=f"a STU-Net, or one of {', '.join(sorted(set(UNETS.values())))}",
                           remedy="Give weights of one of these networks.")  # fmt: skip
