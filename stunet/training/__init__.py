"""What the trainers in ``trainers/`` are made of."""

from stunet.training.strategies import GroupSchedule, ParameterGroup, freeze_others, parameter_groups
from stunet.training.trainer import BaseSTUNetTrainer

__all__ = ["BaseSTUNetTrainer", "GroupSchedule", "ParameterGroup", "freeze_others", "parameter_groups"]
