"""One trainer and its collaborators: partial labels, checkpoints, sharding, the optimizer."""

from stunet.training.trainer import BaseSTUNetTrainer
