"""SGD with momentum in half the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.sgd import SGD, sgd

from stunet.errors import SettingsError

__all__ = ["BF16MomentumSGD", "round_to_bfloat16", "set_kernel"]

# Elements that are in fp32 at a time.
_CHUNK = 2**22


class BF16MomentumSGD(SGD):
    """:class:`torch.optim.SGD` that keeps momentum in bfloat16 from step to step; a step computes in fp32.

    Momentum is rounded up or down at random, so that it is right on average. Rounded to the nearest, it would stand
    still where a step changes it by less than half a digit, which at nnU-Net's momentum of 0.99 is the rule: bfloat16
    has 8 binary digits, and a step changes momentum by about a hundredth of itself. The random numbers follow from the
    number of steps alone, so all processes that hold the same weights round alike, and an interrupted training goes on
    with those that were due.

    ``state_dict`` is that of ``SGD`` with tensors of another precision: either loads the other's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step, as :meth:`torch.optim.SGD.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = self.param_groups[0].get("steps", 0)
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in generators:
                    # Shapes are all that is computed on the meta device, which has no generators.
                    on = "cpu" if device.type == "meta" else device
                    generators[device] = torch.Generator(on).manual_seed(done)
                self._update(parameter, group, generators[device])
        self.param_groups[0]["steps"] = done + 1
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        gradient: Tensor = parameter.grad  # type: ignore[assignment] # there is one
        tensors = [_local(t) for t in (parameter, gradient, state["momentum_buffer"])]
        if tensors[0].numel() == 0:  # a process that has nothing of a small tensor
            return
        rows = max(1, _CHUNK * len(tensors[0]) // tensors[0].numel()) if tensors[0].ndim else 1
        pieces = zip(*(torch.split(t, rows) if t.ndim else (t,) for t in tensors), strict=True)
        settings = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
        for weight, slope, kept in pieces:
            momentum = kept.float()
            sgd(
                [weight], [slope], [momentum], foreach=False, fused=bool(group["fused"]),
                grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None), **settings,
            )  # fmt: skip
            kept.copy_(round_to_bfloat16(momentum, generator))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also take momentum of any precision, to which ``load_state_dict`` comes by way of the parameters'."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for values in self.state.values():
            if values.get("momentum_buffer") is not None:
                values["momentum_buffer"] = values["momentum_buffer"].bfloat16()


def set_kernel(optimizer: Optimizer, *, fused: bool) -> None:
    """Let SGD take its step in one kernel, or as PyTorch chooses, whatever a checkpoint has brought with it.

    Raises:
        SettingsError: A fused step of sharded parameters, which PyTorch does not have.
    """
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if fused and sharded and not isinstance(optimizer, BF16MomentumSGD):
        raise SettingsError(
            "a fused optimizer for sharded parameters",
            got="fused_optimizer=true with parallel=fsdp",
            expected="one of them, as PyTorch has no such step",
            remedy="Leave fused_optimizer out: a part of the parameters has small temporary tensors.",
        )
    for group in optimizer.param_groups:
        group["fused"] = True if fused else None


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round up or down at random, each with the probability that makes the mean right; exact values stay.

    Args:
        values: fp32, overwritten.
        generator: Of random numbers, on the same device.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=_usable(generator, bits))
    # The digits that bfloat16 does not have count up the last one that it has.
    bits.add_(noise).bitwise_and_(-(2**16))
    return values.bfloat16()


def _usable(generator: torch.Generator, tensor: Tensor) -> torch.Generator | None:
    return None if tensor.device.type == "meta" else generator


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
