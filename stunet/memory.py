"""What a STU-Net costs: parameters, multiply-accumulates, memory. Nothing is allocated to find out.

The network runs a training step and a forward pass on PyTorch's fake tensors, which have shapes and types alone, and
every tensor is counted as long as it lives. They are fake tensors of the CPU even where the step is one of CUDA: with
autocast, whose operations on both are the same, the network takes the same path, and every build of PyTorch has it.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from stunet.errors import ArchitectureError, reading
from stunet.network import CONV_OPS, STUNet, default_strides, sharded_units
from stunet.settings import ActivationCheckpointing, MomentumDtype
from stunet.sizes import STUNetSize

Precision = Literal["fp32", "amp"]
"""``fp32`` is training on a CPU; ``amp`` is nnU-Net's mixed precision on CUDA, fp32 weights and half activations."""

Loss = Literal["stunet", "nnunet"]
"""Whose Dice and cross-entropy: that of this package's trainers, or nnU-Net's own, which takes more memory."""

Parallel = Literal["none", "ddp", "fsdp"]
"""``ddp``: each process has all parameters; ``fsdp``: a shard of them (:func:`stunet.network.shard`)."""

USABLE_SHARE = 0.9
"""Part of a GPU's memory that tensors may take; the rest is for what estimates leave out."""

# A step with momentum in bf16 goes through parameters by so many elements; the tensors that it then has.
_BF16_CHUNK_BYTES = 2**22 * 5 * 4


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
    momentum_dtype: MomentumDtype = "fp32",
    fused_optimizer: bool = False,
) -> Estimate:
    """Estimate what a STU-Net costs.

    Not counted are the CUDA context, the workspace of convolutions and what the allocator loses to fragmentation.

    Args:
        size: Size of the network.
        patch_size: Voxels ``(X, Y[, Z])`` of a patch.
        batch_size: Patches in the training batch of all processes. Inference runs one at a time.
        num_classes: Outputs of each head, background included.
        input_channels: Channels of the image.
        strides: Stride of each stage; :func:`stunet.network.default_strides` of the patch by default.
        precision: ``fp32`` or ``amp``.
        activation_checkpointing: As for :class:`stunet.network.STUNet`.
        loss: ``stunet`` or ``nnunet``.
        parallel: ``none``, ``ddp`` or ``fsdp``: how several processes share the work.
        ranks: Number of processes.
        gradient_accumulation: Micro-batches of each process's share of the batch.
        momentum_dtype: ``fp32`` or ``bf16``: precision of the optimizer's momentum.
        fused_optimizer: Whether the optimizer's step is one kernel, without temporary tensors.

    Raises:
        ArchitectureError: The strides do not divide the patch, the network is impossible, or the batch cannot be
            divided so.

    >>> from stunet.sizes import SIZES
    >>> estimate(SIZES["small"], patch_size=(128, 128, 128), batch_size=2, num_classes=105).parameters
    14596941
    """
    if batch_size // ranks < gradient_accumulation:
        got = f"{batch_size} samples for {ranks} processes, each with {gradient_accumulation=}"
        raise ArchitectureError(f"{got}: each micro-batch needs one, so raise the batch size or lower the others")
    if (ranks > 1) == (parallel == "none"):
        raise ArchitectureError(f"{ranks=} does not go with {parallel=}: none is for one process, ddp or fsdp for more")
    if parallel == "fsdp" and fused_optimizer:
        raise ArchitectureError("fused_optimizer does not go with parallel=fsdp, whose step PyTorch has not fused")
    mixed, shards = precision == "amp", ranks if parallel == "fsdp" else 1
    strides = default_strides(patch_size) if strides is None else strides
    described = (size, tuple(patch_size), tuple(s if isinstance(s, int) else tuple(s) for s in strides))
    problem = "more than PyTorch can compute"  # sizes beyond 64 bits
    with reading(f"patch {list(patch_size)} with width {size.width}", problem, ArchitectureError, "choose another"):
        sizes, macs, forward = _inference(*described, input_channels, num_classes, mixed)
        share = -(-batch_size // ranks)
        peak, left = _step(
            *described, input_channels, num_classes, mixed, share, activation_checkpointing, gradient_accumulation,
            loss, shards,
        )  # fmt: skip
    if momentum_dtype == "bf16":
        temporary = min(_BF16_CHUNK_BYTES, 20 * sum(sizes))
    elif fused_optimizer:
        temporary = 0
    else:  # on CUDA a second set of gradients, on the CPU two tensors of one parameter
        temporary = (4 * sum(sizes) if mixed else 8 * max(sizes)) // shards
    held = sum(sizes) * (4 + (2 if momentum_dtype == "bf16" else 4)) // shards  # weights and momentum
    held += 4 * sum(sizes) if parallel == "ddp" else 0  # buckets, to which gradients are copied
    return Estimate(sum(sizes), macs, held + max(peak, left + temporary), 4 * sum(sizes) + forward)


def peak_forward_bytes(network: nn.Module, image_shape: Sequence[int]) -> int:
    """Return the peak of all tensors of a forward pass, the output among them, the weights not.

    Args:
        network: Any network whose parameters are on PyTorch's meta device.
        image_shape: ``(B, C, X, Y[, Z])``.
    """
    return _run_forward(network, torch.empty(*image_shape, device="meta")).peak


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operations make, follows them until they are freed, and counts operations.

    Attributes:
        current: Bytes of those that live.
        peak: Most bytes that there were.
        flops: Floating point operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=outputs)
        inputs = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_iter(outputs) if isinstance(t, Tensor)):
            if (key := id(storage)) not in inputs | self._known:
                self._known.add(key)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._remove, key, storage.nbytes())
        return outputs

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _run_forward(network: nn.Module, image: Tensor, *, mixed: bool = False) -> _Tracker:
    network.eval()
    tracker = _Tracker()
    with torch.no_grad(), tracker, torch.autocast("cpu", torch.half, enabled=mixed):
        network(torch.empty_like(image))  # a new one, so that it is counted
    return tracker


