"""Memory of a training step: nnU-Net's step done on PyTorch's meta device, which computes shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stunet.errors import ArchitectureError
from stunet.network.allocation import MemoryTracker
from stunet.network.architecture import STUNet
from stunet.network.sharded_memory import ShardedParameters

__all__ = ["Loss", "Parallel", "Precision", "StepSettings", "peak_training_bytes"]

Precision = Literal["fp32", "amp"]
"""``fp32`` is training on a CPU; ``amp`` is nnU-Net's mixed precision on CUDA, fp32 weights and half activations."""

Loss = Literal["stunet", "nnunet"]
"""Whose Dice and cross-entropy: that of this package's trainers, or nnU-Net's own, which takes more memory."""

Parallel = Literal["none", "ddp", "fsdp"]
"""``ddp``: each process has all parameters; ``fsdp``: a part of them (:func:`stunet.network.shard`)."""

# Of a step with momentum in bf16, which goes through parameters by so many elements; the tensors that it then has.
_BF16_CHUNK_BYTES = 2**22 * 5 * 4


@dataclass(frozen=True)
class StepSettings:
    """What the memory of a training step depends on beside network and patch.

    Attributes:
        batch_size: Patches in the whole batch, of all processes.
        precision, loss, parallel: See the types.
        ranks: Processes.
        gradient_accumulation: Pieces of each process's share of the batch.
        momentum_dtype: ``fp32`` or ``bf16``.
        fused_optimizer: Whether the optimizer's step is one kernel.

    Raises:
        ArchitectureError: More processes or pieces than samples, several processes that know nothing of each other, or
            a fused step of sharded parameters.
    """

    batch_size: int
    precision: Precision = "fp32"
    loss: Loss = "stunet"
    parallel: Parallel = "none"
    ranks: int = 1
    gradient_accumulation: int = 1
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    fused_optimizer: bool = False

    def __post_init__(self) -> None:
        smallest = self.batch_size // self.ranks
        if smallest < self.gradient_accumulation:
            raise ArchitectureError(
                "a batch that cannot be divided",
                got=f"{self.batch_size} samples for {self.ranks} processes, "
                f"each with gradient_accumulation={self.gradient_accumulation}",
                expected="a sample for each piece of each process",
                remedy="Raise the batch size, or lower the number of processes or pieces.",
            )
        if (self.ranks > 1) == (self.parallel == "none"):
            raise ArchitectureError(
                "a number of processes that does not fit how they work together",
                got=f"{self.ranks} with parallel={self.parallel}",
                expected="one process with none, several with ddp or fsdp",
                remedy="Correct --ranks or --parallel.",
            )
        if self.parallel == "fsdp" and self.fused_optimizer:
            raise ArchitectureError(
                "a fused optimizer for sharded parameters",
                got="fused_optimizer with parallel=fsdp",
                expected="one of them, as PyTorch has no such step",
                remedy="Leave fused_optimizer out: a part of the parameters has small temporary tensors.",
            )

    @property
    def share(self) -> int:
        """Samples of the process that has most."""
        return -(-self.batch_size // self.ranks)

    @property
    def piece(self) -> int:
        """Samples that go through its network at a time."""
        return -(-self.share // self.gradient_accumulation)


def peak_training_bytes(network: STUNet, image_shape: Sequence[int], step: StepSettings) -> int:
    """Peak of all tensors of one process in a training step after the first.

    Counted are weights, gradients, momentum, activations, loss, the batch, what DDP or FSDP2 hold, and the step's own.

    Args:
        network: On the meta device, in fp32. It is changed and cannot be used again.
        image_shape: ``(C, X, Y[, Z])``.
        step: The rest.
    """
    network.decoder.deep_supervision = True
    network.decoder.supervised_levels = len(network.decoder.stages) - 1  # the coarsest head weighs 0
    network.train()
    mixed = step.precision == "amp"
    sharded = None
    if step.parallel == "fsdp":
        if mixed:
            network.half()
        sharded = ShardedParameters(network, step.ranks)
        held = sharded.shards
    else:
        held = list(network.parameters())
        if mixed:
            _compute_in_half(network)
    elements = sum(t.numel() for t in held)
    # Weights and momentum; DDP's buckets, to which gradients are copied, as its gradient_as_bucket_view is off.
    fixed = elements * (4 + (2 if step.momentum_dtype == "bf16" else 4) + (4 if step.parallel == "ddp" else 0))
    with MemoryTracker() as memory:
        batch = _Batch.make(network, image_shape, step.share)
        outputs = []
        # With the third piece nothing is new; the first one's gradients are there when the second one's come.
        for _ in range(min(step.gradient_accumulation, 2)):
            outputs = _forward_and_backward(network, batch, step, sharded)
            if step.gradient_accumulation > 1:
                outputs.clear()
        _optimize(memory, held, step, sharded)
        outputs.clear()  # nnU-Net's step holds the logits to its end
    return int(fixed + memory.peak)


@dataclass(frozen=True)
class _Batch:
    image: Tensor
    targets: list[Tensor]

    @classmethod
    def make(cls, network: STUNet, image_shape: Sequence[int], size: int) -> _Batch:
        image = torch.empty(size, *image_shape, device="meta")
        targets, spatial = [], list(image_shape[1:])
        for stride in network.encoder.strides[:-1]:
            spatial = [n // s for n, s in zip(spatial, stride, strict=True)]
            targets.append(torch.empty(size, 1, *spatial, device="meta", dtype=torch.int16))
        return cls(image, targets)


def _forward_and_backward(
    network: STUNet, batch: _Batch, step: StepSettings, sharded: ShardedParameters | None
) -> list[Tensor]:
    if sharded is not None:
        sharded.begin()
    image = batch.image[: step.piece]
    logits = network(image.half() if step.precision == "amp" else image)
    if sharded is not None:
        sharded.between()
    loss = sum((_LOSSES[step.loss](output) for output in logits), torch.zeros((), device="meta"))
    if step.gradient_accumulation > 1:
        del logits
        logits = []
    torch.autograd.backward(loss)
    if sharded is not None:
        sharded.finish()
    return list(logits)


def _optimize(memory: MemoryTracker, held: Sequence[Tensor], step: StepSettings, sharded: Any) -> None:
    if step.momentum_dtype == "bf16":
        chunk = min(_BF16_CHUNK_BYTES, 5 * 4 * sum(t.numel() for t in held))
        torch.empty(chunk, device="meta", dtype=torch.uint8)
        return
    if step.fused_optimizer:
        return
    parameters = [nn.Parameter(t) for t in held] if sharded is not None else list(held)
    with nullcontext() if sharded is None else memory.paused():
        # Those of the sharded ones are there, but as one tensor for each unit.
        for p in parameters:
            if sharded is not None:
                p.grad = torch.empty_like(p)
    optimizer = torch.optim.SGD(
        parameters, 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True, foreach=step.precision == "amp"
    )
    with memory.paused():
        for p in parameters:
            if p.grad is not None:
                optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
    optimizer.step()


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.half()


def _compute_in_half(network: nn.Module) -> None:
    """What autocast does: each use of a parameter makes a half copy, and its gradient comes back as fp32."""
    for module in list(network.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, name, _Half(), unsafe=True)


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
