"""What the trainers in ``trainers/`` are made of."""

from stunet.training.annotations import CaseAnnotations, Counts, count_voxels
from stunet.training.partial_labels import PartialLabelTrainer
from stunet.training.strategies import GroupSchedule, ParameterGroup, freeze_others, parameter_groups
from stunet.training.summary import mask_summary
from stunet.training.trainer import BaseSTUNetTrainer

__all__ = [
    "BaseSTUNetTrainer",
    "CaseAnnotations",
    "Counts",
    "GroupSchedule",
    "ParameterGroup",
    "PartialLabelTrainer",
    "count_voxels",
    "freeze_others",
    "mask_summary",
    "parameter_groups",
]
