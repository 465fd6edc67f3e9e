"""What the trainers in ``trainers/`` are made of."""

from stunet.training.accumulation import AccumulatingTrainer
from stunet.training.annotations import CaseAnnotations, Counts, count_voxels
from stunet.training.distributed import DistributedTrainer, seed_everything
from stunet.training.label_augmentation import LocalLabelTransform
from stunet.training.launch import TrainRequest, check_request, train
from stunet.training.optimizer import BF16MomentumSGD, round_to_bfloat16, set_kernel
from stunet.training.partial_labels import PartialLabelTrainer
from stunet.training.ranks import Ranks, check_agreement, check_shared_folder, process_group, share_of_batch
from stunet.training.strategies import GroupSchedule, ParameterGroup, freeze_others, parameter_groups
from stunet.training.summary import mask_summary
from stunet.training.trainer import BaseSTUNetTrainer

__all__ = [
    "AccumulatingTrainer",
    "BF16MomentumSGD",
    "BaseSTUNetTrainer",
    "CaseAnnotations",
    "Counts",
    "DistributedTrainer",
    "GroupSchedule",
    "LocalLabelTransform",
    "ParameterGroup",
    "PartialLabelTrainer",
    "Ranks",
    "TrainRequest",
    "check_agreement",
    "check_request",
    "check_shared_folder",
    "count_voxels",
    "freeze_others",
    "mask_summary",
    "parameter_groups",
    "process_group",
    "round_to_bfloat16",
    "seed_everything",
    "set_kernel",
    "share_of_batch",
    "train",
]
