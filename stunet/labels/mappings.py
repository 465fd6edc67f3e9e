"""Name mappings: which structures of one dataset or model stand for which of another.

First the labels of several datasets as those of one (``stunet import union``), then the segmentations of a model beside
the labels of another dataset (``stunet evaluate``). A mapping is found by name, or is YAML of the user, or one of the
published systems of this package, which say it by label value.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import msgspec
import yaml

from stunet.environment import did_you_mean
from stunet.errors import LabelError, reading
from stunet.files import Name, Names, decode, read_document
from stunet.labels import labels as naming
from stunet.labels.annotations import AnnotationManifest

# Labels of a union ----------------------------------------------------------------------------------------------------

_NO_STRUCTURES = {naming.BACKGROUND, naming.IGNORE}
_UNION_HEADER = """\
# Which structure of the union each label of a source is: edit, and give it back with --mapping.
# Labels that are left out keep the name that they get without this file. "background" drops a label, as if its voxels
# were background; "ignore" leaves its voxels out of training.
# superclasses: structures that stand for others, for sources that do not tell these apart. Where this key is present,
# it holds all of them; where it is absent, they are found by their names.
"""


_REMEDY = "say what they are under superclasses of a mapping file (--mapping)"


class UnionMapping(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a mapping file."""

    # structure of the union by label, by the source's name or id as it stands in the file
    sources: dict[int | Name, dict[Name, Name] | None]
    superclasses: dict[Name, list[Name]] | None  # members by superclass; None where the file does not mention them
    path: str


def read_mapping(path: str | os.PathLike[str]) -> UnionMapping:
    """Read a mapping file and check its form. Nothing in it is run.

    Raises:
        LabelError: Missing, not YAML, a key twice, or of another form than :func:`dump_mapping` writes.
    """
    remedy = "put names between quotes, one for each label, and list under superclasses what it stands for"
    with reading(path, "a mapping file that cannot be used", LabelError, remedy):
        content = read_document(path)
        if isinstance(content, dict):
            superclasses = content["superclasses"] or {} if "superclasses" in content else None
            content |= {"sources": content.get("sources") or {}, "superclasses": superclasses, "path": str(path)}
        mapping: UnionMapping = decode(content, UnionMapping)
    return mapping


def dump_mapping(mapping: Mapping[str, Mapping[str, str]], superclasses: Mapping[str, tuple[str, ...]]) -> str:
    """Write a mapping as YAML that :func:`read_mapping` reads."""
    content = {
        "sources": {source: dict(labels) for source, labels in mapping.items()},
        "superclasses": {name: list(members) for name, members in superclasses.items()},
    }
    return f"{_UNION_HEADER}{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)}"


@dataclass(frozen=True)
class LabelUnion:
    """The labels of a union of datasets."""

    leaves: tuple[str, ...]  # structures that stand for themselves, in the order of their label values, from 1
    # structures that stand for several leaves, and these; their label values follow the leaves'
    superclasses: Mapping[str, tuple[str, ...]]
    # for each source by name, the structure that each of its labels is, or background or ignore
    mapping: Mapping[str, Mapping[str, str]]
    has_ignore: bool  # whether there is an ignore label; it has the highest value

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label values in the form of nnU-Net's ``dataset.json``."""
        last = [naming.IGNORE] if self.has_ignore else []
        return {name: value for value, name in enumerate([naming.BACKGROUND, *self.leaves, *self.superclasses, *last])}

    @cached_property
    def doubtful(self) -> list[tuple[str, str]]:
        """Pairs of structures of which one may contain, or be, the other, judged by the words of their names.

        Two labels of one source are not doubtful: it tells them apart.
        """
        together = [set(labels.values()) for labels in self.mapping.values()]
        words = {name: set(naming.canonical_name(name).split("_")) for name in (*self.leaves, *self.superclasses)}
        leaves = {name: {*self.superclasses.get(name, (name,))} for name in words}
        return [
            (one, other)
            for one in words
            for other in words
            if (words[one] < words[other] or (words[one] == words[other] and one < other))
            and not (leaves[one] <= leaves[other] or leaves[other] <= leaves[one])
            and not any({one, other} <= names for names in together)
        ]


