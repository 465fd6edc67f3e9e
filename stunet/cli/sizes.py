"""Sizes as they are typed: a name, or depth and width."""

from __future__ import annotations

from stunet.errors import UsageError
from stunet.network import N_STAGES, STUNetSize, find_size, size_of

__all__ = ["choose_size"]


def choose_size(name: str | None, depth: str | None, width: int | None) -> STUNetSize:
    """The size that the options stand for.

    Args:
        name: Value of ``--size``; ``base`` where nothing is given.
        depth: Value of ``--depth``: six comma-separated numbers, or one for all stages; 1 by default.
        width: Value of ``--width``; that of ``base`` by default.

    Raises:
        ArchitectureError: An unknown name, or an impossible depth or width.
        UsageError: A name together with a depth or width.
    """
    if depth is None and width is None:
        return find_size(name or "base")
    if name is not None:
        typed = [f"--{option} {value}" for option, value in (("depth", depth), ("width", width)) if value is not None]
        raise UsageError(
            "a size with a name and another one of your own",
            got=" ".join([f"--size {name}", *typed]),
            expected="--size alone, or --depth and --width",
            remedy="Leave --size out for a size of your own.",
        )
    try:
        blocks = [int(n) for n in (depth or "1").split(",")]
    except ValueError:
        blocks = []
    if len(blocks) == 1:
        blocks *= N_STAGES
    size = STUNetSize("custom", tuple(blocks), find_size("base").width if width is None else width)
    return size_of(size.features, size.depth)
