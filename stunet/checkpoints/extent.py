"""How much containers hold once they are written out."""

from __future__ import annotations

from typing import Any

__all__ = ["check_extent"]

_MAX_DEPTH = 50
_MAX_VALUES = 5_000_000


def check_extent(value: Any) -> None:
    """Check that containers, written out, stay of a bearable size.

    A few lists that each hold the one before twice are a small file and an endless text.

    Raises:
        ValueError: Nested too deeply, within themselves, or of too many values.
    """
    _extent(value, {}, 0)


def _extent(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Values within a value, counted as often as they are named, and how deeply they are nested."""
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return 1, 0
    if id(value) in known:
        n_values, height = known[id(value)]
    elif depth > _MAX_DEPTH:
        height = n_values = _MAX_DEPTH
    else:
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        inner = [_extent(item, known, depth + 1) for item in items]
        n_values, height = 1 + sum(n for n, _ in inner), 1 + max((h for _, h in inner), default=0)
        known[id(value)] = n_values, height
    if depth + height > _MAX_DEPTH:
        raise ValueError(f"containers nested more than {_MAX_DEPTH} deep")
    if n_values > _MAX_VALUES:
        raise ValueError(f"containers with more than {_MAX_VALUES} values")
    return n_values, height
