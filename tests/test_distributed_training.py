"""nnU-Net's training step in two and four processes (gloo), with unequal shares, against one with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from made_trainers import NARROW, make, narrow_plans
from together import free_port, together
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from versions import CPUS_AVERAGE

from stunet.errors import SettingsError
from stunet.network import build_stunet, shard
from stunet.settings import Parallel
from stunet.training import BaseSTUNetTrainer
from stunet.training.distributed import Ranks, process_group, share_of_batch

STEPS, BATCH, PATCH = 6, 5, (16, 24, 16)
BF16_PATCH = (32, 40, 32)  # with fewer voxels, norms of so few channels divide by next to nothing


class Arm(NamedTuple):
    """A way to train."""

    parallel: Parallel
    batch_dice: bool
    dtype: torch.dtype


SHARDED = [Arm("fsdp", True, torch.float32), Arm("fsdp", False, torch.float32)] if CPUS_AVERAGE else []
SINGLE: list[Arm] = [Arm("ddp", False, torch.float32), *SHARDED[:1]]
OTHERS: list[Arm] = [Arm("ddp", True, torch.float32), *SHARDED[1:]]
DOUBLE: list[Arm] = [Arm("ddp", False, torch.float64)]
ARMS = {2: SINGLE + OTHERS + DOUBLE, 4: SINGLE}
#: Of losses, relatively, and of weights after the last step: what rounding may make of the order of summation.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_trainer(arm: Arm) -> BaseSTUNetTrainer:
    settings = {"batch_size": BATCH, "initial_lr": 1e-3, "batch_dice": arm.batch_dice, "parallel": arm.parallel}
    trainer = make(plans=narrow_plans(**settings))
    build = trainer.build_network_architecture

    @wraps(build)
    def build_in_precision(*args: Any, **kwargs: Any) -> nn.Module:
        return build(*args, **kwargs).to(arm.dtype)

    trainer.build_network_architecture = build_in_precision
    torch.manual_seed(0)
    trainer.initialize()
    if trainer.sharding.enabled:
        trainer.sharding.shard()  # as when a training starts
    return trainer


def batches(trainer: BaseSTUNetTrainer, mine: range, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """This process's share of images and of label maps at all scales."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 1, *PATCH, generator=generator)
        labels = (images[:, :1] > 0.5).short() + (images[:, :1] > 1.5)
        scales = trainer._get_deep_supervision_scales()
        sizes = [[round(n * s) for n, s in zip(PATCH, scale, strict=True)] for scale in scales]
        target = [
            torch.nn.functional.interpolate(labels.float(), size).short()[mine.start : mine.stop] for size in sizes
        ]
        data = images[mine.start : mine.stop].to(dtype)
        yield {"data": data, "target": target, "keys": [f"case_{i}" for i in mine]}


def train(ranks: Ranks, arm: Arm) -> tuple[dict[str, Tensor], list[float]]:
    """Weights at the end, and the mean loss of each step."""
    trainer = make_trainer(arm)
    mine = share_of_batch(BATCH, ranks)
    assert trainer.batch_size == len(mine)
    several = ranks.size > 1
    assert isinstance(trainer.network, DistributedDataParallel) == (several and arm.parallel == "ddp")
    assert all(isinstance(p, DTensor) for p in trainer.network.parameters()) == (several and arm.parallel == "fsdp")
    losses = []
    for batch in batches(trainer, mine, arm.dtype):
        loss = torch.tensor(float(trainer.train_step(batch)["loss"]), dtype=torch.float64)
        if several:
            dist.all_reduce(loss)
        losses.append(float(loss) / ranks.size)
    trainer.sharding.gather()
    return {name: value.clone() for name, value in trainer.plain_network.state_dict().items()}, losses


def train_all(ranks: Ranks, folder: str) -> dict[Any, Any]:
    results: dict[Any, Any] = {tuple(arm): train(ranks, arm) for arm in ARMS[ranks.size]}
    return {**results, "bf16": bf16_against_fp32(ranks) if ranks.size == 2 and CPUS_AVERAGE else None}


