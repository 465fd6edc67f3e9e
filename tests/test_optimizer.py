"""Momentum in bfloat16 and the fused step against torch's own SGD, by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_trainers import make, narrow_plans, save, trained
from memory_events import fake_ranks
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stunet.errors import SettingsError
from stunet.network import STUNetSize, build_stunet, shard
from stunet.training.optimizer import BF16MomentumSGD, round_to_bfloat16, set_kernel

SETTINGS: dict[str, Any] = {"momentum": 0.99, "nesterov": True}
PLAIN, STEPS = "rounded to the nearest", 1500


def momentum_of(kind: str, gradient: float, *, elements: int = 2000) -> Tensor:
    """Momentum after many steps with one gradient; it comes to 100 of it."""
    p = nn.Parameter(torch.zeros(elements))
    sgd = BF16MomentumSGD if kind == "bf16" else torch.optim.SGD
    optimizer = sgd([p], 1e-3, **SETTINGS)
    for _ in range(STEPS):
        p.grad = torch.full((elements,), gradient)
        optimizer.step()
        if kind == PLAIN:
            state = optimizer.state[p]
            state["momentum_buffer"] = state["momentum_buffer"].bfloat16().float()
    return optimizer.state[p]["momentum_buffer"].float()


@pytest.mark.parametrize("gradient", [1.0, -0.03])
def test_a_steady_gradient_is_not_lost(gradient: float) -> None:
    limit = 100 * gradient * (1 - 0.99**STEPS)  # the geometric series
    assert momentum_of("fp32", gradient).mean().item() == pytest.approx(limit, rel=1e-4)
    got = momentum_of("bf16", gradient)
    # Each element is off by some roundings, the mean by next to nothing.
    assert got.mean().item() == pytest.approx(limit, rel=2e-3)
    assert float((got / limit - 1).abs().max()) < 0.1
    # It stands still where a hundredth of it is less than half of its last digit.
    assert momentum_of(PLAIN, gradient).mean().item() / limit < 0.85


def test_rounding_is_right_on_average_and_keeps_what_is_exact() -> None:
    values = torch.tensor([1.0, -2.5, 0.0, torch.inf, -torch.inf, 1 + 2**-9, -(3 + 2**-9), 1e-40])
    many = values.repeat(20000, 1)
    rounded = round_to_bfloat16(many.clone(), torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounded[:, :5], many[:, :5])
    torch.testing.assert_close(rounded[:, 5:7].mean(0), values[5:7], rtol=1e-4, atol=0)
    for column in (5, 6):
        assert len(rounded[:, column].unique()) == 2
    assert bool(round_to_bfloat16(torch.tensor([torch.nan]), torch.Generator()).isnan())


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3, 3), (7,), (), (3, 2, 4))]


def test_weights_follow_those_of_sgd() -> None:
    results = []
    for sgd in (torch.optim.SGD, BF16MomentumSGD):
        parameters = make_parameters()
        run(sgd(parameters, 1e-2, weight_decay=3e-5, **SETTINGS), parameters, 100)
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    start = torch.cat([p.detach().flatten() for p in make_parameters()])
    moved = (results[0] - start).norm()
    assert (results[1] - results[0]).norm() < 0.03 * moved
    assert not torch.equal(*results)


def test_a_large_tensor_is_done_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (2**22, 8):
        monkeypatch.setattr("stunet.training.optimizer._CHUNK", chunk)
        parameters = make_parameters()
        run(BF16MomentumSGD(parameters, 1e-2, **SETTINGS), parameters, 1)
        results.append([p.detach() for p in parameters])
    torch.testing.assert_close(*results)


def test_interrupted_and_not_are_the_same_to_the_last_bit() -> None:
    parameters, others = make_parameters(), make_parameters()
    optimizer = BF16MomentumSGD(parameters, 1e-2, **SETTINGS)
    run(optimizer, parameters, 6)
    first = BF16MomentumSGD(others, 1e-2, **SETTINGS)
    run(first, others, 3)
    torch.manual_seed(99)  # its random numbers are its own
    second = BF16MomentumSGD(others, 1e-2, **SETTINGS)
    second.load_state_dict(first.state_dict())
    run(second, others, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_states_are_loaded_from_sgd_and_by_it() -> None:
    parameters = make_parameters()
    stock, ours = (sgd(parameters, 1e-2, **SETTINGS) for sgd in (torch.optim.SGD, BF16MomentumSGD))
    run(stock, parameters, 3)
    ours.load_state_dict(stock.state_dict())
    for p in parameters:
        got = ours.state[p]["momentum_buffer"]
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, stock.state[p]["momentum_buffer"].bfloat16())
    run(ours, parameters, 2)
    fresh = torch.optim.SGD(parameters, 1e-2, **SETTINGS)
    fresh.load_state_dict(ours.state_dict())
    assert all(fresh.state[p]["momentum_buffer"].dtype == torch.float32 for p in parameters)
    run(fresh, parameters, 2)


def test_parameters_in_pieces_on_several_processes() -> None:
    size = STUNetSize("tiny", (1,) * 6, 2)
    with fake_ranks(2) as mesh:
        network = build_stunet(size, 1, 3, [1, 2, 2, 2, 2, 2])
        shard(network, mesh)
        optimizer = BF16MomentumSGD(network.parameters(), 1e-2, **SETTINGS)
        before = [p.to_local().clone() for p in network.parameters()]
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, old in zip(network.parameters(), before, strict=True):
            kept = optimizer.state[p]["momentum_buffer"]
            assert isinstance(kept, DTensor)
            assert kept.dtype == torch.bfloat16
            torch.testing.assert_close(p.to_local(), old - 1e-2 * 1.99)
        set_kernel(optimizer, fused=True)  # its step is that of each process's own part
        optimizer.step()
        with pytest.raises(SettingsError, match="sharded parameters"):
            set_kernel(torch.optim.SGD(network.parameters(), 1e-2), fused=True)


def fused(trainer: Any) -> list[Any]:
    return [group["fused"] for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("fine_tune", ["full", "layerwise"])
def test_the_plans_choose_the_optimizer(dataset: Path, fine_tune: str) -> None:
    trainer = make(plans=narrow_plans(fine_tune=fine_tune))
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.SGD
    assert not any(fused(trainer))
    lean = make(plans=narrow_plans(fine_tune=fine_tune, momentum_dtype="bf16", fused_optimizer=True))
    lean.initialize()
    assert isinstance(lean.optimizer, BF16MomentumSGD)
    assert all(fused(lean))
    # In the same order, so that a checkpoint's momentum comes to the same parameters.
    shapes = [[tuple(p.shape) for g in t.optimizer.param_groups for p in g["params"]] for t in (trainer, lean)]
    assert shapes[0] == shapes[1]
    for epoch in (0, 500):
        for t in (trainer, lean):
            t.lr_scheduler.step(epoch)
        rates = [[g["lr"] for g in t.optimizer.param_groups] for t in (trainer, lean)]
        assert rates[0] == pytest.approx(rates[1])


def test_fused_steps_equal_nnunets(dataset: Path) -> None:
    weights = []
    for settings in ({}, {"fused_optimizer": True}):
        torch.manual_seed(0)
        trainer = make(plans=narrow_plans(**settings))
        trainer.initialize()
        optimizer = trainer.optimizer if settings else nnUNetTrainer.configure_optimizers(trainer)[0]
        parameters = list(trainer.network.parameters())
        for i in range(5):
            generator = torch.Generator().manual_seed(i)
            for p in parameters:
                p.grad = 0.01 * torch.randn(p.shape, generator=generator)
            optimizer.step()
        weights.append([p.detach() for p in parameters])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


LEAN = {"momentum_dtype": "bf16", "fused_optimizer": True}


@pytest.mark.parametrize(("before", "after"), [({}, LEAN), (LEAN, {}), (LEAN, LEAN), ({}, {"fused_optimizer": True})])
def test_checkpoints_go_from_one_optimizer_to_another(
    dataset: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    first = trained(make(plans=narrow_plans(**before)), 2)
    path = save(first, "checkpoint_latest.pth")
    second = make(plans=narrow_plans(**after))
    second.load_checkpoint(str(path))
    assert fused(second) == [after.get("fused_optimizer") or None]
    dtype = torch.bfloat16 if "momentum_dtype" in after else torch.float32
    pairs = zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True)
    for mine, theirs in pairs:
        assert theirs["momentum_buffer"].dtype == dtype
        torch.testing.assert_close(
            theirs["momentum_buffer"].float(), mine["momentum_buffer"].float(), rtol=2**-8, atol=1e-30
        )
    trained(second, 3)
