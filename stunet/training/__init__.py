"""One trainer and its collaborators: partial labels, accumulation, checkpoints, sharding, the optimizer."""

from stunet.training.distributed import Ranks, share_of_batch
from stunet.training.trainer import BaseSTUNetTrainer
