"""Whole training steps on tensors that say they are on a GPU, without one, and what they would make it do.

The tensors have no content (``FakeTensorMode``), so operations check devices and shapes and return at once. Two things
have no fake: autograd's engine, which asks the driver for its threads (:func:`run_backward` walks the same graph), and
numbers that are read from the device (they are 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: Operations whose result has a size or a value that Python waits for.
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten.is_nonzero,
    aten._unique2, aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
#: Operations that only make room.
SILENT = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}


class Device(TorchDispatchMode):
    """Count what operations do to the GPU.

    Attributes:
        launches: Kernels, by operation; a ``_foreach`` operation and a Triton kernel are one.
        blocking: What makes Python wait for the GPU, by operation.
        pageable: Copies to the GPU from memory that is not pinned, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.blocking, self.pageable = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor.is_cuda for tensor in given]
        packet, name = func.overloadpacket, str(func.overloadpacket)
        if any(on_gpu) and (packet in WAITS or self._is_indexed_by_a_mask(packet, args)):
            self.blocking[name] += 1
        if packet is aten._local_scalar_dense and on_gpu[0]:
            return 0.0
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if packet in (aten._to_copy, aten.copy_) and made[0].is_cuda != given[-1].is_cuda:
            self._count_transfer(name, given[-1], args, kwargs or {})
            return made[0] if made[0].is_cuda else torch.zeros(made[0].shape, dtype=made[0].dtype)
        if any(tensor.is_cuda for tensor in made or given) and not func.is_view and packet not in SILENT:
            self.launches[name] += 1
        return result

    @staticmethod
    def _is_indexed_by_a_mask(packet: Any, args: Any) -> bool:
        is_indexed = packet in (aten.index, aten.index_put, aten.index_put_)
        return is_indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])

    def _count_transfer(self, name: str, source: Tensor, args: Any, kwargs: Any) -> None:
        waits = not (kwargs.get("non_blocking") or (name == "aten.copy_" and len(args) > 2 and args[2]))
        if not source.is_cuda and not getattr(source, "pinned", False):
            self.pageable[f"{name} {tuple(source.shape)}"] += 1
            waits = True  # for the copy to a buffer of the driver's, behind all that is queued
        if waits:
            self.blocking[f"{name} {tuple(source.shape)}"] += 1


def pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


@contextmanager
def fake_cuda() -> Iterator[Device]:
    """Within this context tensors may be on ``cuda:0``."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),  # first, for it makes a device up where there is none
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.Tensor.pin_memory", pinned),
        patch("torch.autograd.backward", run_backward),
        Device() as device,
    ):
        yield device


def run_backward(value: Tensor) -> None:
    """Do what ``value.backward()`` does, a node after all those that it gets gradients from."""
    gradients: dict[Any, dict[int, Tensor]] = {value.grad_fn: {value.output_nr: torch.ones_like(value)}}
    waits_for: Counter[Any] = Counter()
    seen, queue = {value.grad_fn}, [value.grad_fn]
    for node in queue:
        for other, _ in node.next_functions:
            if other is not None:
                waits_for[other] += 1
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
    ready = [value.grad_fn]
    while ready:
        node = ready.pop()
        own = gradients.pop(node, {})
        results: Any = ()
        if own:
            with torch.no_grad():
                results = node(*(own.get(i) for i in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        for i, (other, slot) in enumerate(node.next_functions):
            if other is None:
                continue
            result = results[i] if i < len(results) else None
            if result is not None:
                of_other = gradients.setdefault(other, {})
                of_other[slot] = of_other[slot] + result if slot in of_other else result
            waits_for[other] -= 1
            if not waits_for[other]:
                ready.append(other)