def _network(size: STUNetSize, patch: tuple[int, ...], strides: Any, channels: int, classes: int, where: Any) -> STUNet:
    return STUNet(
        channels, classes, features_per_stage=size.features, n_blocks_per_stage=size.depth, strides=strides,
        conv_op=CONV_OPS[len(patch)], activation_checkpointing=where,
    )  # fmt: skip


# Recommendations ask for the same again and again.
@lru_cache
def _inference(
    size: STUNetSize, patch: tuple[int, ...], strides: Any, channels: int, classes: int, mixed: bool
) -> tuple[list[int], int, int]:
    """Return the parameters' sizes, and multiply-accumulates and the peak of a forward pass without weights."""
    with FakeTensorMode():
        network = _network(size, patch, strides, channels, classes, "none")
        image = torch.empty(1, channels, *patch)
        forward = _run_forward(network, image, mixed=mixed)
        # Norms that work in channels-last, as in fp32 on the CPU, multiply matrices of which the diagonals are wanted.
        macs = (forward if mixed else _run_forward(network, image, mixed=True)).flops // 2
        return [p.numel() for p in network.parameters()], macs, forward.peak


@lru_cache
def _step(
    size: STUNetSize, patch: tuple[int, ...], strides: Any, channels: int, classes: int, mixed: bool,
    batch_size: int, where: Any, gradient_accumulation: int, loss: Loss, shards: int,
) -> tuple[int, int]:  # fmt: skip
    """Return the peak of a training step without weights and momentum, and what there is when the optimizer steps."""
    with FakeTensorMode():
        network = _network(size, patch, strides, channels, classes, where)
        if mixed and shards > 1:  # what computes are gathered copies of fp32 shards; fake modules have no `half()`
            for module in network.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.detach().half()))
        return _run_step(network, torch.empty(batch_size, channels, *patch), mixed, gradient_accumulation, loss, shards)


