"""nnU-Net's training step in two and four processes (gloo), with unequal shares, against one with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from made_trainers import NARROW, make
from test_ranks import free_port
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from plans import make_plans
from stunet.planning import rewrite_plans
from stunet.training import BaseSTUNetTrainer, Ranks, process_group, share_of_batch

STEPS, BATCH, PATCH = 20, 5, (40, 56, 40)


def make_trainer() -> BaseSTUNetTrainer:
    settings = {"batch_size": BATCH, "initial_lr": 1e-3, "batch_dice": True}
    trainer = make(plans=rewrite_plans(make_plans(), size=NARROW, plans_name="STUNetPlans_narrow", settings=settings))
    torch.manual_seed(0)
    trainer.initialize()
    return trainer


def batches(trainer: BaseSTUNetTrainer, mine: range) -> Any:
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
        yield {"data": images[mine.start : mine.stop], "target": target, "keys": [f"case_{i}" for i in mine]}


def weights_of(trainer: BaseSTUNetTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer._plain_network().state_dict().items()}


def train(ranks: Ranks) -> tuple[dict[str, Tensor], list[float]]:
    trainer = make_trainer()
    mine = share_of_batch(BATCH, ranks)
    assert trainer.batch_size == len(mine)
    assert isinstance(trainer.network, DistributedDataParallel) == (ranks.size > 1)
    losses = []
    for batch in batches(trainer, mine):
        loss = torch.tensor(float(trainer.train_step(batch)["loss"]), dtype=torch.float64)
        if ranks.size > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / ranks.size)
    return weights_of(trainer), losses


def worker(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    local = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()}, MASTER_ADDR="127.0.0.1")
    ranks = Ranks.from_environment()
    with process_group(ranks, "cpu", 300):
        torch.save(train(ranks), f"{folder}/rank_{rank}.pt")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_as_one(dataset: Path, tmp_path: Path, alone: dict[str, Any], size: int) -> None:
    mp.spawn(worker, args=(size, free_port(), str(tmp_path)), nprocs=size)
    results = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(size)]
    if not alone:
        alone["start"], alone["result"] = weights_of(make_trainer()), train(Ranks())
    weights, losses = alone["result"]
    assert losses[-1] < losses[0]
    for theirs, their_losses in results:
        torch.testing.assert_close(theirs, results[0][0], rtol=0, atol=0)
        assert their_losses == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            # Biases before a norm have no effect, and a gradient that is rounding alone.
            if not name.endswith((".conv1.bias", ".conv2.bias")):
                difference = (theirs[name] - value).abs().max()
                assert difference <= 1e-5, name
                assert difference <= 1e-3 * (value - alone["start"][name]).abs().max(), name
