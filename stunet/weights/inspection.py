"""What network weights belong to, read off the tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stunet.errors import ArchitectureError, CheckpointError
from stunet.network import CONV_OPS, N_STAGES, STUNet, STUNetSize, size_of
from stunet.weights.loading import describe_mismatch

__all__ = ["Architecture", "infer_architecture"]


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a STU-Net's weights say; the strides are not among it.

    Attributes:
        size: Depth and width.
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        n_axes: 2 or 3.
    """

    size: STUNetSize
    input_channels: int
    num_classes: int
    n_axes: int

    def build_on_meta(self) -> STUNet:
        """The network without memory for its weights; all strides are 1, which no shape depends on."""
        with torch.device("meta"):
            return STUNet(
                self.input_channels,
                self.num_classes,
                features_per_stage=self.size.features,
                n_blocks_per_stage=self.size.depth,
                conv_op=CONV_OPS[self.n_axes],
                strides=[1] * N_STAGES,
            )


def infer_architecture(weights: Mapping[str, Tensor], *, source: str) -> Architecture:
    """Size, channels and classes of the STU-Net that weights belong to.

    Every parameter is accounted for: a network of the inferred size takes them with ``strict=True``.

    Args:
        weights: Tensors by our names, see :func:`stunet.weights.from_published_key`.
        source: Where they come from, for messages.

    Raises:
        CheckpointError: A parameter is missing, surplus or of a shape that no STU-Net has; names the first ones.
    """
    heads = [f"decoder.seg_layers.{i}.weight" for i in range(N_STAGES - 1)]
    firsts = [f"encoder.stages.{i}.0.conv1.weight" for i in range(N_STAGES)]
    missing = [key for key in (*firsts, *heads) if key not in weights]
    if missing:
        raise _not_a_stunet(source, "; ".join(f"{key} is missing" for key in missing[:3]))
    stem = weights[firsts[0]]
    misshapen = [k for k in firsts if weights[k].ndim != stem.ndim] + [k for k in heads if weights[k].ndim != stem.ndim]
    if stem.ndim - 2 not in CONV_OPS or misshapen:
        key = misshapen[0] if stem.ndim - 2 in CONV_OPS else firsts[0]
        raise _not_a_stunet(source, f"{key} is {tuple(weights[key].shape)}, not the weight of a 2D or 3D convolution")
    blocks = [re.fullmatch(r"encoder\.stages\.(\d+)\.(\d+)\.conv1\.weight", key) for key in weights]
    depth = [len({m[2] for m in blocks if m and int(m[1]) == stage}) for stage in range(N_STAGES)]
    try:
        size = size_of([weights[key].shape[0] for key in firsts], depth)
        architecture = Architecture(size, stem.shape[1], weights[heads[-1]].shape[0], stem.ndim - 2)
        network = architecture.build_on_meta()
    except ArchitectureError as error:
        raise _not_a_stunet(source, f"{error.problem}: {error.got} instead of {error.expected}") from error
    mismatch = describe_mismatch(weights, network.state_dict())
    if mismatch:
        raise _not_a_stunet(source, f"closest to STU-Net {size.name}, but {mismatch}")
    network.load_state_dict(weights, strict=True, assign=True)
    return architecture


def _not_a_stunet(source: str, problem: str) -> CheckpointError:
    return CheckpointError(
        "weights of another network than STU-Net",
        got=f"{source}: {problem}",
        expected=f"{N_STAGES} stages of residual blocks whose channels double from stage to stage, and 5 heads",
        remedy="Give weights of a STU-Net; other networks cannot be converted.",
    )
