"""Memory of training measured: by PyTorch's allocation events, on fake CUDA tensors, and by its tracker of FSDP2."""

from __future__ import annotations

import heapq
import itertools
import sys
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stunet.loss import partial_dice_ce_loss
from stunet.network import STUNet, build_stunet, default_strides, shard
from stunet.sizes import STUNetSize

EDGE = 64  # large enough for oneDNN's convolutions; for small tensors PyTorch copies the image to columns instead


def allocated(work: Callable[[], Any]) -> int:
    """Peak of bytes that are allocated on the CPU while something works, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


class Training:
    """A trainer's step on random data: a loss for each output, clipping, SGD; nnU-Net's keeps the logits.

    With a dtype it is one of mixed precision, for fp16 with scaled gradients.
    """

    def __init__(
        self,
        size: STUNetSize,
        *,
        batch: int,
        classes: int,
        loss: str = "stunet",
        pieces: int = 1,
        edge: int = EDGE,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        **kwargs: Any,
    ) -> None:
        strides = default_strides((edge,) * 3)
        self.network = build_stunet(size, 1, classes, strides, deep_supervision=True, **kwargs).to(device)
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.half)
        # As the trainer has it: the coarsest head weighs 0, and is not computed.
        self.network.decoder.supervised_levels = 4
        self.network.decoder.seg_layers[0].requires_grad_(False)
        self.shape, self.classes, self.loss, self.pieces = (batch, 1, *(edge,) * 3), classes, loss, pieces
        self.wrapped = wrap(self.network)
        self.optimizer = make_optimizer(
            self.network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5
        )

    def step(self) -> None:
        image = torch.randn(self.shape, device=self.device)
        target = torch.randint(self.classes, self.shape, dtype=torch.int16, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part, truth in zip(image.chunk(self.pieces), target.chunk(self.pieces), strict=True):
            with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
                output = self.wrapped(part)
                value = self._loss(output, truth)
            if self.loss == "stunet":
                del output
            self.scaler.scale(value).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _loss(self, output: list[Tensor], target: Tensor) -> Tensor:
        losses = []
        for logits in output:
            steps = [a // b for a, b in zip(target.shape[2:], logits.shape[2:], strict=True)]
            small = target[:, 0, :: steps[0], :: steps[1], :: steps[2]]
            if self.loss == "stunet":
                losses.append(partial_dice_ce_loss(logits, small, batch_dice=False))
            else:
                losses.append(nnunets_loss(logits, small[:, None]))
        return sum(losses[1:], losses[0])

    def held(self) -> int:
        """Bytes of weights and momentum."""
        states = [s["momentum_buffer"] for s in self.optimizer.state.values() if s.get("momentum_buffer") is not None]
        return sum(t.numel() * t.element_size() for t in (*self.network.parameters(), *states))

    def peak(self) -> int:
        """Bytes at the peak of the second step; on CUDA all that there are."""
        self.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        return allocated(self.step) + self.held()


def nnunets_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of nnU-Net's trainer for one output."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    settings = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    value: Tensor = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)(logits, target)
    return value


def fake_cuda_peak(
    size: STUNetSize, *, edge: int, batch: int, classes: int, loss: str = "stunet", **kwargs: Any
) -> int:
    """Bytes of all tensors at the peak of a step in fp16 on CUDA; they are fake, so nothing is allocated."""
    # Autocast switches itself off where there is no device.
    can_autocast = patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    with FakeTensorMode(), can_autocast, _LiveBytes() as live:
        with torch.device("cuda"):  # which observes what is computed, so that networks take their plain path
            network = STUNet(
                1, classes, features_per_stage=size.features, n_blocks_per_stage=size.depth,
                strides=default_strides((edge,) * 3), deep_supervision=True, **kwargs,
            )  # fmt: skip
            image = torch.empty(batch, 1, *(edge,) * 3)
            targets = [torch.empty(batch, 1, *(edge >> i,) * 3, dtype=torch.int16) for i in range(5)]
        network.decoder.supervised_levels = 4
        parameters = list(network.parameters())
        optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5, foreach=True)
        optimizer.state.update({p: {"momentum_buffer": torch.empty_like(p)} for p in parameters})
        with torch.autocast("cuda", torch.half):
            output = network(image)
            if loss == "stunet":
                losses, output = [_LikeTheLoss.apply(logits) for logits in output], []
            else:  # nnU-Net's trainer keeps the logits
                losses = [nnunets_loss(*pair) for pair in zip(output, targets, strict=False)]
            roots = [sum(losses[1:], losses[0])]
        losses.clear()
        _backward(roots)
        nn.utils.clip_grad_norm_(parameters, 12, foreach=True)
        optimizer.step()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up all storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_iter(result) if isinstance(t, Tensor)):
            if (key := storage._cdata) not in self._known:
                self._known.add(key)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.current -= size


@torch.no_grad()
def _backward(roots: list[Any]) -> None:
    """What autograd's engine does, which wants a driver for CUDA: the latest node first, each freed when it is done.

    The loss is taken out of the list, so that nothing but this holds its graph.
    """
    from torch.utils.checkpoint import GraphExecGroup  # later than the earliest PyTorch that the package allows

    root, gradients = roots[0].grad_fn, defaultdict[Any, dict[int, Any]](dict)
    gradients[root][0] = torch.ones_like(roots.pop())
    stack, waiting = [root], Counter[Any]()
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                if not waiting[node]:
                    stack.append(node)
                waiting[node] += 1
    order = itertools.count()  # nodes themselves cannot be compared
    ready = [(0, next(order), root)]
    root = node = None
    with GraphExecGroup():  # checkpoints compute again once
        while ready:
            node = heapq.heappop(ready)[2]
            given = gradients.pop(node)
            if hasattr(node, "variable"):
                p = node.variable
                p.grad = given[0] if p.grad is None else p.grad.add_(given[0])
                continue
            run = node.apply if isinstance(node, BackwardCFunction) else node
            found = run(*(given.pop(i, None) for i in range(max(given) + 1)))
            if isinstance(node, BackwardCFunction):
                node.maybe_clear_saved_tensors()
            found = list(found) if isinstance(found, tuple | list) else [found]
            following, run, node = node.next_functions, None, None
            for i, (after, place) in enumerate(following):
                if after is None:
                    continue
                gradient, found[i] = found[i], None
                if (other := gradients[after].pop(place, None)) is not None:
                    gradient = other.add_(gradient) if sys.getrefcount(other) == 2 else other + gradient
                gradients[after][place] = gradient
                waiting[after] -= 1
                if not waiting[after]:
                    del waiting[after]
                    heapq.heappush(ready, (-after._sequence_nr(), next(order), after))
            following = after = gradient = other = None


@contextmanager
def fake_ranks(n: int) -> Iterator[Any]:
    """A mesh of ``n`` processes, of which there is one; what the others would send is not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield init_device_mesh("cpu", (n,))
    finally:
        dist.destroy_process_group()


