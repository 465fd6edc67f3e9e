"""Label maps of direct evaluation: which structures of a model stand for which structures of a dataset.

A label map is YAML, or one of the published systems of this package, which say it by label value.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from stunet.errors import LabelError
from stunet.labels.aliases import canonical_name, canonical_parts, match_names
from stunet.labels.mapping_files import close_names, load_mapping_file, name_at, refuse_mapping

__all__ = ["LabelMap", "MapEntry", "list_label_systems", "load_label_system", "read_label_map", "suggest_label_map"]

_HEADER = """\
# Which structures of the model stand for each structure of the dataset: edit, and give it back with --label-map.
#   structure of the dataset: structure of the model, or [several of them]
#   name for the scores: {target: [structures of the dataset, taken together], source: [structures of the model]}
#   structure of the dataset: null        leaves it out
# Structures of the dataset that are not mentioned are compared with the model's of the same name, if there is one.
"""


@dataclass(frozen=True)
class MapEntry:
    """One entry of a label map.

    Attributes:
        name: What the scores call it.
        target: Structures of the dataset by name; in published systems label values.
        source: Structures of the model by name; none where the entry is left out of the scores.
    """

    name: str
    target: tuple[str, ...] | tuple[int, ...]
    source: tuple[str, ...]


@dataclass(frozen=True)
class LabelMap:
    """A label map.

    Attributes:
        entries: Its entries.
        is_system: Whether it is a published system: whole, by label value, and with the names of another vocabulary.
        origin: The file, or the system's name.
    """

    entries: tuple[MapEntry, ...]
    is_system: bool
    origin: str


@lru_cache(maxsize=1)
def _systems() -> Mapping[str, Any]:
    text = (files("stunet.labels") / "systems" / "direct_inference.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["systems"])


def list_label_systems() -> list[str]:
    """Names of the published label systems: those of STU-Net's direct evaluation (arXiv 2304.06716)."""
    return sorted(_systems())


def load_label_system(name: str) -> LabelMap:
    """A published label system.

    Args:
        name: Such as ``btcv``, or as published, ``Task011_BTCV``; case, hyphens and underscores make no difference.

    Raises:
        LabelError: There is none of this name.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for key, system in _systems().items():
        if plain(name) in (plain(key), plain(system["published_as"])):
            entries = (
                MapEntry(structure, tuple(entry["values"]), tuple(entry["structures"]))
                for structure, entry in system["structures"].items()
            )
            return LabelMap(tuple(entries), is_system=True, origin=key)
    raise LabelError(
        "unknown label system",
        got=name,
        expected=f"one of {', '.join(list_label_systems())}, or a YAML file that exists",
        remedy="Choose one of these, or write a label map: --suggest-map -o map.yaml proposes one.",
    )


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Read a label map and check its form. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or of another form than :func:`suggest_label_map` writes.
    """
    content = load_mapping_file(path)
    entries = [_read_entry(name_at(name, "the top", path), entry, path) for name, entry in content.items()]
    return LabelMap(tuple(entries), is_system=False, origin=os.fspath(path))


def _read_entry(name: str, entry: Any, path: str | os.PathLike[str]) -> MapEntry:
    if not isinstance(entry, dict):
        return MapEntry(name, (name,), _read_names(name, entry, path))
    if set(entry) != {"target", "source"}:
        got = f"{name} has {', '.join(map(str, entry)) or 'nothing'}"
        raise refuse_mapping(path, got, "target and source, both, where an entry is a mapping")
    target = _read_names(f"{name}, target", entry["target"], path)
    if not target:
        raise refuse_mapping(path, f"{name}, target is empty", "structures of the dataset")
    return MapEntry(name, target, _read_names(f"{name}, source", entry["source"], path))


def _read_names(place: str, value: Any, path: str | os.PathLike[str]) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    names = tuple(name_at(name, place, path) for name in listed)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refuse_mapping(path, f"{place} has {twice!r} twice", "each structure once")
    return names


def suggest_label_map(source: Sequence[str], target: Sequence[str]) -> str:
    """A label map as YAML: matches by name, wholes by their parts, and what is left for people to decide.

    Args:
        source: Structures of the model, without background and ignore label.
        target: Structures of the dataset, likewise.
    """
    matches = match_names(source, target)
    entries: dict[str, Any] = dict(matches)
    for name in [name for name, match in matches.items() if match is None]:
        entries[name] = list(_pieces(name, source)) or None
    for whole in source:  # and the other way round: the dataset divides what the model does not
        pieces = _pieces(whole, [name for name, match in entries.items() if match is None])
        if pieces and whole not in entries:
            entries = {name: match for name, match in entries.items() if name not in pieces}
            entries[whole] = {"target": list(pieces), "source": [whole]}
    lines = [_HEADER]
    for name, match in entries.items():
        close = close_names(name, source, 3) if match is None else []
        hint = f"  # close: {', '.join(close)}" if close else "  # the model has nothing of this name"
        flow = yaml.safe_dump(
            {name: match}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
        )
        lines.append(f"{flow.strip()[1:-1]}{hint if match is None else ''}\n")
    return "".join(lines)


def _pieces(whole: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that together make up a structure; none where one is lacking."""
    by_canonical = {canonical_name(name): name for name in names}

    def find(canonical: str, *, itself: bool) -> tuple[str, ...]:
        if itself and canonical in by_canonical:
            return (by_canonical[canonical],)
        found = [find(part, itself=True) for part in canonical_parts(canonical)]
        return tuple(name for names in found for name in names) if found and all(found) else ()

    return find(canonical_name(whole), itself=False)
