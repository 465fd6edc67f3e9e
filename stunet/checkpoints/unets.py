"""Weights of nnU-Net's own networks, with the architecture that their checkpoint's plans describe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stunet.checkpoints.loading import describe_mismatch
from stunet.checkpoints.sources import SourceWeights, stunet_weights
from stunet.checkpoints.states import finite_float32, known_args, read_state, sort_paths, strip_prefixes
from stunet.errors import CheckpointError

__all__ = ["UNetArchitecture", "UNetWeights", "open_any_weights"]

#: The networks that are built from a checkpoint's plans, by the names that nnU-Net's plans give them.
_NETWORKS = {
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": "PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "PlainConvUNet": "PlainConvUNet",  # as plans of nnU-Net < 2.2 name them
    "ResidualEncoderUNet": "ResidualEncoderUNet",
}
#: The layers that the plans may name; nnU-Net itself imports whatever stands there.
_LAYERS = re.compile(
    r"torch\.nn\.(?:modules\.(?:conv|instancenorm|activation|dropout)\.)?"
    r"(Conv[23]d|InstanceNorm[23]d|LeakyReLU|ReLU|PReLU|ELU|GELU|SiLU|Mish|Dropout[23]d)"
)
_LAYER_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")
_MOST_STAGES, _MOST = 32, 8192  # far beyond every network that was ever planned, and still soon refused

# nnU-Net's decoders own the encoder too, so that its parameters are saved under a second name.
_STEMS = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")
_MARK = "decoder.transpconvs.0.weight"


@dataclass(frozen=True)
class UNetArchitecture:
    """One of nnU-Net's own networks.

    Attributes:
        name: ``PlainConvUNet`` or ``ResidualEncoderUNet``.
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

        network_class = {"PlainConvUNet": unet.PlainConvUNet, "ResidualEncoderUNet": unet.ResidualEncoderUNet}
        network: nn.Module = network_class[self.name](
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


def open_any_weights(path: str | os.PathLike[str]) -> SourceWeights | UNetWeights:
    """Read the weights of a STU-Net, or of one of nnU-Net's own networks, without running code out of the file.

    nnU-Net finds network and layers by importing whatever the plans name. Here they are looked up in a short list.

    Args:
        path: A file as for :func:`stunet.checkpoints.open_weights`, a checkpoint of nnU-Net v2 with a
            ``PlainConvUNet`` or a ``ResidualEncoderUNet``, or a model folder with one fold.

    Raises:
        CheckpointError: The file is missing, truncated or unsafe, the weights are not finite, of another network, or
            not those of the network that the plans in the checkpoint describe.
    """
    path, _ = sort_paths([Path(path)])
    content, state, kind = read_state(path)
    if not any(isinstance(key, str) and key.endswith(_MARK) for key in state):
        return stunet_weights(path, content, state, kind)
    named = strip_prefixes(state, path)
    init_args = known_args(content.get("init_args"), path)
    architecture = _architecture(named, init_args, path)
    tensors = {name: finite_float32(name, tensor, path) for name, tensor in named.items()}
    epoch = content.get("current_epoch")
    return UNetWeights(path, tensors, architecture, init_args, epoch if isinstance(epoch, int) else None)


def _architecture(state: Mapping[str, Tensor], init_args: Mapping[str, Any], path: Path) -> UNetArchitecture:
    """The architecture in the checkpoint's plans, which its tensors must fit to the last."""
    stem = next((state[key] for key in _STEMS if key in state), None)
    heads = {int(match[1]): key for key in state if (match := _HEAD.fullmatch(key))}
    if stem is None or stem.ndim not in (4, 5) or not heads or state[heads[max(heads)]].ndim != stem.ndim:
        raise _other_network(path, "weights without the stem or the heads of nnU-Net's networks")
    name, arguments = _find_in_plans(init_args, path)
    outputs = state[heads[max(heads)]].shape[0]
    architecture = UNetArchitecture(name, arguments, stem.shape[1], outputs, stem.ndim - 2)
    try:
        with torch.device("meta"):
            expected = architecture.build(stem.shape[1], outputs).state_dict()
    except Exception as error:  # whatever constructors raise at arguments that only a foreign file can have
        raise _unusable_plans(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    if mismatch := describe_mismatch(state, expected):
        raise _unusable_plans(path, f"of a {name} that they describe, {mismatch}")
    return architecture


def _find_in_plans(init_args: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    plans, name = init_args.get("plans"), init_args.get("configuration")
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    configuration: dict[str, Any] = {}
    seen: list[Any] = []
    while isinstance(configurations, dict) and isinstance(name, str) and isinstance(configurations.get(name), dict):
        if name in seen:
            raise _unusable_plans(path, f"configuration {name} that inherits from itself")
        seen.append(name)
        configuration = {**configurations[name], **configuration}
        if "architecture" in configuration or "UNet_class_name" in configuration:
            break  # what it might inherit is hidden by its own
        name = configurations[name].get("inherits_from")
    architecture = _translate(configuration, path) if "UNet_class_name" in configuration else configuration
    architecture = architecture.get("architecture", {})
    class_name = architecture.get("network_class_name") if isinstance(architecture, dict) else None
    arguments = architecture.get("arch_kwargs") if isinstance(architecture, dict) else None
    if not isinstance(class_name, str) or not isinstance(arguments, dict):
        raise _unusable_plans(path, "no configuration with an architecture")
    if class_name not in _NETWORKS:
        raise _other_network(path, class_name[:200])
    # nnU-Net decides on deep supervision itself, whatever the plans say.
    given = {key: value for key, value in arguments.items() if key != "deep_supervision"}
    return _NETWORKS[class_name], {key: _argument(key, value, path) for key, value in given.items()}


def _translate(configuration: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The architecture in plans of nnU-Net < 2.2, whose other arguments were always the same."""
    try:
        name, blocks = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
        n_axes, strides = len(configuration["patch_size"]), configuration["pool_op_kernel_sizes"]
        base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
        arguments = {
            "n_stages": len(strides),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(min(len(strides), _MOST_STAGES))],
            "conv_op": f"torch.nn.Conv{n_axes}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": strides,
            "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage": blocks,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{n_axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
    except (KeyError, TypeError) as error:
        raise _unusable_plans(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    return {"architecture": {"network_class_name": name, "arch_kwargs": arguments}}


def _argument(key: str, value: Any, path: Path) -> Any:
    """One argument of a network, with the name of a layer replaced by the layer."""
    if key in _LAYER_ARGUMENTS and value is not None:
        match = _LAYERS.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise _unusable_plans(path, f"{key} {str(value)[:100]}, which is none of PyTorch's usual layers")
        return getattr(nn, match[1])
    if not _is_plain(value):
        raise _unusable_plans(path, f"{key} {str(value)[:100]}")
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= _MOST_STAGES and all(map(_is_plain, value))
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= _MOST)


def _other_network(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "weights of a network that cannot be built here",
        got=f"{path}: {got}",
        expected=f"a STU-Net, or one of {', '.join(sorted(set(_NETWORKS.values())))}",
        remedy="Give weights of one of these networks.",
    )


def _unusable_plans(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint whose plans do not say what network its weights belong to",
        got=f"{path}: {got}",
        expected="init_args with the plans and the configuration that the weights were trained with",
        remedy="Take the checkpoint as nnUNetv2_train wrote it.",
    )