def _run_step(
    network: STUNet, image: Tensor, mixed: bool, gradient_accumulation: int, loss: Loss, shards: int
) -> tuple[int, int]:
    network.train()
    network.decoder.deep_supervision = True
    network.decoder.supervised_levels = len(network.decoder.stages) - 1  # the coarsest head weighs 0
    shares: dict[nn.Parameter, Tensor] = {}
    make_loss: Any = _dice_and_cross_entropy if loss == "nnunet" else _LikePartialDiceCE.apply

    def keep_share(p: nn.Parameter) -> None:
        shares.setdefault(p, torch.empty(math.ceil(p.numel() / shards)))
        p.grad = None

    if shards > 1:
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(keep_share)  # type: ignore[no-untyped-call]
    units = [sum(p.numel() for p in unit.parameters()) for unit in sharded_units(network)]
    tracker = _Tracker()
    with tracker:
        batch, size = torch.empty_like(image), list(image.shape[2:])
        targets = []
        for stride in network.encoder.strides[:-1]:
            size = [n // s for n, s in zip(size, stride, strict=True)]
            targets.append(torch.empty(len(image), 1, *size, dtype=torch.int16))
        # The largest stage, gathered; none is when the optimizer steps.
        gathered = torch.empty(max(units) if shards > 1 else 0, dtype=next(network.parameters()).dtype)
        # With the third micro-batch nothing is new; the first one's gradients are there when the second one's come.
        for _ in range(min(gradient_accumulation, 2)):
            with torch.autocast("cpu", torch.half, enabled=mixed):
                logits = network(batch[: -(-len(image) // gradient_accumulation)])
                value = sum((make_loss(output) for output in logits), torch.zeros(()))
            if loss == "stunet":  # nnU-Net's trainer keeps the logits, this package's does not
                logits = []
            torch.autograd.backward(value)
        del value, gathered
        return tracker.peak, tracker.current


class _LikePartialDiceCE(torch.autograd.Function):
    """What this package's loss keeps and makes: the logits, and their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _dice_and_cross_entropy(logits: Tensor) -> Tensor:
    """Make the tensors of nnU-Net's loss: a softmax and a log-softmax, which convert half to fp32, a one-hot target."""
    target, is_half = torch.empty(logits.shape[0], *logits.shape[2:], dtype=torch.long), logits.dtype == torch.half
    with torch.no_grad():
        one_hot = torch.zeros(logits.shape).scatter_(1, target[:, None], 1)[:, 1:]
    axes, foreground = tuple(range(2, logits.ndim)), torch._softmax(logits, 1, is_half)[:, 1:]
    dice = (2 * (foreground * one_hot).sum(axes) / foreground.sum(axes)).mean()
    return nn.functional.nll_loss(torch._log_softmax(logits, 1, is_half), target) - dice


@dataclass(frozen=True)
class Recommendation:
    """Settings for one size.

    Attributes:
        fits: Whether a process needs no more than it has with these settings; else they are those that need least.
        settings: Training settings other than the defaults, by the names that plans have for them.
        estimate: With these settings.
    """

    fits: bool
    settings: dict[str, Any]
    estimate: Estimate


def recommend(
    size: STUNetSize,
    gpu_bytes: int,
    *,
    batch_size: int,
    ranks: int = 1,
    parallel: Parallel | None = None,
    batch_dice: bool = False,
    **kwargs: Any,
) -> Recommendation:
    """Find the settings that cost least time among those that fit.

    A step is about three forward passes. In this order, each with as few micro-batches as fit:

    1. nothing; then ``fused_optimizer``, which is no slower and computes the same;
    2. ``gradient_accumulation``: as many operations, on fewer samples at a time;
    3. ``activation_checkpointing=encoder``, which runs less than half of the network forward once more, then
       ``all``, which runs nearly all of it;
    4. ``momentum_dtype=bf16``: little time, but the first that changes the training, by rounding at random;
    5. ``parallel=fsdp``, where there are several processes: parameters travel before each use.

    With ``batch_dice``, accumulation itself takes a forward pass more, and comes after checkpointing in 3.

    Args:
        size: Size of the network.
        gpu_bytes: Memory of a GPU, of which :data:`USABLE_SHARE` counts.
        batch_size: Patches in the batch of all processes.
        ranks: Processes, each with a GPU of its own.
        parallel: ``fsdp`` where nothing else is wanted; else DDP comes first where there are several processes.
        batch_dice: Whether Dice is computed over the whole batch.
        **kwargs: Further arguments of :func:`estimate`.

    Raises:
        ArchitectureError: As of :func:`estimate`.
    """
    default: Any = {"parallel": "none" if ranks == 1 else "ddp"}
    share = -(-batch_size // ranks)
    # Numbers of micro-batches, from 1, that make the largest one smaller than the number before.
    numbers = sorted({-(-share // n): n for n in range(max(1, batch_size // ranks), 0, -1)}.values())

    def attempt(settings: dict[str, Any], n: int) -> Recommendation:
        settings = {**settings, **({"gradient_accumulation": n} if n > 1 else {})}
        got = estimate(size, batch_size=batch_size, ranks=ranks, **{**default, **settings}, **kwargs)
        return Recommendation(got.training_bytes <= USABLE_SHARE * gpu_bytes, settings, got)

    tried = []
    for settings, accumulates in _families(ranks, parallel, batch_dice and len(numbers) > 1):
        *fewer, most = numbers if accumulates else [1]
        tried.append(attempt(settings, most))
        if tried[-1].fits:  # else fewer micro-batches do not fit either
            return next((found for n in fewer if (found := attempt(settings, n)).fits), tried[-1])
    return min(tried, key=lambda found: found.estimate.training_bytes)


def _families(ranks: int, parallel: Parallel | None, accumulation_costs: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Give settings from the cheapest in time, each with whether to accumulate gradients."""
    sharded: list[dict[str, str]] = [{"parallel": "fsdp"}] if ranks > 1 else []
    bases = sharded if parallel == "fsdp" else [{}, *sharded]
    momenta: list[dict[str, str]] = [{}, {"momentum_dtype": "bf16"}]
    checkpointing: list[dict[str, str]] = [{}, *({"activation_checkpointing": where} for where in ("encoder", "all"))]
    yield from ((base, False) for base in bases[:1])
    for base, momentum, accumulates, more in product(
        bases, momenta, (False, True) if accumulation_costs else (True,), checkpointing
    ):
        # PyTorch has no such step for shards; that in bf16 has few temporary tensors as it is.
        fused = {} if momentum or base else {"fused_optimizer": True}
        yield {**base, **fused, **momentum, **more}, accumulates
