"""The labels of several datasets as those of one: structures merged by name, and superclasses found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import yaml

from stunet.errors import LabelError, reading
from stunet.forms import Name, decode, read_document
from stunet.labels.aliases import PARTS, canonical_name, canonical_parts, did_you_mean
from stunet.labels.labels import BACKGROUND, IGNORE, check_names, load_vocabulary

_HEADER = """\
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
    return f"{_HEADER}{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)}"


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
        last = [IGNORE] if self.has_ignore else []
        return {name: value for value, name in enumerate([BACKGROUND, *self.leaves, *self.superclasses, *last])}

    @cached_property
    def doubtful(self) -> list[tuple[str, str]]:
        """Pairs of structures of which one may contain, or be, the other, judged by the words of their names.

        Two labels of one source are not doubtful: it tells them apart.
        """
        together = [set(labels.values()) for labels in self.mapping.values()]
        words = {name: set(canonical_name(name).split("_")) for name in (*self.leaves, *self.superclasses)}
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
    overriding = _bind_overrides(sources, overrides)
    mapping = _name_all(sources, overriding)
    structures = list(dict.fromkeys(name for labels in mapping.values() for name in labels.values()))
    has_ignore = has_ignore or IGNORE in structures
    structures = [name for name in structures if name not in (BACKGROUND, IGNORE)]
    if not structures:
        raise LabelError("a union whose labels are all background: keep at least one structure in the mapping")
    check_names(structures, "the union")
    if overrides is not None and overrides.superclasses is not None:
        parts = _check_superclasses(overrides.superclasses, structures, overrides.path)
    else:
        parts = _find_parts(structures, _translate(declared or {}, mapping))
    superclasses = _flatten(structures, parts, mapping)
    leaves = tuple(name for name in structures if name not in superclasses)
    members = {name: tuple(leaf for leaf in leaves if leaf in superclasses[name]) for name in superclasses}
    return LabelUnion(leaves, members, mapping, has_ignore)


def _bind_overrides(sources: Mapping[str, Sequence[str]], overrides: UnionMapping | None) -> dict[str, dict[str, str]]:
    bound: dict[str, dict[str, str]] = {}
    for key, labels in overrides.sources.items() if overrides is not None else ():
        labels, path = labels or {}, overrides.path if overrides is not None else ""
        matches = [s for s in sources if s == key or (isinstance(key, int) and s.startswith(f"Dataset{key:03d}_"))]
        if not matches or matches[0] in bound:
            found = f"source {key} twice" if matches else f"the unknown source {key!r}{did_you_mean(str(key), sources)}"
            raise LabelError(f"{path} has {found}: list each of {', '.join(sources)} at most once")
        if unknown := next((label for label in labels if label not in sources[matches[0]]), None):
            similar = did_you_mean(unknown, sources[matches[0]])
            raise LabelError(f"{path}: source {key} has the unknown structure {unknown!r}{similar}")
        bound[matches[0]] = dict(labels)
    return bound


def _name_all(
    sources: Mapping[str, Sequence[str]], overriding: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    vocabularies = (load_vocabulary(f"totalsegmentator_{version}") for version in ("v1", "v2"))
    known = {canonical_name(name): name for vocabulary in vocabularies for name in vocabulary.labels[1:]}
    keys: dict[str, dict[str, str]] = {}
    for source, labels in sources.items():
        counts = Counter(map(canonical_name, labels))
        # A label that spelling cannot tell from another of its source matches equal names alone.
        keys[source] = {label: c if counts[c := canonical_name(label)] == 1 else f"={label}" for label in labels}
    automatic = {key for keyed in keys.values() for key in keyed.values()}
    names: dict[str, str] = {}
    for keyed in keys.values():
        for label, key in keyed.items():
            whole = key in PARTS or {f"{key}_left", f"{key}_right"} <= automatic | set(PARTS)
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
            if name in (BACKGROUND, IGNORE) or parts == (name,):
                continue
            if translated.setdefault(name, parts) != parts or name in parts or {BACKGROUND, IGNORE} & set(parts):
                both = f"{', '.join(parts)} in {source}, {', '.join(translated[name])} before"
                raise LabelError(f"superclass {name} of unclear meaning ({both}): {_REMEDY}")
    return translated


def _find_parts(structures: Sequence[str], declared: Mapping[str, tuple[str, ...]]) -> Callable[[str], Iterable[str]]:
    """Parts of a structure, where it has any: those declared, or by canonical name, called as the union calls them."""
    counts = Counter(map(canonical_name, structures))
    by_canonical = {c: name for name in structures if counts[c := canonical_name(name)] == 1}

    def parts_of(name: str) -> Iterable[str]:
        return declared.get(name) or [by_canonical.get(p, p) for p in canonical_parts(canonical_name(name))]

    return parts_of


def _check_superclasses(
    superclasses: Mapping[str, Sequence[str]], structures: Sequence[str], path: str
) -> Callable[[str], Iterable[str]]:
    for name, members in superclasses.items():
        if unknown := next((each for each in (name, *members) if each not in structures), None):
            similar = did_you_mean(unknown, structures)
            raise LabelError(f"{path}: superclasses has the unknown structure {unknown!r}{similar}")
        if len(set(members)) < max(2, len(members)):
            found = f"{len(members)} members" if len(members) < 2 else "a member twice"
            raise LabelError(f"{path}: superclass {name} has {found}: list two or more, each once")
    return lambda name: superclasses.get(name, ())


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
            raise LabelError(
                f"{where(name)} contains {where(min(leaves))}, and no source has {lacking[0]}: "
                f"say what it is in a mapping file (--mapping), for example sources: {{{source}: {{{label}: ignore}}}}"
            )
        if leaves == {name}:
            continue
        if other := next((other for other, members in superclasses.items() if members == leaves), None):
            members = ", ".join(sorted(leaves))
            raise LabelError(f"{other} and {name} have the same members ({members}): give them one name (--mapping)")
        superclasses[name] = leaves
    return superclasses
