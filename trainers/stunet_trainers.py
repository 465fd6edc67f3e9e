"""The trainers that ``nnUNetv2_train -tr`` finds here once ``nnUNet_extTrainer`` points to this folder.

Thin on purpose: nnU-Net imports this file as a top-level module and forgets it again, so all that does something lives
in ``stunet.training``. ``STUNetTrainer`` trains a STU-Net of the size that the plans have, ``base`` with ordinary
plans, for 1000 epochs with learning rate 0.01; ``STUNetTrainer_small`` to ``STUNetTrainer_huge`` fix the size. Further
names follow the published checkpoints: ``_ft`` fine-tunes with a tenth of the learning rate, ``_ep1k``, ``_ep2k`` and
``_ep4k`` train for 1000, 2000 and 4000 epochs; ``_pretext`` trains without labels, by the task
that the plans name; ``_pretrain`` trains as published on many structures, for 4000 epochs
and with nearest labels in augmentation. All of them respect what each case annotates. What the plans' ``"stunet"``
block sets goes before what a name stands for.
"""

from stunet.sizes import TRAINERS
from stunet.training import BaseSTUNetTrainer, PretextTrainer

for _name, (_size, _settings) in TRAINERS.items():
    _base = PretextTrainer if _name.endswith("_pretext") else BaseSTUNetTrainer
    globals()[_name] = type(_name, (_base,), {"size": _size, "default_settings": _settings})
