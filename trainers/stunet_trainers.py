"""The trainers that ``nnUNetv2_train -tr`` finds here once ``nnUNet_extTrainer`` points to this folder.

Thin on purpose: nnU-Net imports this file as a top-level module and forgets it again, so all that does something lives
in ``stunet.training``. Names follow the published checkpoints: ``_ft`` fine-tunes with a tenth of the learning rate,
``_ep1k``, ``_ep2k`` and ``_ep4k`` train for 1000, 2000 and 4000 epochs; ``_pretrain`` trains on many structures. All of
them respect what each case annotates. What the plans' ``"stunet"`` block sets goes before what a name stands for.
"""

from stunet.training import BaseSTUNetTrainer


class STUNetTrainer(BaseSTUNetTrainer):
    """STU-Net of the size that the plans have, ``base`` with ordinary plans; 1000 epochs, learning rate 0.01."""


class STUNetTrainer_ft(STUNetTrainer):
    """Fine-tunes: learning rate 0.001."""

    default_settings = {"initial_lr": 1e-3}


class STUNetTrainer_pretrain(STUNetTrainer):
    """Pre-trains as published: 4000 epochs, nearest labels in augmentation, as there are many structures."""

    default_settings = {"num_epochs": 4000, "nearest_labels": True}


class STUNetTrainer_small(STUNetTrainer):
    """STU-Net small, 14.6 million parameters."""

    size = "small"


class STUNetTrainer_small_ft(STUNetTrainer_ft):
    size = "small"


class STUNetTrainer_small_pretrain(STUNetTrainer_pretrain):
    size = "small"


class STUNetTrainer_small_ep1k(STUNetTrainer_small):
    default_settings = {"num_epochs": 1000}


class STUNetTrainer_small_ep2k(STUNetTrainer_small):
    default_settings = {"num_epochs": 2000}


class STUNetTrainer_small_ep4k(STUNetTrainer_small):
    default_settings = {"num_epochs": 4000}


class STUNetTrainer_base(STUNetTrainer):
    """STU-Net base, 58.3 million parameters."""

    size = "base"


class STUNetTrainer_base_ft(STUNetTrainer_ft):
    size = "base"


class STUNetTrainer_base_pretrain(STUNetTrainer_pretrain):
    size = "base"


class STUNetTrainer_base_ep1k(STUNetTrainer_base):
    default_settings = {"num_epochs": 1000}


class STUNetTrainer_base_ep2k(STUNetTrainer_base):
    default_settings = {"num_epochs": 2000}


class STUNetTrainer_base_ep4k(STUNetTrainer_base):
    default_settings = {"num_epochs": 4000}


class STUNetTrainer_large(STUNetTrainer):
    """STU-Net large, 440 million parameters."""

    size = "large"


class STUNetTrainer_large_ft(STUNetTrainer_ft):
    size = "large"


class STUNetTrainer_large_pretrain(STUNetTrainer_pretrain):
    size = "large"


class STUNetTrainer_large_ep1k(STUNetTrainer_large):
    default_settings = {"num_epochs": 1000}


class STUNetTrainer_large_ep2k(STUNetTrainer_large):
    default_settings = {"num_epochs": 2000}


class STUNetTrainer_large_ep4k(STUNetTrainer_large):
    default_settings = {"num_epochs": 4000}


class STUNetTrainer_huge(STUNetTrainer):
    """STU-Net huge, 1457 million parameters."""

    size = "huge"


class STUNetTrainer_huge_ft(STUNetTrainer_ft):
    size = "huge"


class STUNetTrainer_huge_pretrain(STUNetTrainer_pretrain):
    size = "huge"


class STUNetTrainer_huge_ep1k(STUNetTrainer_huge):
    default_settings = {"num_epochs": 1000}


class STUNetTrainer_huge_ep2k(STUNetTrainer_huge):
    default_settings = {"num_epochs": 2000}


class STUNetTrainer_huge_ep4k(STUNetTrainer_huge):
    default_settings = {"num_epochs": 4000}
