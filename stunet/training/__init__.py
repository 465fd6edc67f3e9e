"""One trainer and its collaborators: partial labels, accumulation, checkpoints, sharding, the optimizer."""

from stunet.training.trainer import BaseSTUNetTrainer
