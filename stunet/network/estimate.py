"""What a STU-Net costs: parameters, multiply-accumulates, memory. Nothing is allocated to find out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stunet.errors import ArchitectureError
from stunet.network.allocation import MemoryTracker
from stunet.network.architecture import ActivationCheckpointing, STUNet
from stunet.network.blocks import CONV_OPS
from stunet.network.training_memory import Loss, Parallel, Precision, StepSettings, peak_training_bytes
from stunet.sizes import N_STAGES, STUNetSize

__all__ = ["Estimate", "default_strides", "estimate", "peak_forward_bytes"]


@dataclass(frozen=True)
class Estimate:
    """What one network costs for one patch size, batch size and number of classes.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of the forward pass of one patch, finest head alone as in inference.
        training_bytes: Peak of all tensors of one process in a training step with Dice and cross-entropy loss and SGD
            with momentum: weights, gradients, momentum, activations, loss, batch.
        inference_bytes: Peak of all tensors in the forward pass of one patch, weights included. nnU-Net's logits of the
            whole image come on top.
    """

    parameters: int
    macs: int
    training_bytes: int
    inference_bytes: int


def estimate(
    size: STUNetSize,
    *,
    patch_size: Sequence[int],
    batch_size: int,
    num_classes: int,
    input_channels: int = 1,
    strides: Sequence[int | Sequence[int]] | None = None,
    precision: Precision = "fp32",
    activation_checkpointing: ActivationCheckpointing = "none",
    loss: Loss = "stunet",
    parallel: Parallel = "none",
    ranks: int = 1,
    gradient_accumulation: int = 1,
    momentum_dtype: Literal["fp32", "bf16"] = "fp32",
    fused_optimizer: bool = False,
) -> Estimate:
    """Estimate what a STU-Net costs by running it on PyTorch's meta device, which computes shapes alone.

    Counted is every tensor while it lives; not counted are the CUDA context, the workspace of convolutions and what
    the allocator loses to fragmentation.

    Args:
        size: Size of the network.
        patch_size: Voxels ``(X, Y[, Z])`` of a patch.
        batch_size: Patches in the training batch of all processes. Inference runs one at a time.
        num_classes: Outputs of each head, background included.
        input_channels: Channels of the image.
        strides: Stride of each stage; :func:`default_strides` of the patch by default.
        precision: ``fp32`` or ``amp``.
        activation_checkpointing: As for :class:`STUNet`.
        loss: ``stunet`` or ``nnunet``.
        parallel: ``none``, ``ddp`` or ``fsdp``: how several processes divide the work.
        ranks: Number of processes.
        gradient_accumulation: Pieces in which each process computes its share of the batch.
        momentum_dtype: ``fp32`` or ``bf16``: precision of the optimizer's momentum.
        fused_optimizer: Whether the optimizer's step is one kernel, without temporary tensors.

    Raises:
        ArchitectureError: The strides do not divide the patch, the network is impossible, or the batch cannot be
            divided so.
    """
    strides = default_strides(patch_size) if strides is None else strides
    kwargs: dict[str, Any] = {
        "features_per_stage": size.features,
        "n_blocks_per_stage": size.depth,
        "conv_op": CONV_OPS[len(patch_size)],
        "strides": strides,
        "activation_checkpointing": activation_checkpointing,
    }
    image_shape = (input_channels, *patch_size)
    try:
        with torch.device("meta"):
            network = STUNet(input_channels, num_classes, **kwargs)
        macs, inference_peak = _run_inference(network, image_shape, precision)
        parameters = sum(p.numel() for p in network.parameters())
        step = StepSettings(
            batch_size, precision, loss, parallel, ranks, gradient_accumulation, momentum_dtype, fused_optimizer
        )
        training_peak = peak_training_bytes(network, image_shape, step)
    except ArchitectureError:
        raise
    except (RuntimeError, ValueError) as error:  # PyTorch's own checks, of sizes beyond 64 bits or norms of one voxel
        raise ArchitectureError(
            "a network or patch that PyTorch cannot compute",
            got=f"patch {list(patch_size)}, width {size.width}: {str(error).splitlines()[0]}",
            expected="more than one voxel at the coarsest stage, and tensors that could exist",
            remedy="Choose another patch or size.",
        ) from error
    return Estimate(parameters, macs, training_peak, inference_peak)


def default_strides(patch_size: Sequence[int]) -> list[list[int]]:
    """Strides that halve each axis as long as it stays at 4 voxels or more, at most five times.

    For a patch of 128 that is 2, five times. (The published pre-training strides halve only one axis the fifth time.)
    """
    size = list(patch_size)
    strides = [[1] * len(size)]
    for _ in range(N_STAGES - 1):
        stride = [2 if n % 2 == 0 and n // 2 >= 4 else 1 for n in size]
        size = [n // s for n, s in zip(size, stride, strict=True)]
        strides.append(stride)
    return strides


def peak_forward_bytes(network: nn.Module, image_shape: Sequence[int]) -> int:
    """Peak of all tensors of a forward pass, the output among them, the weights not.

    Args:
        network: Any network whose parameters are on PyTorch's meta device.
        image_shape: ``(B, C, X, Y[, Z])``.
    """
    network.eval()
    memory = MemoryTracker()
    with torch.no_grad(), memory:
        network(torch.empty(*image_shape, device="meta"))
    return memory.peak


def _run_inference(network: STUNet, image_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    # fp16 weights are autocast's copies of the fp32 ones.
    extra = 2 if precision == "amp" else 0
    weights = sum(p.numel() for p in network.parameters()) * (4 + extra)
    network.decoder.deep_supervision = False
    network.eval()
    memory, flops = MemoryTracker(), FlopCounterMode(display=False)
    with _activations(network, precision) as dtype, torch.no_grad(), memory, flops:
        network(torch.empty(1, *image_shape, device="meta", dtype=dtype))
    return int(flops.get_total_flops()) // 2, weights + memory.peak


@contextmanager
def _activations(network: nn.Module, precision: Precision) -> Iterator[torch.dtype]:
    dtype = torch.half if precision == "amp" else torch.float
    network.to(dtype)
    try:
        yield dtype
    finally:
        network.float()
