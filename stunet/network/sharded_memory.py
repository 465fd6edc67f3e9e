"""What FSDP2 allocates beside the network's own tensors, in the order in which it does, without processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stunet.network.architecture import STUNet

__all__ = ["ShardedParameters", "sharded_units"]


def sharded_units(network: STUNet) -> list[nn.Module]:
    """The parts of a network that are gathered and let go of as one: each stage and each way up."""
    decoder = network.decoder
    return [*network.encoder.stages, *decoder.upsamplings, *decoder.stages]


class ShardedParameters:
    """Stands in for ``fully_shard`` of each of a network's units, and of the rest as the root, on the meta device.

    Parameters of the network itself are not counted. Counted are copies of what each process would hold: all-gathered
    parameters, of which those of the next unit come while the present one computes, unsharded gradients, input and
    output of the reduction.

    Args:
        network: On the meta device, in the precision it computes in.
        ranks: Processes that share the parameters.
    """

    def __init__(self, network: STUNet, ranks: int) -> None:
        self.ranks = ranks
        self._buffers = _Buffers()
        units = sharded_units(network)
        self._groups = [_Group(self._buffers, list(unit.parameters()), ranks) for unit in units]
        known = {id(p) for group in self._groups for p in group.parameters}
        rest = [p for p in network.parameters() if id(p) not in known]
        self._root = _Group(self._buffers, rest, ranks)
        for unit, group in zip(units, self._groups, strict=True):
            unit.register_forward_pre_hook(group.before_forward)
            unit.register_forward_hook(group.after_forward)

    @property
    def shards(self) -> list[Tensor]:
        """This process's part of each parameter, in fp32, on the meta device: the first of its rows, padded."""
        return [torch.empty(shape, device="meta") for group in (*self._groups, self._root) for shape in group.shapes]

    def begin(self) -> None:
        """The network is about to run: the root is gathered and stays so."""
        self._buffers.order.clear()
        self._root.gather()
        self._root.copy_out()

    def between(self) -> None:
        """The forward pass is done."""
        self._buffers.gathered = None

    def finish(self) -> None:
        """The backward pass is done: reduce what has no input whose gradient would tell so, then let go of all."""
        for group in (*self._groups, self._root):
            group.after_backward()
        self._buffers.reduced = None

    def drop_gradients(self) -> None:
        """As ``zero_grad``."""
        for group in (*self._groups, self._root):
            group.gradient = None


@dataclass
class _Buffers:
    """What units have in common: the last gathered buffer, kept till the next is unpacked, and the last reduced one."""

    gathered: Tensor | None = None
    reduced: Tensor | None = None
    order: list[_Group] = field(default_factory=list)


class _Group:
    """Parameters of one unit."""

    def __init__(self, buffers: _Buffers, parameters: Sequence[nn.Parameter], ranks: int) -> None:
        self.parameters = parameters
        # Along the first axis, each process has as many rows; the last ones may be padding.
        self.shapes = [(math.ceil(len(p) / ranks), *p.shape[1:]) for p in parameters]
        self.padded = sum(math.prod(shape) for shape in self.shapes) * ranks
        self.gradient: Tensor | None = None
        self._ranks = ranks
        self._buffers = buffers
        self._gathered: Tensor | None = None
        self._unsharded: Tensor | None = None
        self._is_done = True

    def gather(self) -> None:
        """Allocate what ``all_gather`` fills."""
        if self._gathered is None and self._unsharded is None:
            self._gathered = torch.empty(self.padded, device="meta", dtype=self.parameters[0].dtype)

    def copy_out(self) -> None:
        """Allocate the parameters themselves, to which it is unpacked."""
        if self._gathered is None:
            return
        self._unsharded = torch.empty(self.padded, device="meta", dtype=self._gathered.dtype)
        self._gathered = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The unit is about to run."""
        self.gather()
        self._buffers.gathered = None
        kept = self._gathered
        self.copy_out()
        self._buffers.gathered = kept
        self._is_done = False
        return tuple(_AfterBackward.apply(arg, self) for arg in args)

    def after_forward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """The unit has run."""
        self._unsharded = None
        self._buffers.order.append(self)
        if output.requires_grad:
            output.register_hook(self.before_backward)  # type: ignore[no-untyped-call]

    def before_backward(self, gradient: Tensor) -> None:
        """The gradient has reached the unit's output."""
        self.gather()  # unless it came beforehand
        self.copy_out()
        i = self._buffers.order.index(self)
        if i > 0:
            self._buffers.order[i - 1].gather()

    def after_backward(self) -> None:
        """The gradient has reached the unit's input, or the end."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._unsharded = self._gathered = None
        if self._is_done and not gradients:
            return
        self._is_done = True
        self._buffers.reduced = None
        self._buffers.reduced = torch.empty(self.padded, device="meta")
        gradients.clear()
        for p in self.parameters:
            p.grad = None
        output = torch.empty(self.padded // self._ranks, device="meta")
        if self.gradient is None:
            self.gradient = output
        else:
            self.gradient += output


class _AfterBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.group.after_backward()
        return gradient, None
