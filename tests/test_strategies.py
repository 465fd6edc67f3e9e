"""Which parameters each strategy moves, and how fast, over a whole schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from weights import STRIDES, TINY

from stunet.errors import SettingsError
from stunet.network import STUNet, build_stunet
from stunet.settings import Strategy
from stunet.training.optimizer import GroupSchedule, ParameterGroup, freeze_others, parameter_groups

E, LR = 40, 0.01
WARMUP = 2  # a twentieth of 40


def network() -> STUNet:
    torch.manual_seed(0)
    return build_stunet(TINY, 1, 3, STRIDES, deep_supervision=True)


def optimizer_for(net: STUNet, strategy: Strategy, **kwargs: int | float) -> tuple[torch.optim.SGD, GroupSchedule]:
    groups = parameter_groups(net, strategy, num_epochs=E, **kwargs)  # type: ignore[arg-type]
    freeze_others(net, groups)
    optimizer = torch.optim.SGD(
        [{"params": list(g.parameters), "name": g.name} for g in groups], LR, momentum=0.99, nesterov=True
    )
    return optimizer, GroupSchedule(optimizer, groups, LR)


def train_step(net: STUNet, optimizer: torch.optim.SGD) -> set[str]:
    """One step on a random image; the names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.zero_grad()
    sum(logits.square().mean() for logits in net(torch.randn(1, 1, 32, 32, 64))).backward()
    optimizer.step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def poly(epoch: int, total: int = E) -> float:
    """nnU-Net's own schedule as oracle."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], LR)
    PolyLRScheduler(optimizer, LR, total).step(epoch)
    return float(optimizer.param_groups[0]["lr"])


def is_head(name: str) -> bool:
    return ".seg_layers." in name


def is_decoder(name: str) -> bool:
    return name.startswith("decoder.")


# Biases before an instance norm have a gradient of 0 up to rounding, so they may or may not move.
def without_effect(name: str) -> bool:
    return name.endswith((".conv1.bias", ".conv2.bias"))


MOVED_AT: list[tuple[Strategy, int, Callable[[str], bool]]] = [
    ("full", 0, lambda name: True),
    ("layerwise", 0, lambda name: True),
    ("frozen-encoder", 0, is_decoder),
    ("head-only", 0, is_head),
    ("warmup", 0, is_decoder),
    ("warmup", WARMUP - 1, is_decoder),
    ("warmup", WARMUP, lambda name: True),
    ("warmup", E - 1, lambda name: True),
]


@pytest.mark.parametrize(("strategy", "epoch", "intended"), MOVED_AT)
def test_exactly_the_intended_parameters_move(strategy: Strategy, epoch: int, intended: Callable[[str], bool]) -> None:
    net = network()
    optimizer, schedule = optimizer_for(net, strategy)
    schedule.step(epoch)
    moved = train_step(net, optimizer)
    wanted = {name for name, _ in net.named_parameters() if intended(name)}
    assert moved <= wanted
    assert {name for name in wanted if not without_effect(name)} <= moved


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_trained_parameter_is_in_one_group(strategy: Strategy) -> None:
    net = network()
    groups = parameter_groups(net, strategy, num_epochs=E)
    listed = [id(p) for group in groups for p in group.parameters]
    assert len(listed) == len(set(listed))
    freeze_others(net, groups)
    assert {id(p) for p in net.parameters() if p.requires_grad} == set(listed)
    if strategy in ("full", "layerwise", "warmup"):
        assert len(listed) == len(list(net.parameters()))


@pytest.mark.parametrize("strategy", ["full", "frozen-encoder", "head-only"])
def test_one_rate_for_all_is_nnunets_schedule(strategy: Strategy) -> None:
    optimizer, schedule = optimizer_for(network(), strategy)
    for epoch in range(E):
        schedule.step(epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([poly(epoch)] * len(optimizer.param_groups))


def test_warmup_ramps_the_decoder_then_everything_then_decays() -> None:
    optimizer, schedule = optimizer_for(network(), "warmup", warmup_epochs=4)
    assert [g["name"] for g in optimizer.param_groups] == ["heads", "decoder", "encoder"]
    ramp = [0.25 * LR, 0.5 * LR, 0.75 * LR, LR]
    decay = [poly(epoch, E - 8) for epoch in range(E - 8)]
    for i, planned in enumerate((ramp + ramp + decay, ramp + ramp + decay, [0.0] * 4 + ramp + decay)):
        rates = []
        for epoch in range(E):
            schedule.step(epoch)
            rates.append(optimizer.param_groups[i]["lr"])
        assert rates == pytest.approx(planned)


def test_layerwise_decays_towards_the_stem() -> None:
    optimizer, schedule = optimizer_for(network(), "layerwise", layer_decay=0.5)
    names = [g["name"] for g in optimizer.param_groups]
    assert names == ["heads", *(f"decoder {i}" for i in range(4, -1, -1)), *(f"encoder {i}" for i in range(5, -1, -1))]
    for epoch in (0, 17, E - 1):
        schedule.step(epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([poly(epoch) / 2**i for i in range(12)])


def test_the_stem_is_the_last_group_of_layerwise() -> None:
    net = network()
    stem = parameter_groups(net, "layerwise", num_epochs=E)[-1]
    assert {id(p) for p in stem.parameters} == {id(p) for p in net.encoder.stages[0].parameters()}


def test_a_group_that_stands_still_gathers_no_momentum() -> None:
    net = network()
    optimizer, schedule = optimizer_for(net, "warmup")
    encoder = list(net.encoder.parameters())
    for _ in range(3):
        train_step(net, optimizer)
        assert not any("momentum_buffer" in optimizer.state[p] for p in encoder)
    schedule.step(WARMUP)
    train_step(net, optimizer)
    assert all("momentum_buffer" in optimizer.state[p] for p in encoder)


def test_frozen_parameters_take_no_memory_for_gradients() -> None:
    net = network()
    optimizer, _ = optimizer_for(net, "head-only")
    train_step(net, optimizer)
    assert all((p.grad is not None) == is_head(name) for name, p in net.named_parameters())


@pytest.mark.parametrize(("epochs", "warmup", "fits"), [(40, 19, True), (40, 20, False), (3, 1, True), (2, 1, False)])
def test_warmup_must_leave_epochs(epochs: int, warmup: int, fits: bool) -> None:
    def make() -> list[ParameterGroup]:
        return parameter_groups(network(), "warmup", num_epochs=epochs, warmup_epochs=warmup)

    if fits:
        assert all(0 < group.factor(epochs - 1) <= 1 for group in make())
        return
    with pytest.raises(SettingsError, match=f"at most {(epochs - 1) // 2}"):
        make()


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 1000])
def test_default_warmup_fits_any_training(epochs: int) -> None:
    for group in parameter_groups(network(), "warmup", num_epochs=epochs):
        factors = [group.factor(epoch) for epoch in range(epochs)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert factors[-1] > 0
        assert max(factors) == 1


def test_compiled_networks_train_the_same_parameters() -> None:
    net = network()
    optimizer, schedule = optimizer_for(net, "frozen-encoder")
    schedule.step(0)
    compiled = torch.compile(net, backend="aot_eager")
    sum(logits.square().mean() for logits in compiled(torch.randn(1, 1, 32, 32, 64))).backward()
    assert all((p.grad is not None) == is_decoder(name) for name, p in net.named_parameters())
    optimizer.step()
