"""What is compared when the segmentations of a model are scored against the labels of another dataset.

A name mapping says which structures of the model stand for which structures of the dataset: YAML of the user, or one of
the published systems of this package, which say it by label value.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import msgspec
import yaml

from stunet.errors import LabelError, reading
from stunet.forms import Name, Names, decode, read_document
from stunet.labels.aliases import canonical_name, canonical_parts, match_names
from stunet.labels.annotations import AnnotationManifest
from stunet.labels.labels import Labels, list_vocabularies, load_vocabulary

_HEADER = """\
# Which structures of the model stand for each structure of the dataset: edit, and give it back with --label-map.
#   structure of the dataset: structure of the model, or [several of them]
#   name for the scores: {target: [structures of the dataset, taken together], source: [structures of the model]}
#   structure of the dataset: null        leaves it out
# Structures of the dataset that are not mentioned are compared with the model's of the same name, if there is one.
"""


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    target: Name | Names
    source: Name | list[Name] | None


@dataclass(frozen=True)
class MapEntry:
    """One entry of a name mapping."""

    name: str  # what the scores call it
    target: tuple[str, ...] | tuple[int, ...]  # structures of the dataset by name; in published systems label values
    source: tuple[str, ...]  # structures of the model by name; none where the entry is left out of the scores


@dataclass(frozen=True)
class LabelMap:
    """A name mapping."""

    entries: tuple[MapEntry, ...]
    is_system: bool  # whether it is a published system: complete, by label value, and with the names of a vocabulary
    origin: str  # the file, or the system's name


@dataclass(frozen=True)
class Comparison:
    """One structure that is scored."""

    name: str  # what the scores call it
    target: tuple[str, ...]  # structures of the dataset that it consists of
    source: tuple[str, ...]  # structures of the model that stand for it
    target_values: tuple[int, ...]  # values of the former in the dataset's label maps, in order
    source_values: tuple[int, ...]  # values of the latter in the model's segmentations, in order


@dataclass(frozen=True)
class LabelRelation:
    """How the labels of a model and of a dataset are related."""

    comparisons: tuple[Comparison, ...]  # what is scored, in the order of the dataset's label values
    left_out: Mapping[str, str]  # why each other structure of the dataset is not scored
    # names of the dataset that a published system takes, by their value, for a structure whose name is another; pairs
    # of both
    doubtful: tuple[tuple[str, str], ...]


@lru_cache
def _systems() -> Mapping[str, Any]:
    text = (files("stunet.labels") / "systems" / "direct_inference.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["systems"])


def list_label_systems() -> list[str]:
    """Return the names of the published label systems: those of STU-Net's direct evaluation (arXiv 2304.06716)."""
    return sorted(_systems())


def load_label_system(name: str) -> LabelMap:
    """Read a published label system.

    Args:
        name: Such as ``btcv``, or as published, ``Task011_BTCV``; case, hyphens and underscores make no difference.

    Raises:
        LabelError: There is none of this name.

    >>> load_label_system("Task011_BTCV").entries[0]
    MapEntry(name='spleen', target=(1,), source=('spleen',))
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for key, system in _systems().items():
        if plain(name) in (plain(key), plain(system["published_as"])):
            content = system["structures"].items()
            entries = (MapEntry(n, tuple(entry["values"]), tuple(entry["structures"])) for n, entry in content)
            return LabelMap(tuple(entries), is_system=True, origin=key)
    known = ", ".join(list_label_systems())
    raise LabelError(f"unknown label system {name!r}: give one of {known}, or a YAML file (--suggest-map proposes one)")


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Read a name mapping and check its form. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or of another form than :func:`suggest_label_map` writes.
    """
    with reading(path, "a name mapping that cannot be used", LabelError, "put each name between quotes"):
        content: dict[str, Any] = decode(read_document(path), dict[Name, Name | list[Name] | _Entry | None])

    def names(entry: str, listed: str | list[str] | None) -> tuple[str, ...]:
        found = () if listed is None else (listed,) if isinstance(listed, str) else tuple(listed)
        if twice := next((name for name in found if found.count(name) > 1), None):
            raise LabelError(f"{path}: {entry} has {twice!r} twice: list each structure once")
        return found

    entries = (
        MapEntry(name, names(name, entry.target), names(name, entry.source))
        if isinstance(entry, _Entry)
        else MapEntry(name, (name,), names(name, entry))
        for name, entry in content.items()
    )
    return LabelMap(tuple(entries), is_system=False, origin=os.fspath(path))