def merge_labels(
    sources: Mapping[str, Sequence[str]],
    *,
    declared: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    has_ignore: bool = False,
    overrides: UnionMapping | None = None,
) -> LabelUnion:
    """Merge the labels of several datasets.

    Labels whose names mean the same (:func:`canonical_name`) are one structure. It is called as TotalSegmentator calls
    it, or, where that has no name for it, as the first source that has it does. Where spelling cannot tell two labels
    of one source apart, both keep their names. A structure is a superclass where the union has all its parts (left and
    right, lobes of the lung, ribs) or where a source's manifest says so.

    Args:
        sources: Labels of each source in the order of their values, without background and ignore label. The order of
            sources and labels is that of the union's leaves.
        declared: Superclasses that a source's manifest has, with their members, by source.
        has_ignore: Whether a source has an ignore label.
        overrides: A mapping file, which goes before all of this.

    Raises:
        LabelError: The mapping file speaks of what does not exist or makes no sense; a structure that contains another
            and is no union of structures; superclasses of two meanings.

    >>> union = merge_labels({"Dataset001_A": ["Left Kidney", "kidney_right"], "Dataset002_B": ["kidneys", "liver"]})
    >>> union.labels, union.superclasses["kidney"]
    ({'background': 0, 'kidney_left': 1, 'kidney_right': 2, 'liver': 3, 'kidney': 4}, ('kidney_left', 'kidney_right'))
    """
    overrides = overrides or UnionMapping({}, None, "")
    overriding = _bind_overrides(sources, overrides)
    mapping = _name_all(sources, overriding)
    structures = list(dict.fromkeys(name for labels in mapping.values() for name in labels.values()))
    has_ignore = has_ignore or naming.IGNORE in structures
    structures = [name for name in structures if name not in _NO_STRUCTURES]
    if not structures:
        raise LabelError("a union whose labels are all background: keep at least one structure in the mapping")
    naming.check_names(structures, "the union")
    given, called = overrides.superclasses, naming.unambiguous(structures)
    if given is not None:
        _check_superclasses(given, structures, overrides.path)
    known = _translate(declared or {}, mapping) if given is None else given

    def parts_of(name: str) -> Iterable[str]:
        if name in known or given is not None:
            return known.get(name, ())
        return [called.get(part, part) for part in naming.canonical_parts(naming.canonical_name(name))]

    superclasses = _flatten(structures, parts_of, mapping)
    leaves = tuple(name for name in structures if name not in superclasses)
    members = {name: tuple(leaf for leaf in leaves if leaf in superclasses[name]) for name in superclasses}
    return LabelUnion(leaves, members, mapping, has_ignore)


def _bind_overrides(sources: Mapping[str, Sequence[str]], overrides: UnionMapping) -> dict[str, dict[str, str]]:
    bound: dict[str, dict[str, str]] = {}
    for key, named in overrides.sources.items():
        labels, path = named or {}, overrides.path
        matches = [s for s in sources if s == key or (isinstance(key, int) and s.startswith(f"Dataset{key:03d}_"))]
        if not matches or matches[0] in bound:
            found, close = "duplicate" if matches else "unknown", did_you_mean(str(key), sources)
            raise LabelError(f"{path} has the {found} source {key!r}: {close}List each of {', '.join(sources)} once")
        if unknown := next((label for label in labels if label not in sources[matches[0]]), None):
            remedy = f"{did_you_mean(unknown, sources[matches[0]])}Name structures of {matches[0]}"
            raise LabelError(f"{path}: source {key} has the unknown structure {unknown!r}: {remedy}")
        bound[matches[0]] = dict(labels)
    return bound


def _name_all(
    sources: Mapping[str, Sequence[str]], overriding: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    vocabularies = (naming.load_vocabulary(f"totalsegmentator_{version}") for version in ("v1", "v2"))
    known = {naming.canonical_name(name): name for vocabulary in vocabularies for name in vocabulary.labels[1:]}
    keys: dict[str, dict[str, str]] = {}
    for source, labels in sources.items():
        told = {name: canonical for canonical, name in naming.unambiguous(labels).items()}
        # A label that spelling cannot tell from another of its source matches equal names alone.
        keys[source] = {label: told.get(label, f"={label}") for label in labels}
    automatic = {key for keyed in keys.values() for key in keyed.values()}
    names: dict[str, str] = {}
    for keyed in keys.values():
        for label, key in keyed.items():
            whole = key in naming.PARTS or {f"{key}_left", f"{key}_right"} <= automatic | set(naming.PARTS)
            names.setdefault(key, known.get(key) or (key if whole else label))
    return {
        source: {label: overriding.get(source, {}).get(label, names[key]) for label, key in keyed.items()}
        for source, keyed in keys.items()
    }


def _translate(
    declared: Mapping[str, Mapping[str, Sequence[str]]], mapping: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, ...]]:
    translated: dict[str, tuple[str, ...]] = {}
    for source, superclasses in declared.items():
        for label, members in superclasses.items():
            name = mapping[source][label]
            parts = tuple(sorted({mapping[source][member] for member in members}))
            if name in _NO_STRUCTURES or parts == (name,):
                continue
            if translated.setdefault(name, parts) != parts or name in parts or _NO_STRUCTURES & set(parts):
                both = f"{', '.join(parts)} in {source}, {', '.join(translated[name])} before"
                raise LabelError(f"superclass {name} of unclear meaning ({both}): {_REMEDY}")
    return translated


