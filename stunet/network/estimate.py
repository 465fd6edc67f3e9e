"""What a STU-Net costs: parameters, multiply-accumulates, memory. Nothing is allocated to find out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from stunet.errors import ArchitectureError
from stunet.network.architecture import ActivationCheckpointing, STUNet
from stunet.network.blocks import CONV_OPS
from stunet.network.sizes import N_STAGES, STUNetSize

__all__ = ["Estimate", "Loss", "Precision", "default_strides", "estimate", "peak_forward_bytes"]

Precision = Literal["fp32", "amp"]
"""``fp32`` is training on a CPU; ``amp`` is nnU-Net's mixed precision on CUDA, fp32 weights and half activations."""

Loss = Literal["stunet", "nnunet"]
"""Whose Dice and cross-entropy: that of this package's trainers, or nnU-Net's own, which takes more memory."""


@dataclass(frozen=True)
class Estimate:
    """What one network costs for one patch size, batch size and number of classes.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of the forward pass of one patch, finest head alone as in inference.
        training_bytes: Peak of all tensors in a training step with Dice and cross-entropy loss and SGD with momentum:
            weights, gradients, momentum, activations, loss.
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
) -> Estimate:
    """Estimate what a STU-Net costs by running it on PyTorch's meta device, which computes shapes alone.

    Counted is every tensor while it lives; not counted are the CUDA context, the workspace of convolutions and what
    the allocator loses to fragmentation.

    Args:
        size: Size of the network.
        patch_size: Voxels ``(X, Y[, Z])`` of a patch.
        batch_size: Patches in a training batch. Inference runs one at a time.
        num_classes: Outputs of each head, background included.
        input_channels: Channels of the image.
        strides: Stride of each stage; :func:`default_strides` of the patch by default.
        precision: ``fp32`` or ``amp``.
        activation_checkpointing: As for :class:`STUNet`.
        loss: ``stunet`` or ``nnunet``.

    Raises:
        ArchitectureError: The strides do not divide the patch, or the network is impossible.
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
        training_peak = _run_training(network, image_shape, batch_size, precision, _LOSSES[loss])
    except ArchitectureError:
        raise
    except (RuntimeError, ValueError) as error:  # PyTorch's own checks, of sizes beyond 64 bits or norms of one voxel
        raise ArchitectureError(
            "a network or patch that PyTorch cannot compute",
            got=f"patch {list(patch_size)}, width {size.width}: {str(error).splitlines()[0]}",
            expected="more than one voxel at the coarsest stage, and tensors that could exist",
            remedy="Choose another patch or size.",
        ) from error
    parameters = sum(p.numel() for p in network.parameters())
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
    memory = _MemoryTracker()
    with torch.no_grad(), memory:
        network(torch.empty(*image_shape, device="meta"))
    return memory.peak


def _run_inference(network: STUNet, image_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    # fp16 weights are autocast's copies of the fp32 ones.
    extra = 2 if precision == "amp" else 0
    weights = sum(p.numel() for p in network.parameters()) * (4 + extra)
    network.decoder.deep_supervision = False
    network.eval()
    memory, flops = _MemoryTracker(), FlopCounterMode(display=False)
    with _activations(network, precision) as dtype, torch.no_grad(), memory, flops:
        network(torch.empty(1, *image_shape, device="meta", dtype=dtype))
    return int(flops.get_total_flops()) // 2, weights + memory.peak


def _run_training(
    network: STUNet,
    image_shape: tuple[int, ...],
    batch_size: int,
    precision: Precision,
    loss_of: Callable[[Tensor], Tensor],
) -> int:
    n_parameters = sum(p.numel() for p in network.parameters())
    network.decoder.deep_supervision = True
    network.train()
    with _activations(network, precision) as dtype, _MemoryTracker() as memory:
        image = torch.empty(batch_size, *image_shape, device="meta", dtype=dtype)
        logits = network(image)
        # nnU-Net gives the coarsest output the weight 0 and leaves it out.
        loss = sum((loss_of(output) for output in logits[:-1]), torch.zeros((), device="meta"))
        del logits
        torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    # Weights, momentum and gradients are fp32 whatever the activations are. While the network runs, autocast keeps a
    # half copy of the weights; the step on CUDA, which treats all parameters at once, one more set of gradients.
    mixed = precision == "amp"
    at_backward: int = memory.peak + n_parameters * (4 + 4 + (2 if mixed else 0))
    at_step: int = n_parameters * (4 + 4 + 4 + (4 if mixed else 0))
    return max(at_backward, at_step)


def _dice_and_cross_entropy(logits: Tensor) -> Tensor:
    """The tensors of nnU-Net's loss: softmax and log-softmax in fp32 and a one-hot target."""
    logits = logits.float()
    target = torch.empty(logits.shape[0], *logits.shape[2:], device="meta", dtype=torch.long)
    cross_entropy = nn.functional.cross_entropy(logits, target)
    probabilities = logits.softmax(1)
    with torch.no_grad():
        one_hot = torch.zeros(logits.shape, device="meta", dtype=torch.bool).scatter_(1, target[:, None], 1)
    axes = tuple(range(2, logits.ndim))
    intersection, total = (probabilities * one_hot)[:, 1:].sum(axes), probabilities[:, 1:].sum(axes)
    return cross_entropy - (2 * intersection / total).mean()


class _LeanLoss(torch.autograd.Function):
    """The tensors of this package's loss: the logits, and their gradient when it is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros((), dtype=torch.float)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits)


def _lean_loss(logits: Tensor) -> Tensor:
    loss: Tensor = _LeanLoss.apply(logits)
    return loss


_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"stunet": _lean_loss, "nnunet": _dice_and_cross_entropy}


@contextmanager
def _activations(network: nn.Module, precision: Precision) -> Iterator[torch.dtype]:
    dtype = torch.half if precision == "amp" else torch.float
    network.to(dtype)
    try:
        yield dtype
    finally:
        network.float()


class _MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operations make and follows them until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for output in tree_iter(outputs):
            if isinstance(output, Tensor):
                self._add(output.untyped_storage(), inputs)
        return outputs

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in inputs:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size
