"""Estimates against closed forms, the paper's table and PyTorch's own memory events."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_events import EDGE, Training, allocated, fake_cuda_peak, sharded_peak
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from versions import FAKE_CUDA

from stunet.errors import ArchitectureError
from stunet.memory import USABLE_SHARE, estimate, recommend
from stunet.network import SIZES, STUNetSize, build_stunet, default_strides
from stunet.training.optimizer import BF16MomentumSGD

PUBLISHED_STRIDES = [1, 2, 2, 2, 2, (1, 1, 2)]


@pytest.mark.parametrize("name", ["small", "base"])
def test_macs_are_close_to_the_published_ones(shared: Path, name: str) -> None:
    published = json.loads((shared / "facts" / "stunet_tables.json").read_text())["sizes"][name]["tera_macs_128"]
    ours = estimate(
        SIZES[name], patch_size=(128,) * 3, batch_size=1, num_classes=105, strides=PUBLISHED_STRIDES
    ).macs  # fmt: skip
    # Ours saves the coarse heads, seven eighths of each 1x1 convolution on the way up, and at the finest three levels
    # 19 of the 54 products for each voxel and pair of channels where the way up and the skip connection meet.
    assert 0.82 * published < ours / 1e12 < 0.85 * published


def test_macs_and_parameters_of_a_small_network_by_hand() -> None:
    size = STUNetSize("tiny", (1,) * 6, 2)
    got = estimate(size, patch_size=(32, 32), batch_size=1, num_classes=3, input_channels=2)
    f, n = (2, 4, 8, 16, 32, 32), [32 * 32 // 4**i for i in (0, 1, 2, 3, 3, 3)]  # strides 2 stop at 4 voxels
    macs = parameters = 0
    for level in range(6):
        c_in = 2 if level == 0 else f[level - 1]
        weights = 9 * c_in * f[level] + 9 * f[level] ** 2 + c_in * f[level]
        macs += weights * n[level]
        parameters += weights + 3 * f[level] + 4 * f[level]  # biases, and two norms
    for level in range(5):
        weights = 9 * 2 * f[level] ** 2 + 9 * f[level] ** 2 + 2 * f[level] ** 2
        macs += f[level + 1] * f[level] * n[level + 1]
        if level < 2:  # enough voxels: a transposed convolution with a 4x4 kernel below, and the projection below, too
            macs += (9 + 9 + 1) * f[level] ** 2 * n[level] + (16 + 1) * f[level] ** 2 * n[level + 1]
        else:
            macs += weights * n[level]
        parameters += weights + 7 * f[level] + f[level + 1] * f[level] + f[level] + 3 * f[level] + 3
    macs += 3 * f[0] * n[0]  # the finest head alone
    assert got.macs == macs
    assert got.parameters == parameters


def test_default_strides() -> None:
    assert default_strides((128, 128)) == [[1, 1]] + [[2, 2]] * 5
    assert default_strides((8, 40, 56)) == [[1, 1, 1], [2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("train", "loss", "classes"),
    [(True, "stunet", 3), (True, "stunet", 25), (True, "nnunet", 25), (False, "stunet", 3), (False, "stunet", 25)],
)
def test_memory_is_what_pytorch_allocates(train: bool, loss: Any, classes: int) -> None:
    size, patch = SIZES["small"], (EDGE,) * 3
    if train:
        measured = Training(size, batch=2, classes=classes, loss=loss).peak()
    else:
        network = build_stunet(size, 1, classes, default_strides(patch))
        image = torch.randn(1, 1, *patch)
        with torch.no_grad():
            measured = allocated(lambda: network(image)) + 4 * sum(p.numel() for p in network.parameters())
    got = estimate(size, patch_size=patch, batch_size=2, num_classes=classes, loss=loss)
    assert (got.training_bytes if train else got.inference_bytes) == pytest.approx(measured, rel=0.03)


SETTINGS = [
    *(("small", where, "stunet") for where in ("none", "encoder", "all")),
    ("base", "all", "stunet"),
    ("base", "none", "nnunet"),
    ("large", "all", "stunet"),
    *(pytest.param("base", where, "stunet", marks=pytest.mark.slow) for where in ("none", "encoder")),
    *(pytest.param("large", where, "stunet", marks=pytest.mark.slow) for where in ("none", "encoder")),
    *(pytest.param("huge", where, "stunet", marks=pytest.mark.slow) for where in ("none", "encoder", "all")),
]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA")
@FAKE_CUDA
@pytest.mark.parametrize(("name", "where", "loss"), SETTINGS)
def test_memory_of_mixed_precision_is_what_a_step_on_cuda_takes(name: str, where: Any, loss: Any) -> None:
    measured = fake_cuda_peak(SIZES[name], edge=128, batch=2, classes=105, loss=loss, activation_checkpointing=where)
    got = estimate(
        SIZES[name], patch_size=(128,) * 3, batch_size=2, num_classes=105, precision="amp", loss=loss,
        activation_checkpointing=where,
    )  # fmt: skip
    assert got.training_bytes == pytest.approx(measured, rel=0.01)


def test_checkpointing_and_half_precision_save_memory() -> None:
    def cost(precision: Any = "amp", where: Any = "none") -> int:
        return estimate(
            SIZES["small"], patch_size=(128,) * 3, batch_size=2, num_classes=105, precision=precision,
            activation_checkpointing=where,
        ).training_bytes  # fmt: skip

    assert cost(where="all") < cost(where="encoder") < cost() < cost("fp32")
    activations = math.prod((128,) * 3) * 2 * 4
    assert cost("fp32") > 16 * 4 * activations  # the finest level alone keeps several maps of 16 channels


def test_the_low_memory_loss_shows_at_many_classes() -> None:
    def cost(loss: Any, classes: int) -> int:
        return estimate(
            SIZES["small"], patch_size=(64,) * 3, batch_size=2, num_classes=classes, loss=loss
        ).training_bytes

    logits = 105 * 4 * 2 * 64**3
    assert cost("nnunet", 105) - cost("stunet", 105) > 2 * logits


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
    assert predicted(**ours) == pytest.approx(measured, rel=0.03)


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


def test_half_copies_are_freed_before_the_optimizers_step() -> None:
    size = STUNetSize("wide", (1,) * 6, 24)  # parameters are nearly all that it takes
    got = estimate(size, patch_size=(16,) * 3, batch_size=1, num_classes=3, precision="amp")
    # Weights, momentum and gradients in fp32, and a second set of these in the step.
    assert got.training_bytes == pytest.approx(16 * got.parameters, rel=0.02)


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
    edge = 64
    measured = sharded_peak(
        SIZES[name], ranks, edge=edge, classes=105, mixed=mixed, pieces=pieces, activation_checkpointing=where
    )
    got = predicted(
        name, patch_size=(edge,) * 3, batch_size=ranks * pieces, ranks=ranks, parallel="fsdp", num_classes=105,
        precision="amp" if mixed else "fp32", activation_checkpointing=where, gradient_accumulation=pieces,
    )  # fmt: skip
    assert got == pytest.approx(measured["Total"], rel=0.15)


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(ArchitectureError, match="2 samples for 1 processes"):
        predicted(gradient_accumulation=3)
    with pytest.raises(ArchitectureError, match="2 samples for 4 processes"):
        predicted(ranks=4, parallel="ddp")
    for kwargs in ({"ranks": 2}, {"parallel": "fsdp"}):
        with pytest.raises(ArchitectureError, match="does not go with"):
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


def test_nothing_random_is_drawn_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would load PyTorch's compiler, for seconds, in each command that counts parameters."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda tensor, **_: drawn.append(tensor))
    with torch.device("meta"):
        build_stunet(TINY, 1, 2, [1] * 6)
    assert not drawn
    build_stunet(TINY, 1, 2, [1] * 6)
    assert drawn


@pytest.mark.parametrize("name", SIZES)
def test_the_readme_has_these_estimates(name: str) -> None:
    row = re.search(rf"^\| {name} \|.*$", Path(__file__).parents[1].joinpath("README.md").read_text(), re.MULTILINE)
    assert row is not None
    told = [float(number) * 2**30 for number in re.findall(r"([\d.]+) GB", row[0])]
    usual = {"patch_size": (128,) * 3, "batch_size": 2, "num_classes": 105, "precision": "amp"}
    of_each = [estimate(SIZES[name], **{**usual, **more}) for more in ({}, {"loss": "nnunet"}, {"num_classes": 3})]  # type: ignore[arg-type]
    expected = [e.training_bytes for e in of_each] + [of_each[0].inference_bytes]
    assert told == pytest.approx(expected, rel=0.02, abs=0.06 * 2**30)