def _check_superclasses(superclasses: Mapping[str, Sequence[str]], structures: Sequence[str], path: str) -> None:
    for name, members in superclasses.items():
        if unknown := next((each for each in (name, *members) if each not in structures), None):
            remedy = f"{did_you_mean(unknown, structures)}Name structures of the union"
            raise LabelError(f"{path}: superclasses has the unknown structure {unknown!r}: {remedy}")
        if len(set(members)) < max(2, len(members)):
            found = f"{len(members)} members" if len(members) < 2 else "a member twice"
            raise LabelError(f"{path}: superclass {name} has {found}: list two or more, each once")


def _flatten(
    structures: Sequence[str], parts_of: Callable[[str], Iterable[str]], mapping: Mapping[str, Mapping[str, str]]
) -> dict[str, set[str]]:
    """Structures that stand for others, and the leaves that they stand for."""

    def divide(name: str, above: tuple[str, ...]) -> tuple[set[str], list[str]]:
        """The leaves that a structure consists of, and the parts that the union lacks."""
        if name in above:
            raise LabelError(f"superclasses go round, {' → '.join((*above, name))}: {_REMEDY}")
        found: set[str] = set()
        lacking: list[str] = []
        for part in parts_of(name):
            leaves, without = divide(part, (*above, name))
            found |= leaves
            lacking += without
        if found:
            return found, lacking
        return ({name}, []) if name in structures else (set(), [name])

    def where(structure: str) -> str:
        return f"{structure} ({', '.join(s for s, labels in mapping.items() if structure in labels.values())})"

    superclasses: dict[str, set[str]] = {}
    for name in structures:
        leaves, lacking = divide(name, ())
        if lacking:
            source, label = next((s, n) for s, labels in mapping.items() for n in labels if labels[n] == name)
            got = f"{where(name)} contains {where(min(leaves))}, and no source has {lacking[0]}"
            example = f"sources: {{{source}: {{{label}: ignore}}}}"
            raise LabelError(f"{got}: say what it is in a mapping file (--mapping), for example {example}")
        if leaves == {name}:
            continue
        if other := next((other for other, members in superclasses.items() if members == leaves), None):
            members = ", ".join(sorted(leaves))
            raise LabelError(f"{other} and {name} have the same members ({members}): give them one name (--mapping)")
        superclasses[name] = leaves
    return superclasses


# What of a model is compared with what of a dataset ------------------------------------------------------------------

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

    listed = {name: entry if isinstance(entry, _Entry) else _Entry(name, entry) for name, entry in content.items()}
    entries = (MapEntry(name, names(name, entry.target), names(name, entry.source)) for name, entry in listed.items())
    return LabelMap(tuple(entries), is_system=False, origin=os.fspath(path))


def suggest_label_map(source: Sequence[str], target: Sequence[str]) -> str:
    """Propose a name mapping as YAML: matches by name, structures by their parts, and what is left to decide."""
    matches = naming.match_names(source, target)
    entries: dict[str, Any] = dict(matches)
    entries |= {name: list(_parts(name, source)) or None for name, match in matches.items() if match is None}
    for whole in source:  # and the other way round: the dataset divides what the model does not
        parts = _parts(whole, [name for name, match in entries.items() if match is None])
        if parts and whole not in entries:
            entries = {name: match for name, match in entries.items() if name not in parts}
            entries[whole] = {"target": list(parts), "source": [whole]}
    lines = [_HEADER]
    for name, match in entries.items():
        close = ", ".join(difflib.get_close_matches(name, source))
        hint = f"  # close: {close}" if close else "  # the model has nothing of this name"
        dumped = yaml.safe_dump({name: match}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e9)
        lines.append(f"{dumped.strip()[1:-1]}{hint if match is None else ''}\n")
    return "".join(lines)


