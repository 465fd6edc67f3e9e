"""Sizes as they are typed: a name, or depth and width."""

from __future__ import annotations

from stunet.errors import ArchitectureError
from stunet.network import STUNetSize, find_size, size_of

__all__ = ["choose_size"]


def choose_size(name: str | None, depth: str | None, width: int | None) -> STUNetSize:
    """The size that the options stand for.

    Args:
        name: Value of ``--size``.
        depth: Value of ``--depth``: six comma-separated numbers, or one for all stages; 1 by default.
        width: Value of ``--width``; that of ``base`` by default.

    Raises:
        ArchitectureError: An unknown name, an impossible depth or width, or a name together with a depth or width.
    """
    if depth is None and width is None:
        return find_size(name or "base")
    if name is not None:
        raise ArchitectureError(
            "a size with a name and another one of your own",
            got=f"--size {name} with --depth {depth} --width {width}",
            expected="--size alone, or --depth and --width",
            remedy="Leave --size out for a size of your own.",
        )
    try:
        blocks = [int(n) for n in (depth or "1").split(",")]
    except ValueError:
        blocks = []
    if len(blocks) == 1:
        blocks *= 6
    base = find_size("base")
    size = STUNetSize("custom", tuple(blocks), base.width if width is None else width)
    return size_of(size.features, size.depth)
