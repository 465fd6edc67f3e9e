"""Estimates of training memory against what PyTorch allocates, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_events import EDGE, Training, allocated, sharded_peak
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stunet.errors import ArchitectureError
from stunet.network import SIZES, USABLE_SHARE, STUNetSize, build_stunet, default_strides, estimate, recommend
from stunet.training.optimizer import BF16MomentumSGD

PATCH = (EDGE,) * 3


def predicted(size: str | STUNetSize = "small", **kwargs: Any) -> int:
    known = SIZES[size] if isinstance(size, str) else size
    return estimate(known, **{"patch_size": PATCH, "batch_size": 2, "num_classes": 3, **kwargs}).training_bytes


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"activation_checkpointing": "encoder"}, {"activation_checkpointing": "encoder"}),
        ({"gradient_accumulation": 2}, {"pieces": 2}),
        (
            {"gradient_accumulation": 2, "momentum_dtype": "bf16", "activation_checkpointing": "all"},
            {"pieces": 2, "make_optimizer": BF16MomentumSGD, "activation_checkpointing": "all"},
        ),
    ],
    ids=["encoder", "pieces", "everything"],
)
def test_memory_of_a_step(ours: Any, theirs: Any) -> None:
    measured = Training(SIZES["small"], batch=2, classes=3, **theirs).peak()
    assert predicted(**ours) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "make_optimizer"),
    [
        ({}, torch.optim.SGD),
        ({"fused_optimizer": True}, lambda *args, **kwargs: torch.optim.SGD(*args, fused=True, **kwargs)),
        ({"momentum_dtype": "bf16"}, BF16MomentumSGD),
    ],
    ids=["stock", "fused", "bf16"],
)
def test_memory_of_the_optimizers_step(settings: Any, make_optimizer: Any) -> None:
    """A network whose parameters are far more than its activations."""
    size = STUNetSize("wide", (1,) * 6, 24)
    patch = (16, 16, 16)
    network = build_stunet(size, 1, 3, default_strides(patch), deep_supervision=True)
    optimizer = make_optimizer(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)

    def fill() -> None:
        for p in network.parameters():
            p.grad = torch.zeros_like(p)

    def step() -> None:
        fill()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    weights = 4 * sum(p.numel() for p in network.parameters())
    held = weights + sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    got = predicted(size, patch_size=patch, batch_size=1, **settings)
    assert got == pytest.approx(allocated(step) + held, rel=0.15)
    if settings:
        assert got < predicted(size, patch_size=patch, batch_size=1)


def test_ddp_holds_one_more_set_of_gradients(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        made: list[Any] = []
        training = Training(SIZES["small"], batch=1, classes=3, edge=32)
        buckets = allocated(lambda: made.append(DistributedDataParallel(training.network)))
        assert buckets == pytest.approx(4 * sum(p.numel() for p in training.network.parameters()), rel=0.01)
    finally:
        dist.destroy_process_group()
    alone = predicted(batch_size=1)
    # The coarsest head counts too with several processes, which takes next to nothing.
    assert predicted(batch_size=2, ranks=2, parallel="ddp") == pytest.approx(alone + buckets, rel=0.01)


@pytest.mark.parametrize(
    ("name", "ranks", "mixed", "where", "pieces"),
    [
        ("small", 2, False, "none", 1),
        ("base", 4, False, "none", 2),
        ("small", 4, True, "all", 1),
        ("large", 2, True, "none", 1),
    ],
)
def test_sharded_memory_is_what_pytorchs_tracker_says(
    name: str, ranks: int, mixed: bool, where: Any, pieces: int
) -> None:
    edge = 32
    measured = sharded_peak(
        SIZES[name], ranks, edge=edge, classes=105, mixed=mixed, pieces=pieces, activation_checkpointing=where
    )
    got = predicted(
        name, patch_size=(edge,) * 3, batch_size=ranks * pieces, ranks=ranks, parallel="fsdp", num_classes=105,
        precision="amp" if mixed else "fp32", activation_checkpointing=where, gradient_accumulation=pieces,
    )  # fmt: skip
    assert got == pytest.approx(measured["Total"], rel=0.1)


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(ArchitectureError, match="2 samples for 1 processes"):
        predicted(gradient_accumulation=3)
    with pytest.raises(ArchitectureError, match="2 samples for 4 processes"):
        predicted(ranks=4, parallel="ddp")
    for kwargs in ({"ranks": 2}, {"parallel": "fsdp"}):
        with pytest.raises(ArchitectureError, match="how they work together"):
            predicted(**kwargs)


TINY = STUNetSize("tiny", (1,) * 6, 4)
TINY_BATCH: Any = {"patch_size": (32, 32, 32), "batch_size": 4, "num_classes": 3}


def budget(**settings: Any) -> int:
    """A GPU on which a training with these settings just fits."""
    return int(estimate(TINY, **TINY_BATCH, **settings).training_bytes / USABLE_SHARE) + 1


@pytest.mark.parametrize(
    ("settings", "batch_dice"),
    [
        ({}, False),
        ({"fused_optimizer": True, "gradient_accumulation": 2}, False),
        ({"fused_optimizer": True, "gradient_accumulation": 4}, False),
        ({"fused_optimizer": True, "activation_checkpointing": "encoder"}, True),
        ({"fused_optimizer": True, "activation_checkpointing": "all"}, True),
    ],
)
def test_the_cheapest_way_that_fits_is_recommended(settings: dict[str, Any], batch_dice: bool) -> None:
    found = recommend(TINY, budget(**settings), batch_dice=batch_dice, **TINY_BATCH)
    assert found.fits
    assert found.settings == settings
    assert found.estimate == estimate(TINY, **TINY_BATCH, **settings)


def test_several_processes_share_parameters_only_where_it_must_be() -> None:
    wide: Any = {"patch_size": (16, 16, 16), "batch_size": 4, "num_classes": 3, "ranks": 4}
    size = STUNetSize("wide", (1,) * 6, 16)  # parameters are nearly all that it takes
    ddp = estimate(size, parallel="ddp", **wide).training_bytes
    fsdp = estimate(size, parallel="fsdp", **wide).training_bytes
    assert recommend(size, int(ddp / USABLE_SHARE) + 1, **wide).settings == {}
    found = recommend(size, int(fsdp / USABLE_SHARE) + 1, **wide)
    assert found.fits
    assert found.settings["parallel"] == "fsdp"
    nothing = recommend(size, 10_000_000, **wide)
    assert not nothing.fits
    assert nothing.settings["parallel"] == "fsdp"
    assert nothing.estimate.training_bytes <= fsdp
