"""One trainer and its collaborators: partial labels, checkpoints, sharding, the optimizer."""

from stunet.training.pretext import PretextTrainer
from stunet.training.trainer import BaseSTUNetTrainer