def _parts(whole: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that together make up a structure; none where one is lacking."""
    by_canonical = {naming.canonical_name(name): name for name in names}

    def find(canonical: str, *, itself: bool) -> tuple[str, ...]:
        if itself and canonical in by_canonical:
            return (by_canonical[canonical],)
        found = [find(part, itself=True) for part in naming.canonical_parts(canonical)]
        return tuple(name for names in found for name in names) if found and all(found) else ()

    return find(naming.canonical_name(whole), itself=False)


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
    source, target = (naming.Labels({"labels": labels}).structures for labels in (source_labels, target_labels))
    label_map = label_map or LabelMap((), is_system=False, origin="dataset.json")
    origin, is_system = label_map.origin, label_map.is_system
    chosen: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    left_out: dict[str, str] = {}
    doubtful: list[tuple[str, str]] = []
    rest = list(target)
    for entry in label_map.entries:
        names, found, reason = (_bind_system_entry if is_system else _bind_entry)(entry, source, target, origin)
        rest = [name for name in rest if name not in names]
        if not found or not names:
            left_out |= dict.fromkeys(names or (entry.name,), reason)
            continue
        chosen.append((entry.name, names, found))
        if is_system and not _names_agree(entry, names):
            doubtful.append((", ".join(names), entry.name))
    matches = {} if is_system else naming.match_names(list(source), rest)
    chosen += [(name, (name,), (match,)) for name, match in matches.items() if match is not None]
    reason = f"no part of {origin}" if is_system else "the model has nothing of this name"
    left_out |= {name: reason for name in rest if matches.get(name) is None}
    comparisons = [Comparison(n, a, b, _values_of(a, target), _values_of(b, source)) for n, a, b in chosen]
    _check(comparisons, source, target, origin)
    ordered = tuple(sorted(comparisons, key=lambda comparison: comparison.target_values))
    return LabelRelation(ordered, left_out, tuple(doubtful))


_Values = Mapping[str, tuple[int, ...]]
_Bound = tuple[tuple[str, ...], tuple[str, ...], str]  # of the dataset, of the model, why there would be none


def _bind_entry(entry: MapEntry, source: _Values, target: _Values, path: str) -> _Bound:
    def resolve(name: str, known: _Values) -> str:
        match = naming.match_names(list(known), [name])[name]
        if match is None:
            got = f"{path}: {entry.name} has the unknown structure {name!r}: {did_you_mean(name, known)}"
            remedy = "Left sides name structures of the dataset, right sides those of the model"
            raise LabelError(f"{got}{remedy}: here one of {', '.join(known)}")
        return match

    names = tuple(resolve(str(name), target) for name in entry.target)
    return names, tuple(resolve(name, source) for name in entry.source), "left out by the label map"


def _bind_system_entry(entry: MapEntry, source: _Values, target: _Values, system: str) -> _Bound:
    names = tuple(name for name, values in target.items() if set(values) <= set(entry.target))
    if names and not _names_agree(entry, names) and _known_names() & set(map(naming.canonical_name, names)):
        label = ", ".join(map(str, _values_of(names, target)))
        got = f"label {label} is {', '.join(names)} in dataset.json, not {entry.name}, as {system} has it"
        raise LabelError(f"{got}: leave --label-map out, or write one (--suggest-map -o map.yaml proposes it)")
    matches = naming.match_names(list(source), entry.source)
    lacking = [name for name, match in matches.items() if match is None]
    found = () if lacking else tuple(filter(None, matches.values()))
    return names, found, f"the model has no {', '.join(lacking)}" if names else "the dataset does not have it"


def _values_of(names: Iterable[str], values: _Values) -> tuple[int, ...]:
    return tuple(sorted({value for name in names for value in values[name]}))


def _names_agree(entry: MapEntry, names: Iterable[str]) -> bool:
    meant = {naming.canonical_name(entry.name), *(naming.canonical_name(name) for name in entry.source)}
    return bool(meant & set(map(naming.canonical_name, names)))


@lru_cache
def _known_names() -> frozenset[str]:
    vocabularies = map(naming.load_vocabulary, naming.list_vocabularies())
    return frozenset(naming.canonical_name(name) for each in vocabularies for name in each.labels[1:])


def _check(comparisons: Sequence[Comparison], source: _Values, target: _Values, origin: str) -> None:
    if not comparisons:
        mine, theirs = (", ".join([*names][:6]) + (" …" if len(names) > 6 else "") for names in (target, source))
        remedy = "say with --label-map what stands for what (--suggest-map -o map.yaml proposes a file to edit)"
        raise LabelError(f"nothing to compare: the dataset has {mine}; the model {theirs}: {remedy}")
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
    leaves = manifest.leaves_of(*comparison.target_values)
    within = [value for value in manifest.annotated(case) if manifest.leaves_of(value) <= leaves]
    if manifest.leaves_of(*within) != leaves:
        return None
    return tuple(sorted(leaves | {value for value in manifest.superclasses if manifest.leaves_of(value) <= leaves}))
