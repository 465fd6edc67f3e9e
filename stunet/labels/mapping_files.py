"""YAML files in which users say which label is what."""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from stunet.errors import LabelError

__all__ = ["close_names", "load_mapping_file", "name_at", "refuse_mapping"]


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def load_mapping_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or something else than a mapping at the top.
    """
    try:
        # A SafeLoader: it makes plain values only.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise refuse_mapping(path, " ".join(str(error).split()), "a YAML file") from error
    if not isinstance(content, dict):
        raise refuse_mapping(path, f"{type(content).__name__} at the top", "a mapping")
    return content


def name_at(value: Any, place: str, path: str | os.PathLike[str]) -> str:
    """The name at a place of the file.

    Raises:
        LabelError: It is no text, or empty.
    """
    if not isinstance(value, str) or not value:
        # YAML takes yes, no, on, off and bare numbers for something else than text.
        raise refuse_mapping(path, f"{place} has {value!r}", "names as text", "Put the name between quotes.")
    return value


def close_names(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Up to ``n`` names that a mistyped one may have meant, the closest first."""
    return difflib.get_close_matches(name, list(known), n)


def refuse_mapping(
    path: str | os.PathLike[str], got: str, expected: str, remedy: str = "Correct the file."
) -> LabelError:
    """The error for a mapping file that cannot be used."""
    return LabelError("a mapping of labels that cannot be used", got=f"{path}: {got}", expected=expected, remedy=remedy)
