"""YAML files of users', read without running anything in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["UnreadableYAMLError", "read_yaml"]


_MAX_BYTES = 2**20


class UnreadableYAMLError(ValueError):
    """Why a file is no YAML, in one line. Callers turn it into an error that says what the file is for."""


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence, and aliases multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for key, n in Counter(keys).items() if n > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        UnreadableYAMLError: Missing, no text, no YAML, too large, an alias, or a key twice in one mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {_MAX_BYTES}")
        # A SafeLoader: it makes plain values only.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except (
        OSError,
        yaml.YAMLError,
        ArithmeticError,
        LookupError,
        AttributeError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:
        raise UnreadableYAMLError(" ".join(str(error).split())) from error
