"""Trainings in several processes whose network is sharded, without data: each rank steps on images of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_trainers import make, narrow_plans
from test_ranks import free_port
from torch import Tensor
from torch import multiprocessing as mp

from stunet.training import BaseSTUNetTrainer
from stunet.training.distributed import Ranks, process_group, share_of_batch

BATCH, PATCH = 4, (24, 24, 24)


def make_trainer(*, continues: bool = False, shards: bool = True, **settings: Any) -> BaseSTUNetTrainer:
    """A trainer whose network is sharded if there are several processes; resumes as ``--c`` does."""
    plans = narrow_plans(**{"parallel": "fsdp", "batch_size": BATCH, "initial_lr": 1e-3, **settings})
    trainer = make(plans=plans)
    torch.manual_seed(trainer.ranks.rank)  # weights are those of rank 0 all the same
    trainer.initialize()
    if continues:
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    if shards:
        trainer.sharding.shard()
    return trainer


def train_epochs(trainer: BaseSTUNetTrainer, epochs: int, *, save: str | None = None) -> None:
    """Two steps an epoch, on the same joined batches whatever the number of processes; saves after each epoch."""
    mine = share_of_batch(BATCH, trainer.ranks)
    for epoch in range(trainer.current_epoch, epochs):
        trainer.lr_scheduler.step(epoch)
        for i in range(2):
            generator = torch.Generator().manual_seed(2 * epoch + i)
            images = torch.randn(BATCH, 1, *PATCH, generator=generator)
            trainer.optimizer.zero_grad()
            outputs = trainer.network(images[mine.start : mine.stop])
            sum(logits.square().mean() for logits in outputs).backward()
            torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
            trainer.optimizer.step()
        with torch.no_grad():
            trainer.network(images[mine.start : mine.stop])  # as a training validates before it saves
        trainer.logger.log("train_losses", np.float32(epoch), epoch)
        trainer._best_ema = np.float64(epoch)
        if save is not None:
            trainer.save_checkpoint(str(Path(trainer.output_folder, save)))
        trainer.current_epoch = epoch + 1


def state_of(trainer: BaseSTUNetTrainer) -> dict[str, Tensor]:
    """Weights and momentum by name, gathered on rank 0; all processes must ask for it."""
    weights, optimizer_state = trainer.sharding.states(full=trainer.sharding.group is not None)
    momentum = {
        f"momentum {name}": values["momentum_buffer"] for name, values in optimizer_state.get("state", {}).items()
    }
    return {name: value.detach().clone() for name, value in (weights | momentum).items()}


def _worker(rank: int, size: int, port: int, folder: str, function: Callable[[Ranks, str], Any]) -> None:
    torch.set_num_threads(1)
    local = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()}, MASTER_ADDR="127.0.0.1")
    ranks = Ranks.from_environment()
    with process_group(ranks, "cpu", 300):
        torch.save(function(ranks, folder), f"{folder}/rank_{rank}.pt")


def together(size: int, folder: Path, function: Callable[[Ranks, str], Any]) -> list[Any]:
    """What a function returns in each of some processes."""
    mp.spawn(_worker, args=(size, free_port(), str(folder), function), nprocs=size)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(size)]
