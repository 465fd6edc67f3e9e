"""A source model's own head, applied to features at points."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear

from stunet.errors import CheckpointError, FeatureError
from stunet.weights import SourceWeights, UNetWeights, source_outputs

__all__ = ["SourceHead", "finest_head", "source_head"]

_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")


@dataclass(frozen=True, eq=False)
class SourceHead:
    """The finest head: a convolution of one voxel, so that its output at a point needs the features there alone.

    Attributes:
        layer: The layer whose output it takes, the decoder's finest stage.
        weight: ``(K, C)``.
        bias: ``(K,)``.
        names: What the outputs stand for; None where nothing says it.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    names: tuple[str, ...] | None = None

    def probabilities(self, features: Tensor) -> Tensor:
        """Softmax of the head's logits.

        Args:
            features: ``(n, C)``, float32, on any device.

        Returns:
            ``(n, K)``, float32, on that device.

        Raises:
            FeatureError: Features of another number of channels.
        """
        if features.shape[-1] != self.weight.shape[1]:
            raise FeatureError(
                "features that the source's head does not take",
                got=f"{features.shape[-1]} channels of {self.layer}",
                expected=f"{self.weight.shape[1]} channels",
                remedy="Read the features from the network that the head was trained with.",
            )
        return linear(features.float(), self.weight.to(features.device), self.bias.to(features.device)).softmax(-1)


def finest_head(weights: Mapping[str, Tensor], *, source: str) -> SourceHead:
    """The last of the decoder's heads, which STU-Net and nnU-Net's networks have in the order from coarse to fine.

    Args:
        weights: A state dict.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: No head, or one that is no convolution of one voxel.
    """
    levels = [int(match[1]) for key in weights if (match := _HEAD.fullmatch(key))]
    level = max(levels, default=0)
    weight, bias = (weights.get(f"decoder.seg_layers.{level}.{kind}") for kind in ("weight", "bias"))
    if weight is None or weight.ndim < 2 or weight[0, 0].numel() != 1 or (bias is not None and bias.ndim != 1):
        raise CheckpointError(
            "weights without a head that can be applied at points",
            got=f"{source}: decoder.seg_layers.{level}.weight "
            + ("is missing" if weight is None else f"of shape {tuple(weight.shape)}"),
            expected="a convolution of one voxel, (K, C, 1, 1[, 1])",
            remedy="Give the weights of a whole network.",
        )
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return SourceHead(f"decoder.stages.{level}", weight.detach().flatten(1).float(), bias.detach().float())


def source_head(weights: SourceWeights | UNetWeights) -> SourceHead | None:
    """The finest head of a checkpoint.

    Args:
        weights: The checkpoint's weights.

    Returns:
        None where its outputs are regions, each with a sigmoid of its own: those are no probabilities of classes that
        exclude each other.

    Raises:
        CheckpointError: No head, or one that is no convolution of one voxel.
    """
    head = finest_head(weights.tensors, source=str(Path(weights.path)))
    outputs = source_outputs(weights)
    if outputs is None:  # nnU-Net's own way, where nothing speaks against it
        return head
    return SourceHead(head.layer, head.weight, head.bias, outputs.names) if outputs.exclusive else None
