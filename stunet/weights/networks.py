"""Networks that plans may name. nnU-Net imports whatever class and layers the plans of a model name; this is the gate.

Plans come with a model, and a model may come from anybody. Before anything is imported or built, :func:`check_network`
compares the names with a short list, and the numbers with what a network can have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stunet.errors import CheckpointError, reading

STUNET = "stunet.network.STUNet"
#: The other networks, by the names that nnU-Net's plans give them.
UNETS = {
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": "PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "PlainConvUNet": "PlainConvUNet",  # as plans of nnU-Net < 2.2 name them
    "ResidualEncoderUNet": "ResidualEncoderUNet",
}
#: The layers that plans may name.
_LAYERS = re.compile(
    r"torch\.nn\.(?:modules\.(?:conv|instancenorm|batchnorm|activation|dropout)\.)?"
    r"(Conv[23]d|InstanceNorm[23]d|BatchNorm[23]d|LeakyReLU|ReLU|PReLU|ELU|GELU|SiLU|Mish|Dropout[23]?d?)"
)
_LAYER_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")
UNUSABLE = "plans that do not say what network the weights belong to"
# Far beyond every network that was ever planned, and still soon built.
_MAX_STAGES, _MAX_NUMBER, _MAX_CONVOLUTIONS = 32, 8192, 1000


def check_network(architecture: Any, *, source: str, trust: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Check what plans say of a network, before anything that they name is imported.

    Args:
        architecture: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import`` of a configuration.
        source: Where it comes from, for messages.
        trust: Full names of further classes and layers, which the user trusts. The arguments of such a class are not
            checked but for the names that they import.

    Returns:
        The name of the class, and its arguments with layers as classes; those of a trusted class as they are.

    Raises:
        CheckpointError: An unknown class or layer, or numbers that no network has.
    """
    with reading(source, UNUSABLE):
        name, arguments = architecture["network_class_name"], dict(architecture["arch_kwargs"])
        imported = list(architecture.get("_kw_requires_import", ()))
        if name not in (STUNET, *UNETS, *trust):
            text = f"{source} asks for code which is not trusted, the network {str(name)[:100]}"
            raise CheckpointError(f"{text}: only if you know this class and trust the model, --trust {str(name)[:100]}")
        checked = {key: value for key, value in arguments.items() if key != "deep_supervision"}  # nnU-Net decides on it
        for key, value in arguments.items():
            if key in imported or (key in _LAYER_ARGUMENTS and name not in trust):
                match = _LAYERS.fullmatch(value) if isinstance(value, str) else None
                if match is not None and hasattr(nn, match[1]):
                    checked[key] = getattr(nn, match[1])
                elif value is not None and value not in trust:
                    raise ValueError(f"{key} {str(value)[:100]}, which is none of PyTorch's usual layers")
            elif name not in trust and key != "activation_checkpointing" and not _is_plain(value):
                raise ValueError(f"{key} {str(value)[:100]}")
        if name not in trust:
            n_stages = arguments.get("n_stages", 1)
            blocks = [value for key, value in arguments.items() if key.startswith(("n_conv", "n_blocks"))]
            if sum(sum(n) if isinstance(n, list | tuple) else n * n_stages for n in blocks) > _MAX_CONVOLUTIONS:
                raise ValueError(f"a network of more than {_MAX_CONVOLUTIONS} convolutions or blocks")
        return name, checked


def described_network(init_args: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the architecture in the plans of a checkpoint, also of nnU-Net < 2.2; None where there is none."""
    with reading(path, UNUSABLE):
        configurations = dict(init_args.get("plans") or {}).get("configurations", {})
        name = init_args.get("configuration")
        for _ in range(len(configurations)):
            configuration = configurations.get(name)
            if configuration is None:
                return None
            if "UNet_class_name" in configuration:
                return _translate(configuration)
            if "architecture" in configuration:
                return dict(configuration["architecture"])
            name = configuration.get("inherits_from")
        if name in configurations:
            raise ValueError(f"configuration {name} inherits from itself")
    return None


def _translate(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in plans of nnU-Net < 2.2, whose other arguments were always the same."""
    name, blocks = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
    n_axes, strides = len(configuration["patch_size"]), configuration["pool_op_kernel_sizes"]
    base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    arguments = {
        "n_stages": len(strides),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(min(len(strides), _MAX_STAGES))],
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
    return {"network_class_name": name, "arch_kwargs": arguments}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_STAGES and all(map(_is_plain, value))
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= _MAX_NUMBER)