def suggest_label_map(source: Sequence[str], target: Sequence[str]) -> str:
    """Propose a name mapping as YAML: matches by name, structures by their parts, and what is left to decide."""
    matches = match_names(source, target)
    entries: dict[str, Any] = dict(matches)
    for name in [name for name, match in matches.items() if match is None]:
        entries[name] = list(_parts(name, source)) or None
    for whole in source:  # and the other way round: the dataset divides what the model does not
        parts = _parts(whole, [name for name, match in entries.items() if match is None])
        if parts and whole not in entries:
            entries = {name: match for name, match in entries.items() if name not in parts}
            entries[whole] = {"target": list(parts), "source": [whole]}
    lines = [_HEADER]
    for name, match in entries.items():
        close = ", ".join(difflib.get_close_matches(name, source))
        hint = f"  # close: {close}" if close else "  # the model has nothing of this name"
        flow = yaml.safe_dump(
            {name: match}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
        )
        lines.append(f"{flow.strip()[1:-1]}{hint if match is None else ''}\n")
    return "".join(lines)


def _parts(whole: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that together make up a structure; none where one is lacking."""
    by_canonical = {canonical_name(name): name for name in names}

    def find(canonical: str, *, itself: bool) -> tuple[str, ...]:
        if itself and canonical in by_canonical:
            return (by_canonical[canonical],)
        found = [find(part, itself=True) for part in canonical_parts(canonical)]
        return tuple(name for names in found for name in names) if found and all(found) else ()

    return find(canonical_name(whole), itself=False)


def structure_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the values of each structure in label maps, regions of several values among them.

    Raises:
        LabelError: Something else than whole numbers, or no structure.
    """
    values = Labels({"labels": labels}).structures
    if not values:
        raise LabelError(f"labels without structures ({', '.join(labels)}): list one in dataset.json")
    return values


def relate_labels(
    source_labels: Mapping[str, Any], target_labels: Mapping[str, Any], label_map: LabelMap | None = None
) -> LabelRelation:
    """Find what of a model can be compared with what of a dataset.

    Structures whose names mean the same (:func:`match_names`) are compared without a name mapping; one goes before
    that. A published system is complete: what it does not mention is not compared. It says structures of the dataset by
    value, and a value whose name in ``dataset.json`` is known to mean something else is an error.

    Raises:
        LabelError: A mapping that names unknown structures, or the same ones twice, a system that is another dataset's,
            or nothing that could be compared.

    >>> relation = relate_labels({"liver": 1, "spleen": 2}, {"background": 0, "Liver": 1, "tumour": 2})
    >>> [(c.name, c.source) for c in relation.comparisons], relation.left_out
    ([('Liver', ('liver',))], {'tumour': 'the model has nothing of this name'})
    """
    source, target = structure_values(source_labels), structure_values(target_labels)
    origin = label_map.origin if label_map is not None else "dataset.json"
    comparisons: list[Comparison] = []
    left_out: dict[str, str] = {}
    doubtful: list[tuple[str, str]] = []
    mentioned: set[str] = set()
    is_system = label_map is not None and label_map.is_system
    for entry in label_map.entries if label_map is not None else ():
        names, found, reason = (_bind_system_entry if is_system else _bind_entry)(entry, source, target, origin)
        mentioned.update(names)
        if not found or not names:
            left_out.update(dict.fromkeys(names or (entry.name,), reason))
            continue
        comparisons.append(Comparison(entry.name, names, found, _values_of(names, target), _values_of(found, source)))
        if is_system and not _names_agree(entry, names):
            doubtful.append((", ".join(names), entry.name))
    rest = [name for name in target if name not in mentioned]
    if is_system:
        left_out.update(dict.fromkeys(rest, f"no part of {origin}"))
    else:
        for name, match in match_names(list(source), rest).items():
            if match is None:
                left_out[name] = "the model has nothing of this name"
            else:
                comparisons.append(Comparison(name, (name,), (match,), target[name], source[match]))
    _check(comparisons, source, target, origin)
    ordered = tuple(sorted(comparisons, key=lambda comparison: comparison.target_values))
    return LabelRelation(ordered, left_out, tuple(doubtful))


_Values = Mapping[str, tuple[int, ...]]
_Bound = tuple[tuple[str, ...], tuple[str, ...], str]  # of the dataset, of the model, why there would be none


def _bind_entry(entry: MapEntry, source: _Values, target: _Values, path: str) -> _Bound:
    def resolve(name: str, known: _Values) -> str:
        match = match_names(list(known), [name])[name]
        if match is None:
            close = difflib.get_close_matches(name, known)
            hint = f"close names are {', '.join(close)}" if close else f"give one of {', '.join(known)}"
            raise LabelError(
                f"{path}: {entry.name} has the unknown structure {name!r}: {hint}; "
                "left sides name structures of the dataset, right sides those of the model"
            )
        return match

    names = tuple(resolve(str(name), target) for name in entry.target)
    return names, tuple(resolve(name, source) for name in entry.source), "left out by the label map"


def _bind_system_entry(entry: MapEntry, source: _Values, target: _Values, system: str) -> _Bound:
    names = tuple(name for name, values in target.items() if set(values) <= set(entry.target))
    if names and not _names_agree(entry, names) and _known_names() & set(map(canonical_name, names)):
        label = ", ".join(map(str, _values_of(names, target)))
        raise LabelError(
            f"label {label} is {', '.join(names)} in dataset.json, not {entry.name}, as {system} has it: "
            "leave --label-map out, or write one (--suggest-map -o map.yaml proposes it)"
        )
    matches = match_names(list(source), entry.source)
    lacking = [name for name, match in matches.items() if match is None]
    found = () if lacking else tuple(match for match in matches.values() if match is not None)
    return names, found, f"the model has no {', '.join(lacking)}" if names else "the dataset does not have it"


def _values_of(names: Iterable[str], values: _Values) -> tuple[int, ...]:
    return tuple(sorted({value for name in names for value in values[name]}))


def _names_agree(entry: MapEntry, names: Iterable[str]) -> bool:
    meant = {canonical_name(entry.name), *(canonical_name(name) for name in entry.source)}
    return bool(meant & set(map(canonical_name, names)))


@lru_cache
def _known_names() -> frozenset[str]:
    names = (name for vocabulary in list_vocabularies() for name in load_vocabulary(vocabulary).labels[1:])
    return frozenset(map(canonical_name, names))


def _check(comparisons: Sequence[Comparison], source: _Values, target: _Values, origin: str) -> None:
    if not comparisons:
        mine, theirs = (", ".join([*names][:6]) + (" …" if len(names) > 6 else "") for names in (target, source))
        raise LabelError(
            f"nothing to compare: the dataset has {mine}; the model {theirs}: "
            "say with --label-map what stands for what (--suggest-map -o map.yaml proposes a file to edit)"
        )
    for i, one in enumerate(comparisons):
        for other in comparisons[:i]:
            if one.name == other.name or one.target_values == other.target_values:
                both = " and ".join(f"{c.name} ({', '.join(c.target)})" for c in (other, one))
                raise LabelError(f"{origin} has {both}: give each entry its own name and structures of the dataset")


def observed_values(comparison: Comparison, manifest: AnnotationManifest, case: str) -> tuple[int, ...] | None:
    """Return the values that a comparison's structures have in the label map of a partially annotated case.

    Superclasses count: voxels of one are inside where all that it may stand for is, and a case that annotates it
    annotates its members as far as their union is asked for.

    Returns:
        The values in order, or None where the case does not annotate all of the comparison's structures.

    Raises:
        LabelError: The manifest says nothing about this case.
    """
    leaves = {leaf for value in comparison.target_values for leaf in manifest.leaves_of(value)}
    within = [value for value in manifest.annotated(case) if manifest.leaves_of(value) <= leaves]
    if {leaf for value in within for leaf in manifest.leaves_of(value)} != leaves:
        return None
    return tuple(sorted(leaves | {value for value in manifest.superclasses if manifest.leaves_of(value) <= leaves}))
