"""One trainer and its collaborators: partial labels, accumulation, checkpoints, sharding, the optimizer."""

from stunet.training.checkpoints import set_aside
from stunet.training.distributed import Ranks, seed_everything, share_of_batch
from stunet.training.trainer import BaseSTUNetTrainer