def bf16_against_fp32(ranks: Ranks) -> dict[str, Any]:
    """One forward and backward pass of a divided network that computes in bf16, and of the same one in fp32."""
    torch.manual_seed(0)
    plain = build_stunet(NARROW, 1, 3, [1, 2, 2, 2, 1, 1], deep_supervision=True)
    divided = deepcopy(plain)
    shard(divided, init_device_mesh("cpu", (ranks.size,)), dtype=torch.bfloat16)
    images = torch.randn(ranks.size, 1, *BF16_PATCH, generator=torch.Generator().manual_seed(1))
    logits = {}
    for name, network, mine in (("fp32", plain, images), ("bf16", divided, images[[ranks.rank]])):
        logits[name] = network(mine)
        sum(level.float().square().mean() for level in logits[name]).backward()
    gradients = {name: p.grad.full_tensor() for name, p in divided.named_parameters()}
    return {
        "dtypes": {logits["bf16"][0].dtype, *(p.dtype for p in divided.parameters())},
        "gradient dtypes": {gradient.dtype for gradient in gradients.values()},
        "logits": (logits["bf16"][0].float().detach(), logits["fp32"][0][[ranks.rank]].detach()),
        "gradients": (gradients, {name: p.grad for name, p in plain.named_parameters()}),
    }


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return {}


def check_bf16(found: dict[str, Any]) -> None:
    assert found["dtypes"] == {torch.bfloat16, torch.float32}  # computes in the one, keeps the other
    assert found["gradient dtypes"] == {torch.float32}
    ours, theirs = found["logits"]
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()  # bf16 rounds to 1/256
    for name, gradient in found["gradients"][0].items():
        assert gradient.isfinite().all(), name
    heads = [name for name in found["gradients"][0] if "seg_layers" in name]
    for name in heads:
        ours, theirs = (gradients[name] for gradients in found["gradients"])
        assert (ours - theirs).norm() <= 0.05 * theirs.norm(), name


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_as_one(dataset: Path, tmp_path: Path, alone: dict[Any, Any], size: int) -> None:
    results = together(size, tmp_path, train_all)
    for arm in ARMS[size]:
        tolerance = TOLERANCE[arm.dtype]
        if arm[1:] not in alone:
            alone[arm[1:]] = train(Ranks(), arm)
        weights, losses = alone[arm[1:]]
        assert losses[-1] < losses[0]
        for result in results:
            theirs, their_losses = result[tuple(arm)]
            torch.testing.assert_close(theirs, results[0][tuple(arm)][0], rtol=0, atol=0)
            assert their_losses == pytest.approx(losses, rel=tolerance)
            for name, value in weights.items():
                assert (theirs[name] - value).abs().max() <= tolerance, (arm, name)
    if size == 2 and CPUS_AVERAGE:
        for result in results:
            check_bf16(result["bf16"])


def start_sharded(ranks: Ranks, folder: str) -> str:
    with pytest.raises(SettingsError) as caught:
        make_trainer(Arm("fsdp", False, torch.float32))
    return str(caught.value)


@pytest.mark.skipif(CPUS_AVERAGE, reason="the installed PyTorch averages on CPUs")
def test_sharding_is_refused_where_gradients_would_be_summed(dataset: Path, tmp_path: Path) -> None:
    for message in together(2, tmp_path, start_sharded):
        assert "cannot average over processes on cpu: set parallel=ddp" in message


def test_a_platform_that_names_rank_and_size_alone(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port())), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with process_group(Ranks(), "cpu", 30):
        trainer = make(plans=narrow_plans(batch_size=3))
        trainer.initialize()
        assert trainer.is_ddp  # as nnUNetv2_train -num_gpus has it, which tells its processes in another way
        assert trainer.batch_size == 3
