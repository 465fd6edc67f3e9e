"""nnU-Net's own networks, narrow, and checkpoints of them as nnU-Net writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from plans import architecture, configuration, make_plans

#: Strides of both, three stages.
UNET_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
UNET_PATCH = (8, 16, 12)
LABELS = {"background": 0, "liver": 1, "spleen": 2}


def unet_architecture(name: str = "PlainConvUNet", strides: list[list[int]] = UNET_STRIDES) -> dict[str, Any]:
    """What nnU-Net's plans say of one."""
    described = architecture(strides)
    arguments = described["arch_kwargs"]
    if name == "ResidualEncoderUNet":
        described["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{name}"
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
        arguments["n_conv_per_stage_decoder"] = [1] * (len(strides) - 1)
    arguments["kernel_sizes"] = [[1 if s == 1 and i < 2 else 3 for s in stride] for i, stride in enumerate(strides)]
    return described


def unet(
    name: str = "PlainConvUNet", input_channels: int = 1, num_classes: int = 3, strides: list[list[int]] = UNET_STRIDES
) -> nn.Module:
    """The network itself, built by hand rather than from the plans."""
    arguments = dict(unet_architecture(name, strides)["arch_kwargs"])
    n_axes = len(strides[0])
    arguments |= {
        "conv_op": nn.Conv2d if n_axes == 2 else nn.Conv3d,
        "norm_op": nn.InstanceNorm2d if n_axes == 2 else nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    }
    network_class = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}[name]
    torch.manual_seed(3)
    return network_class(input_channels=input_channels, num_classes=num_classes, **arguments).eval()


def write_unet(
    path: Path,
    network: nn.Module,
    *,
    described: dict[str, Any] | None = None,
    labels: dict[str, Any] = LABELS,
    plans: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of nnU-Net v2 with it, in a configuration that inherits its architecture."""
    described = described or unet_architecture(type(network).__name__)
    if plans is None:
        plans = make_plans()
        strides = described["arch_kwargs"]["strides"]
        own = configuration("3d_fullres", list(UNET_PATCH), strides, architecture=described)
        plans["configurations"] = {"3d_fullres": own, "3d_large": {"inherits_from": "3d_fullres", "batch_size": 8}}
    init_args = {"plans": plans, "configuration": "3d_large", "fold": 0, "dataset_json": {"labels": labels}}
    torch.save({"network_weights": network.state_dict(), "current_epoch": 5, "init_args": init_args}, path)
    return path