def sharded_peak(
    size: STUNetSize,
    ranks: int,
    *,
    edge: int,
    classes: int,
    mixed: bool = False,
    pieces: int = 1,
    reduce_each: bool = True,
    **kwargs: Any,
) -> dict[str, int]:
    """Bytes of one of several processes at the peak of a step, by PyTorch's tracker of FSDP2.

    Each process has a sample in each piece. Nothing is allocated: tensors are fake. The optimizer's step goes tensor by
    tensor, as on the CPU. Without ``reduce_each`` gradients stay whole until the last piece's.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    unwatched = patch("stunet.network._GLOBAL_HOOKS", [])  # the tracker's say where it is
    with warnings.catch_warnings(), unwatched, fake_ranks(ranks) as mesh, FakeTensorMode():
        warnings.simplefilter("ignore")
        network = STUNet(
            1, classes, features_per_stage=size.features, n_blocks_per_stage=size.depth,
            strides=default_strides((edge,) * 3), deep_supervision=True, **kwargs,
        )  # fmt: skip
        shard(network, mesh, dtype=torch.half if mixed else None)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
        tracker = FSDPMemTracker(network, optimizer)
        images = torch.empty(pieces, 1, *(edge,) * 3)
        tracker.track_inputs((images,))
        with tracker:
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                for i, image in enumerate(images):
                    tracker.reset_mod_stats()  # it keeps the peak
                    network.set_requires_gradient_sync(reduce_each or i == pieces - 1)
                    output = network(image[None])
                    loss = sum(_LikeTheLoss.apply(logits) for logits in output)
                    del output  # as the trainer does
                    loss.backward()
                optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): value for kind, value in peak.items() if value}


class _LikeTheLoss(torch.autograd.Function):
    """What the loss keeps and makes; the loss itself reads values, which fake tensors do not have."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros((), dtype=torch.float)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])
