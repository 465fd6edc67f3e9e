"""nnU-Net's trainer in one of several processes, on any number of machines and on CPUs too."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from stunet.network import STUNet
from stunet.training.ranks import Ranks, share_of_batch

__all__ = ["DistributedTrainer", "seed_everything"]


def seed_everything(*seed: int) -> None:
    """Seed Python, NumPy and PyTorch with one number made of several."""
    state = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


class DistributedTrainer(nnUNetTrainer):
    """What nnU-Net's trainer takes for granted of several processes, by what they are told.

    nnU-Net expects them on CUDA and on one machine. Here the device is that of the *local* rank, gloo is as good as
    NCCL, and the batch need not be divisible. ``local_rank`` stays what nnU-Net makes of it, the rank among all, by
    which it chooses who writes. Under ``nnUNetv2_train -num_gpus`` nothing changes.

    Attributes:
        seed: Where it is set, each epoch of each process draws its random numbers from it, the rank and the epoch; with
            ``nnUNet_n_proc_DA=0`` a training then gives the same weights again, interrupted or not.
    """

    seed: int | None = None

    is_ddp: bool
    network: nn.Module
    oversample_foreground_percent: float
    current_epoch: int

    def __init__(
        self,
        plans: dict,  # type: ignore[type-arg] # nnU-Net inspects this signature and wants it as its own
        configuration: str,
        fold: int,
        dataset_json: dict,  # type: ignore[type-arg]
        device: torch.device = torch.device("cuda"),  # noqa: B008 - likewise
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._ranks = _ranks_of(self)
        if self.is_ddp:
            self.device = torch.device("cuda", self._ranks.local_rank) if device.type == "cuda" else device
            if device.type != "cuda":
                self.grad_scaler = None

    def initialize(self) -> None:
        """nnU-Net's, with a wrapper for CPUs and for several machines where there are several processes."""
        if not self.is_ddp:
            super().initialize()
            return
        # nnU-Net would wrap the network for the GPU of the rank's number, which only one machine has.
        with self._as_one_process():
            super().initialize()
        self._distribute()
        self.loss = self._build_loss()  # once more, as it sums over the processes

    def _distribute(self) -> None:
        # DistributedDataParallel waits for the gradient of each parameter that has them switched on.
        for parameter in self._unused_parameters():
            parameter.requires_grad_(False)
        self.network = DistributedDataParallel(
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network),  # type: ignore[no-untyped-call]
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
        )

    @contextmanager
    def _as_one_process(self) -> Iterator[None]:
        """Let nnU-Net do what it does for a network without wrapper."""
        several, self.is_ddp = self.is_ddp, False
        try:
            yield
        finally:
            self.is_ddp = several

    def _plain_network(self) -> STUNet:
        # Not by is_ddp: the optimizer is made before the network is wrapped.
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return cast("STUNet", network._orig_mod if isinstance(network, OptimizedModule) else network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Whether the network gives the logits of all levels, whatever it is wrapped in."""
        self._plain_network().decoder.deep_supervision = enabled

    def _build_loss(self) -> nn.Module:
        """nnU-Net's, with the coarsest level's weight 0 with several processes too, as it is with one."""
        loss: nn.Module = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper):
            weights = np.array(loss.weight_factors)
            weights[-1] = 0
            loss.weight_factors = tuple(weights / weights.sum())
        return loss

    def _unused_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the head whose loss weighs nothing, and which nnU-Net gives 1e-6 for DDP's sake."""
        if self.enable_deep_supervision:
            yield from self._plain_network().decoder.seg_layers[0].parameters()

    def _set_batch_size_and_oversample(self) -> None:
        whole = int(self.configuration_manager.batch_size)
        if self._ranks.size == 1:
            self.batch_size = whole
            return
        mine = share_of_batch(whole, self._ranks)
        # The samples that nnU-Net's loader would force to hold foreground, were it one for all.
        first_forced = round(whole * (1 - self.oversample_foreground_percent))
        self.batch_size = len(mine)
        self.oversample_foreground_percent = sum(i >= first_forced for i in mine) / len(mine)

    def on_epoch_start(self) -> None:
        """Also draw this epoch's random numbers from the seed."""
        super().on_epoch_start()
        if self.seed is not None:
            seed_everything(self.seed, self._ranks.rank, self.current_epoch)


def _ranks_of(trainer: nnUNetTrainer) -> Ranks:
    if not trainer.is_ddp:
        return Ranks()
    rank, size = dist.get_rank(), dist.get_world_size()
    if "LOCAL_RANK" in os.environ:
        ranks = Ranks.from_environment()
        if (ranks.rank, ranks.size) == (rank, size):
            return ranks
    # nnUNetv2_train -num_gpus tells its processes nothing but what the group knows; they are on one machine.
    return Ranks(rank, size, rank, size)
