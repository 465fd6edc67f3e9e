"""YAML files in which users say which label is what."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

from stunet.errors import LabelError
from stunet.yaml_files import UnreadableYAMLError, read_yaml

__all__ = ["close_names", "load_mapping_file", "name_at", "refuse_mapping"]


def load_mapping_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or something else than a mapping at the top.
    """
    try:
        content = read_yaml(path)
    except UnreadableYAMLError as error:
        raise refuse_mapping(path, str(error), "a YAML file") from error
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
