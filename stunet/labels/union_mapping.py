"""Mapping files of unions: YAML that says which structure of a union each label of a source is."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stunet.errors import LabelError

__all__ = ["UnionMapping", "dump_mapping", "read_mapping", "refuse_mapping"]

_KEYS = ("sources", "superclasses")
_HEADER = """\
# Which structure of the union each label of a source is: edit, and give it back with --mapping.
# Labels that are left out keep the name that they get without this file. "background" drops a label, as if its voxels
# were background; "ignore" leaves its voxels out of training.
# superclasses: structures that stand for others, for sources that do not tell these apart. Where this key is present,
# it holds all of them; where it is absent, they are found by their names.
"""


@dataclass(frozen=True)
class UnionMapping:
    """The content of a mapping file.

    Attributes:
        sources: Structure of the union by label, by the source's name or id as it stands in the file.
        superclasses: Members by superclass, superclasses among them where they are nested; None where the file does
            not speak of them.
        path: The file.
    """

    sources: Mapping[str | int, Mapping[str, str]]
    superclasses: Mapping[str, tuple[str, ...]] | None
    path: str


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_mapping(path: str | os.PathLike[str]) -> UnionMapping:
    """Read a mapping file and check its form. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or of another form than :func:`dump_mapping` writes.
    """
    try:
        # A SafeLoader: it makes plain values only.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise refuse_mapping(path, " ".join(str(error).split()), "a YAML file") from error
    if not isinstance(content, dict):
        raise refuse_mapping(path, f"{type(content).__name__} at the top", f"a mapping with {' and '.join(_KEYS)}")
    unknown = next((key for key in content if key not in _KEYS), None)
    if unknown is not None:
        raise refuse_mapping(path, f"unknown key {unknown!r}", f"only the keys {' and '.join(_KEYS)}")
    sources = _mapping_at("sources", content.get("sources"), path)
    superclasses = None
    if "superclasses" in content:
        found = _mapping_at("superclasses", content["superclasses"], path)
        superclasses = {_name(n, "superclasses", path): _members(n, members, path) for n, members in found.items()}
    return UnionMapping({key: _labels(key, labels, path) for key, labels in sources.items()}, superclasses, str(path))


def _mapping_at(place: str, content: Any, path: str | os.PathLike[str]) -> dict[Any, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise refuse_mapping(path, f"{place} is {type(content).__name__}", f"{place} as a mapping")
    return content


def _labels(source: Any, labels: Any, path: str | os.PathLike[str]) -> dict[str, str]:
    if isinstance(source, bool) or not isinstance(source, str | int):
        raise refuse_mapping(path, f"a source named {source!r}", "ids or names of datasets")
    place = f"sources, {source}"
    names = {}
    for label, structure in _mapping_at(place, labels, path).items():
        if isinstance(structure, list):
            raise refuse_mapping(
                path,
                f"{place}, {label} has a list",
                "one structure for each label",
                "Give it a name of its own, and list under superclasses what that name stands for.",
            )
        names[_name(label, place, path)] = _name(structure, f"{place}, {label}", path)
    return names


def _members(name: Any, members: Any, path: str | os.PathLike[str]) -> tuple[str, ...]:
    place = f"superclasses, {name}"
    if not isinstance(members, list):
        raise refuse_mapping(path, f"{place} is {type(members).__name__}", "a list of structures")
    return tuple(_name(member, place, path) for member in members)


def _name(value: Any, place: str, path: str | os.PathLike[str]) -> str:
    if not isinstance(value, str) or not value:
        # YAML takes yes, no, on, off and bare numbers for something else than text.
        raise refuse_mapping(path, f"{place} has {value!r}", "names as text", "Put the name between quotes.")
    return value


def dump_mapping(mapping: Mapping[str, Mapping[str, str]], superclasses: Mapping[str, tuple[str, ...]]) -> str:
    """A mapping as YAML that :func:`read_mapping` reads.

    Args:
        mapping: Structure by label, by source.
        superclasses: Members by superclass.
    """
    content = {
        "sources": {source: dict(labels) for source, labels in mapping.items()},
        "superclasses": {name: list(members) for name, members in superclasses.items()},
    }
    return f"{_HEADER}{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)}"


def refuse_mapping(
    path: str | os.PathLike[str], got: str, expected: str, remedy: str = "Correct the file."
) -> LabelError:
    """The error for a mapping file that cannot be used."""
    return LabelError("a mapping of labels that cannot be used", got=f"{path}: {got}", expected=expected, remedy=remedy)
