"""The optimizer: SGD with momentum in half the memory, and which parameters a strategy trains, and how fast."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.sgd import SGD, sgd

from stunet.errors import SettingsError
from stunet.network import N_STAGES, STUNet
from stunet.settings import Strategy

_CHUNK = 2**22  # elements that are in fp32 at a time
_WARMUP_SHARE = 0.05  # of all epochs, which each of the two ramps of ``warmup`` takes by default
_POLY_EXPONENT = 0.9  # nnU-Net's


class BF16MomentumSGD(SGD):
    """:class:`torch.optim.SGD` that keeps momentum in bfloat16 between steps; a step computes in fp32.

    Momentum is rounded stochastically, so that it is right on average. Rounded to nearest, it would stand still where
    a step changes it by less than half a digit, which at nnU-Net's momentum of 0.99 is the rule: bfloat16 has 8
    binary digits, and a step changes momentum by about a hundredth of itself. The random numbers follow from the
    number of steps alone, so all processes that hold the same weights round alike, and a resumed training takes up
    those that were due.

    ``state_dict`` is that of ``SGD`` with tensors of another precision: either loads the other's.

    >>> weight = nn.Parameter(torch.ones(3))
    >>> optimizer = BF16MomentumSGD([weight], lr=0.1, momentum=0.99)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[weight]["momentum_buffer"].dtype
    torch.bfloat16
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step, as :meth:`torch.optim.SGD.step`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        done, device = self.param_groups[0].get("steps", 0), self.param_groups[0]["params"][0].device
        # Shapes are all that is computed on the meta device, which has no generators.
        generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(done)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, generator)
        self.param_groups[0]["steps"] = done + 1
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        whole = (parameter, cast("Tensor", parameter.grad), state["momentum_buffer"])
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in whole]
        if tensors[0].numel() == 0:  # a process whose shard of a small tensor is empty
            return
        rows = max(1, _CHUNK * len(tensors[0]) // tensors[0].numel()) if tensors[0].ndim else 1
        chunks = zip(*(torch.split(t, rows) if t.ndim else (t,) for t in tensors), strict=True)
        settings = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
        for weight, gradient, kept in chunks:
            momentum = kept.float()
            sgd(
                [weight], [gradient], [momentum], foreach=False, fused=bool(group["fused"]),
                grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None), **settings,
            )  # fmt: skip
            kept.copy_(round_to_bfloat16(momentum, generator))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also take momentum of any precision: ``load_state_dict`` casts it to that of the parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for values in self.state.values():
            if values.get("momentum_buffer") is not None:
                values["momentum_buffer"] = values["momentum_buffer"].bfloat16()


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 values, which are overwritten, up or down at random so that the mean is right; exact ones stay."""
    bits = values.view(torch.int32)
    usable = None if bits.device.type == "meta" else generator
    noise = torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=usable)
    # The digits that bfloat16 does not have count up the last one that it has.
    bits.add_(noise).bitwise_and_(-(2**16))
    return values.bfloat16()


def set_kernel(optimizer: Optimizer, *, fused: bool) -> None:
    """Let SGD take its step in one kernel, or as PyTorch chooses, whatever a checkpoint has brought with it."""
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if fused and sharded and not isinstance(optimizer, BF16MomentumSGD):
        raise SettingsError("PyTorch has no fused step for sharded parameters: leave out fused_optimizer or parallel")
    for group in optimizer.param_groups:
        group["fused"] = True if fused else None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: ``factor(epoch)`` times ``initial_lr``, epochs counted from 0."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    factor: Callable[[int], float]


def parameter_groups(
    network: STUNet, strategy: Strategy, *, num_epochs: int, warmup_epochs: int | None = None, layer_decay: float = 0.85
) -> list[ParameterGroup]:
    """Group the parameters that a strategy trains; those in no group stay as they are.

    With E epochs, ``poly(e) = (1 - e / E) ** 0.9`` is nnU-Net's schedule.

    - ``full``: all parameters, poly.
    - ``warmup``: for W epochs the decoder and the heads alone, their rate growing linearly from ``1 / W`` to 1; for
      another W epochs all parameters in the same way; then all parameters, poly over the epochs that are left.
    - ``layerwise``: poly, times ``layer_decay ** distance``; the distance is 0 for the heads, 1 to 5 for the decoder's
      stages from fine to coarse, and 6 to 11 for the encoder's from coarse to the stem.
    - ``frozen-encoder``: the decoder and the heads, poly.
    - ``head-only``: the heads, poly.
    """
    # Checkpoints list momentum in this order.
    encoder, heads = tuple(network.encoder.parameters()), tuple(network.decoder.seg_layers.parameters())
    upsamplings, stages = network.decoder.upsamplings, network.decoder.stages
    decoder = (*upsamplings.parameters(), *stages.parameters())
    poly = partial(_poly, num_epochs=num_epochs)
    if strategy == "layerwise":
        parts = {"heads": heads}
        for i in reversed(range(N_STAGES - 1)):
            parts[f"decoder {i}"] = (*upsamplings[i].parameters(), *stages[i].parameters())
        for i in reversed(range(N_STAGES)):
            parts[f"encoder {i}"] = tuple(network.encoder.stages[i].parameters())
        return [
            ParameterGroup(name, own, partial(poly, scale=layer_decay**distance))
            for distance, (name, own) in enumerate(parts.items())
        ]
    if strategy == "warmup":
        most = (num_epochs - 1) // 2
        ramp = min(max(1, round(_WARMUP_SHARE * num_epochs)), most) if warmup_epochs is None else warmup_epochs
        if ramp > most:
            raise SettingsError(f"warmup_epochs={ramp} twice, of {num_epochs} epochs: set it to at most {most}")
        first, later = (partial(_warmup, num_epochs=num_epochs, ramp=ramp, first=first) for first in (True, False))
        decoded = [ParameterGroup("heads", heads, first), ParameterGroup("decoder", decoder, first)]
        return [*decoded, ParameterGroup("encoder", encoder, later)]
    if strategy == "frozen-encoder":
        return [ParameterGroup("heads", heads, poly), ParameterGroup("decoder", decoder, poly)]
    if strategy == "head-only":
        return [ParameterGroup("heads", heads, poly)]
    return [ParameterGroup("all", (*encoder, *decoder, *heads), poly)]


def _poly(epoch: int, *, num_epochs: int, scale: float = 1.0) -> float:
    return float(scale * (1 - epoch / num_epochs) ** _POLY_EXPONENT)


def _warmup(epoch: int, *, num_epochs: int, ramp: int, first: bool) -> float:
    if epoch < ramp:
        return (epoch + 1) / ramp if first else 0.0
    if epoch < 2 * ramp:
        return (epoch - ramp + 1) / ramp
    return _poly(epoch - 2 * ramp, num_epochs=num_epochs - 2 * ramp)


def freeze_others(network: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Switch gradients off for all parameters that are in no group, which saves their memory and time.

    To be called before ``DistributedDataParallel`` wraps the network, which expects a gradient of each parameter that
    had them switched on.
    """
    trained = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)


class GroupSchedule:
    """Set each group's learning rate at the beginning of an epoch.

    A group whose rate is 0 really stands still: it gets no momentum either, which would otherwise accumulate and act
    when the rate rises. Its gradients are dropped just before the optimizer's step, after
    ``DistributedDataParallel`` has exchanged them, so all ranks still take part in that.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[ParameterGroup], initial_lr: float) -> None:
        self.optimizer, self.groups, self.initial_lr = optimizer, tuple(groups), initial_lr
        optimizer.register_step_pre_hook(_drop_gradients_of_still_groups)
        self.step(0)

    def step(self, epoch: int) -> None:
        """Set the learning rates of an epoch, from 0."""
        for group, planned in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = self.initial_lr * planned.factor(epoch)


def _drop_gradients_of_still_groups(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None
