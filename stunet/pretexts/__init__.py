"""Self-supervised tasks: pre-training without labels. A new one is a file here and a line below."""

from __future__ import annotations

from typing import Any

from stunet.errors import SettingsError, UsageError
from stunet.pretexts.anatomy import Anatomy
from stunet.pretexts.contrastive import BYOL, SimCLR
from stunet.pretexts.jigsaw import Jigsaw, Rubik, RubikPlus
from stunet.pretexts.pcrl import PCRL
from stunet.pretexts.pretext import Pretext, PretextNetwork, Step, WithLabels
from stunet.pretexts.reconstruction import MAE, Autoencoder, Genesis
from stunet.pretexts.relative_location import RelativeLocation
from stunet.pretexts.rotation import Rotation
from stunet.pretexts.volume_fusion import VolumeFusion

PRETEXTS: dict[str, type[Pretext]] = {
    "rotation": Rotation,
    "relative-location": RelativeLocation,
    "jigsaw": Jigsaw,
    "rubik": Rubik,
    "rubik-plus": RubikPlus,
    "autoencoder": Autoencoder,
    "genesis": Genesis,
    "mae": MAE,
    "volume-fusion": VolumeFusion,
    "simclr": SimCLR,
    "byol": BYOL,
    "pcrl": PCRL,
    "anatomy": Anatomy,
}


class PretextOnly:
    """What the plans of a model that was trained without labels name in place of its network."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError("no labels have trained this model, so it predicts none: fine-tune it first (stunet finetune)")


def find_pretext(name: str) -> type[Pretext]:
    """Return the task with this name."""
    if name not in PRETEXTS:
        raise SettingsError(f"no pretext {name!r}: choose one of {', '.join(PRETEXTS)}")
    return PRETEXTS[name]
