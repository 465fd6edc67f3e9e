"""Ways to fine-tune: which parameters move, and how fast in which epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stunet.errors import SettingsError
from stunet.network import N_STAGES, STUNet
from stunet.planning import Strategy

__all__ = ["GroupSchedule", "ParameterGroup", "freeze_others", "parameter_groups"]

_N_DECODER_STAGES = N_STAGES - 1
#: Share of all epochs that each of the two ramps of ``warmup`` takes by default.
_WARMUP_SHARE = 0.05
#: nnU-Net's exponent.
_POLY_EXPONENT = 0.9


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: For logs.
        parameters: The parameters.
        factor: The learning rate of an epoch, from 0, as a multiple of ``initial_lr``.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    factor: Callable[[int], float]


def parameter_groups(
    network: STUNet, strategy: Strategy, *, num_epochs: int, warmup_epochs: int | None = None, layer_decay: float = 0.85
) -> list[ParameterGroup]:
    """The parameters that a strategy trains; those in no group stay as they are.

    With E epochs, ``poly(e) = (1 - e / E) ** 0.9`` is nnU-Net's schedule.

    - ``full``: all parameters, poly.
    - ``warmup``: for W epochs the decoder and the heads alone, their rate growing linearly from ``1 / W`` to 1; for
      another W epochs all parameters in the same way; then all parameters, poly over the epochs that are left.
    - ``layerwise``: poly, times ``layer_decay ** distance``; the distance is 0 for the heads, 1 to 5 for the decoder's
      stages from fine to coarse, and 6 to 11 for the encoder's from coarse to the stem.
    - ``frozen-encoder``: the decoder and the heads, poly.
    - ``head-only``: the heads, poly.

    Args:
        network: The network.
        strategy: One of :data:`stunet.planning.STRATEGIES`.
        num_epochs: E.
        warmup_epochs: W; a twentieth of E by default.
        layer_decay: Factor from one stage to the next on the way to the stem.

    Raises:
        SettingsError: Warm-up that leaves no epoch for the schedule after it.
    """
    heads = tuple(network.decoder.seg_layers.parameters())
    decoder = (*network.decoder.upsamplings.parameters(), *network.decoder.stages.parameters())
    encoder = tuple(network.encoder.parameters())
    poly = partial(_poly, num_epochs=num_epochs)
    if strategy == "full":
        return [ParameterGroup("all", (*encoder, *decoder, *heads), poly)]
    if strategy == "head-only":
        return [ParameterGroup("heads", heads, poly)]
    if strategy == "frozen-encoder":
        return [ParameterGroup("heads", heads, poly), ParameterGroup("decoder", decoder, poly)]
    if strategy == "warmup":
        ramp = _check_warmup(warmup_epochs, num_epochs)
        later = partial(_warmup, num_epochs=num_epochs, ramp=ramp, first=False)
        first = partial(_warmup, num_epochs=num_epochs, ramp=ramp, first=True)
        return [
            ParameterGroup("heads", heads, first),
            ParameterGroup("decoder", decoder, first),
            ParameterGroup("encoder", encoder, later),
        ]
    return [
        ParameterGroup(name, parameters, partial(_poly, num_epochs=num_epochs, scale=layer_decay**distance))
        for distance, (name, parameters) in enumerate(_from_heads_to_stem(network))
    ]


def _from_heads_to_stem(network: STUNet) -> list[tuple[str, tuple[nn.Parameter, ...]]]:
    layers = [("heads", tuple(network.decoder.seg_layers.parameters()))]
    for i in reversed(range(_N_DECODER_STAGES)):
        parts = (network.decoder.upsamplings[i], network.decoder.stages[i])
        layers.append((f"decoder {i}", tuple(p for part in parts for p in part.parameters())))
    for i in reversed(range(N_STAGES)):
        layers.append((f"encoder {i}", tuple(network.encoder.stages[i].parameters())))
    return layers


def _poly(epoch: int, *, num_epochs: int, scale: float = 1.0) -> float:
    return float(scale * (1 - epoch / num_epochs) ** _POLY_EXPONENT)


def _warmup(epoch: int, *, num_epochs: int, ramp: int, first: bool) -> float:
    if epoch < ramp:
        return (epoch + 1) / ramp if first else 0.0
    if epoch < 2 * ramp:
        return (epoch - ramp + 1) / ramp
    return _poly(epoch - 2 * ramp, num_epochs=num_epochs - 2 * ramp)


def _check_warmup(warmup_epochs: int | None, num_epochs: int) -> int:
    if warmup_epochs is None:
        return min(max(1, round(_WARMUP_SHARE * num_epochs)), (num_epochs - 1) // 2)
    if 2 * warmup_epochs >= num_epochs:
        raise SettingsError(
            "warm-up that leaves no epoch for the schedule after it",
            got=f"warmup_epochs={warmup_epochs} with num_epochs={num_epochs}",
            expected="less than half of num_epochs, as there are two ramps",
            remedy=f"Set warmup_epochs to at most {(num_epochs - 1) // 2}, or raise num_epochs.",
        )
    return warmup_epochs


def freeze_others(network: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Switch gradients off for all parameters that are in no group, which saves their memory and time.

    To be called before ``DistributedDataParallel`` wraps the network, which expects a gradient of each parameter that
    had them switched on.
    """
    trained = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)


class GroupSchedule:
    """Sets each group's learning rate at the beginning of an epoch.

    A group whose rate is 0 really stands still: it gets no momentum either, which would otherwise pile up and be let
    loose when the rate rises. Its gradients are dropped just before the optimizer's step, after
    ``DistributedDataParallel`` has exchanged them, so all ranks still take part in that.

    Args:
        optimizer: Its groups are in the order of ``groups``.
        groups: What the optimizer was made from.
        initial_lr: What the factors are multiples of.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[ParameterGroup], initial_lr: float) -> None:
        self.optimizer = optimizer
        self.groups = tuple(groups)
        self.initial_lr = initial_lr
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
