"""Trainers as nnU-Net's own finder finds them, and epochs without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from plans import DATASET_JSON, make_plans
from stunet.network import STUNetSize
from stunet.planning.plans import rewrite_plans
from stunet.training import BaseSTUNetTrainer

NARROW = STUNetSize("narrow", (1,) * 6, 2)


def find(name: str) -> type[BaseSTUNetTrainer]:
    return recursive_find_trainer_class_by_name(name)


def make(
    name: str = "STUNetTrainer",
    plans: dict[str, Any] | None = None,
    configuration: str = "3d_fullres",
    dataset_json: dict[str, Any] = DATASET_JSON,
) -> BaseSTUNetTrainer:
    plans = {**(plans or make_plans()), "continue_training": False}
    return find(name)(plans, configuration, 0, dataset_json, torch.device("cpu"))


def narrow_plans(**settings: Any) -> dict[str, Any]:
    return rewrite_plans(make_plans(), size=NARROW, plans_name="STUNetPlans_narrow", settings=settings)


def trained(trainer: BaseSTUNetTrainer, epochs: int) -> BaseSTUNetTrainer:
    """Pretend some epochs: weights and momentum move and the log grows as nnU-Net keeps it."""
    if not trainer.was_initialized:
        trainer.initialize()
    for epoch in range(trainer.current_epoch, epochs):
        trainer.optimizer.zero_grad()
        outputs = trainer.network(torch.randn(1, 1, 40, 56, 40))
        sum(o.square().mean() for o in outputs).backward()
        step(trainer)
        for key in ("train_losses", "val_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps"):
            trainer.logger.log(key, np.float32(epoch), epoch)
        trainer.logger.log("dice_per_class_or_region", [np.float32(0.5)], epoch)
        trainer.logger.log("mean_fg_dice", np.float64(0.5), epoch)
        trainer.current_epoch = epoch + 1
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    trainer._best_ema = np.float64(0.5)
    return trainer


def step(trainer: BaseSTUNetTrainer) -> None:
    """As nnU-Net steps: a network this narrow has gradients without bounds where a channel is nearly constant."""
    torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
    trainer.optimizer.step()


def save(trainer: BaseSTUNetTrainer, name: str) -> Path:
    path = Path(trainer.output_folder) / name
    trainer.current_epoch -= 1  # nnU-Net saves before it counts the epoch
    trainer.save_checkpoint(str(path))
    trainer.current_epoch += 1
    return path
