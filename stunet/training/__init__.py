"""One trainer and its collaborators: partial labels, accumulation, checkpoints, sharding, the optimizer."""

from stunet.training.distributed import Ranks, check_agreement, check_shared_folder, process_group, share_of_batch
from stunet.training.label_augmentation import LocalLabelTransform
from stunet.training.launch import check_processes, train
from stunet.training.optimizer import (
    BF16MomentumSGD,
    GroupSchedule,
    ParameterGroup,
    freeze_others,
    parameter_groups,
    round_to_bfloat16,
    set_kernel,
)
from stunet.training.partial_labels import PartialLabels, count_voxels, mask_summary
from stunet.training.trainer import BaseSTUNetTrainer

__all__ = [
    "BF16MomentumSGD",
    "BaseSTUNetTrainer",
    "GroupSchedule",
    "LocalLabelTransform",
    "ParameterGroup",
    "PartialLabels",
    "Ranks",
    "check_agreement",
    "check_processes",
    "check_shared_folder",
    "count_voxels",
    "freeze_others",
    "mask_summary",
    "parameter_groups",
    "process_group",
    "round_to_bfloat16",
    "set_kernel",
    "share_of_batch",
    "train",
]
