"""Mapping files of unions: YAML that says which structure of a union each label of a source is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stunet.labels.mapping_files import load_mapping_file, name_at, refuse_mapping

__all__ = ["UnionMapping", "dump_mapping", "read_mapping"]

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


def read_mapping(path: str | os.PathLike[str]) -> UnionMapping:
    """Read a mapping file and check its form. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or of another form than :func:`dump_mapping` writes.
    """
    content = load_mapping_file(path)
    unknown = next((key for key in content if key not in _KEYS), None)
    if unknown is not None:
        raise refuse_mapping(path, f"unknown key {unknown!r}", f"only the keys {' and '.join(_KEYS)}")
    sources = _mapping_at("sources", content.get("sources"), path)
    superclasses = None
    if "superclasses" in content:
        found = _mapping_at("superclasses", content["superclasses"], path)
        superclasses = {name_at(n, "superclasses", path): _members(n, members, path) for n, members in found.items()}
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
        names[name_at(label, place, path)] = name_at(structure, f"{place}, {label}", path)
    return names


def _members(name: Any, members: Any, path: str | os.PathLike[str]) -> tuple[str, ...]:
    place = f"superclasses, {name}"
    if not isinstance(members, list):
        raise refuse_mapping(path, f"{place} is {type(members).__name__}", "a list of structures")
    return tuple(name_at(member, place, path) for member in members)


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
