"""YAML and JSON files that users write, decoded into what a type declares, with the place of what is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from stunet.errors import FormError

Name = Annotated[str, msgspec.Meta(min_length=1)]
Names = Annotated[list[Name], msgspec.Meta(min_length=1)]

_MAX_YAML_LENGTH = 2**20  # which takes PyYAML a minute


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence, and aliases multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        _unique([(self.construct_object(key), value) for key, value in node.value])
        return dict(super().construct_mapping(node, deep))


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, n in Counter(key for key, _ in pairs).items():
        if n > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_document(path: str | os.PathLike[str]) -> Any:
    """Read a JSON or YAML file as plain values; what is JSON counts as that, whatever its name. Nothing in it is run.

    Raises:
        FormError: Missing, no text, of another format, too large, an alias, or a key twice in one mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            if path.suffix == ".json":
                raise
        if len(text) > _MAX_YAML_LENGTH:
            raise ValueError(f"{len(text)} characters that are no JSON; of YAML at most {_MAX_YAML_LENGTH} are read")
        # A SafeLoader: it makes plain values only.
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506
    except (OSError, yaml.YAMLError, ArithmeticError, LookupError, AttributeError, ValueError, TypeError) as error:
        raise FormError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise FormError("nested too deeply") from error


def decode(content: Any, form: Any, place: str = "") -> Any:
    """Turn plain values into what a type declares.

    msgspec names the fields of structures and the places of lists; the keys of mappings are named here.

    >>> decode({"liver": 1, "kidney": "2"}, dict[str, int])
    Traceback (most recent call last):
    stunet.errors.FormError: ['kidney']: Expected int, got str

    Raises:
        FormError: The values are of another form; names the place and what was expected there.
    """
    if isinstance(content, dict):
        for arm in get_args(form) if get_origin(form) in (Union, UnionType) else (form,):
            if get_origin(arm) is dict:
                for key, value in content.items():
                    decode(key, get_args(arm)[0], f"a key of {place}" if place else "a key")
                    decode(value, get_args(arm)[1], f"{place}[{key!r}]")
            elif isinstance(arm, type) and issubclass(arm, msgspec.Struct):
                for name, field in get_type_hints(arm, include_extras=True).items():
                    if name in content:
                        decode(content[name], field, f"{place}.{name}" if place else name)
    try:
        return msgspec.convert(content, form)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at $")
        raise FormError(f"{place}{path}: {problem}".removeprefix(": ")) from error
