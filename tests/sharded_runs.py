"""Trainings in several processes whose network is sharded, without data: each rank steps on images of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_trainers import make, narrow_plans
from torch import Tensor

from stunet.training import BaseSTUNetTrainer
from stunet.training.distributed import share_of_batch

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
