"""The published sizes of STU-Net, and custom ones. Imports no PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stunet.errors import ArchitectureError

N_STAGES = 6
"""STU-Net always has six resolution stages."""


@dataclass(frozen=True)
class STUNetSize:
    """Depth and width of a STU-Net, which it scales together (arXiv 2304.06716, section 3.2).

    Attributes:
        name: Name for plans files and messages.
        depth: Residual blocks in each of the six encoder stages. The decoder mirrors the first five.
        width: Channels of the first stage. They double with every stage up to 16 times the width.

    Raises:
        ArchitectureError: Not six depths, or a depth or width that is not a positive whole number.
    """

    name: str
    depth: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        if len(self.depth) != N_STAGES or any(type(n) is not int or n < 1 for n in self.depth):
            raise ArchitectureError(f"impossible depth {list(self.depth)}: give {N_STAGES} as in 1,1,2,2,2,2")
        if type(self.width) is not int or self.width < 1:
            raise ArchitectureError(f"impossible width {self.width}: give a positive whole number, for example 24")

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each of the six stages."""
        return tuple(self.width * multiplier for multiplier in (1, 2, 4, 8, 16, 16))


#: The four published sizes (arXiv 2304.06716, table 4). Parameters are counted with 105 outputs.
SIZES: dict[str, STUNetSize] = {
    "small": STUNetSize("small", (1,) * N_STAGES, 16),  # 14.6 M parameters
    "base": STUNetSize("base", (1,) * N_STAGES, 32),  # 58.3 M
    "large": STUNetSize("large", (2,) * N_STAGES, 64),  # 440.3 M
    "huge": STUNetSize("huge", (3,) * N_STAGES, 96),  # 1457.3 M
}

_TRAINED_AS: dict[str, dict[str, Any]] = {
    "": {},
    "_ft": {"initial_lr": 1e-3},
    "_pretext": {},
    "_pretrain": {"num_epochs": 4000, "nearest_labels": True},
    "_ep1k": {"num_epochs": 1000},
    "_ep2k": {"num_epochs": 2000},
    "_ep4k": {"num_epochs": 4000},
}
#: Size, None for that of the plans, and settings that the name of each trainer in ``trainers/`` stands for.
TRAINERS = {
    f"STUNetTrainer{f'_{size}' if size else ''}{use}": (size, settings)
    for size in (None, *SIZES)
    for use, settings in _TRAINED_AS.items()
}


def find_size(name: str) -> STUNetSize:
    """Look up a published size: ``small``, ``base``, ``large`` or ``huge``.

    Raises:
        ArchitectureError: No published size has this name.
    """
    if name not in SIZES:
        raise ArchitectureError(f"unknown size {name}: choose one of {', '.join(SIZES)}, or give --depth and --width")
    return SIZES[name]


def size_of(features_per_stage: Sequence[int], n_blocks_per_stage: Sequence[int]) -> STUNetSize:
    """Return the size with these channels of each stage and blocks of each encoder stage; a published one by its name.

    Raises:
        ArchitectureError: The channels do not grow as STU-Net's do.
    """
    size = STUNetSize("custom", tuple(n_blocks_per_stage), features_per_stage[0])
    if size.features != tuple(features_per_stage):
        got = f"{list(features_per_stage)} are channels that no STU-Net has"
        raise ArchitectureError(f"{got}: {list(size.features)} for width {size.width}; use `stunet plan`")
    for published in SIZES.values():
        if (published.depth, published.width) == (size.depth, size.width):
            return published
    depth = "".join(map(str, size.depth)) if max(size.depth) < 10 else "-".join(map(str, size.depth))
    return STUNetSize(f"d{depth}w{size.width}", size.depth, size.width)
