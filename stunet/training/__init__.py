"""What the trainers in ``trainers/`` are made of."""

from stunet.training.trainer import BaseSTUNetTrainer

__all__ = ["BaseSTUNetTrainer"]
