"""nnU-Net's training step in two and four processes (gloo), with unequal shares, against one with the whole batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_trainers import make, narrow_plans
from test_ranks import free_port
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stunet.planning import Parallel
from stunet.training import BaseSTUNetTrainer, Ranks, process_group, share_of_batch

STEPS, BATCH, PATCH = 20, 5, (24, 24, 24)
#: By number of processes: ways to train, and whether Dice is over the whole batch.
ARMS: dict[int, list[tuple[Parallel, bool]]] = {
    2: [("ddp", True), ("fsdp", True), ("fsdp", False)],
    4: [("ddp", True), ("fsdp", True)],
}


def make_trainer(parallel: Parallel, batch_dice: bool) -> BaseSTUNetTrainer:
    settings = {"batch_size": BATCH, "initial_lr": 1e-3, "batch_dice": batch_dice, "parallel": parallel}
    trainer = make(plans=narrow_plans(**settings))
    torch.manual_seed(0)
    trainer.initialize()
    if trainer._divides:
        trainer._divide()  # as when a training starts
    return trainer


def batches(trainer: BaseSTUNetTrainer, mine: range) -> Iterator[dict[str, Any]]:
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


def train(ranks: Ranks, parallel: Parallel, batch_dice: bool) -> tuple[dict[str, Tensor], list[float]]:
    trainer = make_trainer(parallel, batch_dice)
    mine = share_of_batch(BATCH, ranks)
    assert trainer.batch_size == len(mine)
    several = ranks.size > 1
    assert isinstance(trainer.network, DistributedDataParallel) == (several and parallel == "ddp")
    assert all(isinstance(p, DTensor) for p in trainer.network.parameters()) == (several and parallel == "fsdp")
    losses = []
    for batch in batches(trainer, mine):
        loss = torch.tensor(float(trainer.train_step(batch)["loss"]), dtype=torch.float64)
        if several:
            dist.all_reduce(loss)
        losses.append(float(loss) / ranks.size)
    trainer._gather()
    return {name: value.clone() for name, value in trainer._plain_network().state_dict().items()}, losses


def worker(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    local = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()}, MASTER_ADDR="127.0.0.1")
    ranks = Ranks.from_environment()
    with process_group(ranks, "cpu", 300):
        torch.save({arm: train(ranks, *arm) for arm in ARMS[size]}, f"{folder}/rank_{rank}.pt")


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return {}


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_as_one(dataset: Path, tmp_path: Path, alone: dict[Any, Any], size: int) -> None:
    mp.spawn(worker, args=(size, free_port(), str(tmp_path)), nprocs=size)
    results = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(size)]
    for parallel, batch_dice in ARMS[size]:
        if batch_dice not in alone:
            alone[batch_dice] = train(Ranks(), "ddp", batch_dice)
        weights, losses = alone[batch_dice]
        assert losses[-1] < losses[0]
        for result in results:
            theirs, their_losses = result[parallel, batch_dice]
            torch.testing.assert_close(theirs, results[0][parallel, batch_dice][0], rtol=0, atol=0)
            assert their_losses == pytest.approx(losses, rel=1e-5)
            for name, value in weights.items():
                assert (theirs[name] - value).abs().max() <= 1e-5, (parallel, name)
