"""YAML files of users', read without running anything in them."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["UnreadableYAMLError", "read_yaml"]


class UnreadableYAMLError(ValueError):
    """Why a file is no YAML, in one line. Callers turn it into an error that says what the file is for."""


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        UnreadableYAMLError: Missing, no text, no YAML, or a key twice in one mapping.
    """
    try:
        # A SafeLoader: it makes plain values only.
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UnreadableYAMLError(" ".join(str(error).split())) from error
