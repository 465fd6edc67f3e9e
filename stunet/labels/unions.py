"""The labels of several datasets as those of one: structures merged by name, and superclasses found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from stunet.errors import LabelError
from stunet.labels.aliases import PARTS, canonical_name, canonical_parts
from stunet.labels.manifest import check_names
from stunet.labels.mapping_files import close_names, refuse_mapping
from stunet.labels.union_mapping import UnionMapping
from stunet.labels.vocabularies import load_vocabulary

__all__ = ["BACKGROUND", "IGNORE", "LabelUnion", "merge_labels"]

BACKGROUND, IGNORE = "background", "ignore"


@dataclass(frozen=True)
class LabelUnion:
    """The labels of a union of datasets.

    Attributes:
        leaves: Structures that stand for themselves, in the order of their label values, from 1.
        superclasses: Structures that stand for several leaves, and these; their label values follow the leaves'.
        mapping: For each source by name, the structure that each of its labels is, or ``background`` or ``ignore``.
        has_ignore: Whether there is an ignore label; it has the highest value.
    """

    leaves: tuple[str, ...]
    superclasses: Mapping[str, tuple[str, ...]]
    mapping: Mapping[str, Mapping[str, str]]
    has_ignore: bool

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
        related = {frozenset((name, leaf)) for name, leaves in self.superclasses.items() for leaf in leaves}
        nested = {
            frozenset((one, other))
            for one, leaves in self.superclasses.items()
            for other, others in self.superclasses.items()
            if set(others) < set(leaves)
        }
        return [
            (one, other)
            for one in words
            for other in words
            if (words[one] < words[other] or (words[one] == words[other] and one < other))
            and frozenset((one, other)) not in related | nested
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
    """
    overriding = _bind_overrides(sources, overrides)
    mapping = _name_all(sources, overriding)
    structures = list(dict.fromkeys(name for labels in mapping.values() for name in labels.values()))
    has_ignore = has_ignore or IGNORE in structures
    structures = [name for name in structures if name not in (BACKGROUND, IGNORE)]
    if not structures:
        raise LabelError(
            "a union without structures",
            got="labels that are all background",
            expected="at least one structure",
            remedy="Correct the mapping.",
        )
    check_names(structures)
    if overrides is not None and overrides.superclasses is not None:
        superclasses = _flatten(overrides.superclasses, structures, overrides.path)
    else:
        superclasses = _find_superclasses(structures, _translate(declared or {}, mapping), mapping)
    _check_same_members(superclasses)
    leaves = tuple(name for name in structures if name not in superclasses)
    order = {name: i for i, name in enumerate(leaves)}
    members = {
        name: tuple(sorted(superclasses[name], key=order.__getitem__)) for name in structures if name in superclasses
    }
    return LabelUnion(leaves, members, mapping, has_ignore)


def _bind_overrides(sources: Mapping[str, Sequence[str]], overrides: UnionMapping | None) -> dict[str, dict[str, str]]:
    bound: dict[str, dict[str, str]] = {}
    for key, labels in (overrides.sources if overrides is not None else {}).items():
        path = overrides.path if overrides is not None else ""
        matches = [s for s in sources if s == key or (isinstance(key, int) and s.startswith(f"Dataset{key:03d}_"))]
        if not matches or matches[0] in bound:
            got = f"source {key} twice" if matches else f"unknown source {key!r}{_similar(str(key), sources)}"
            raise refuse_mapping(path, got, f"each of {', '.join(sources)} at most once")
        for label in labels:
            if label not in sources[matches[0]]:
                raise refuse_mapping(
                    path,
                    f"sources, {key} has the unknown structure {label!r}{_similar(label, sources[matches[0]])}",
                    "labels that the dataset.json of the source lists, without background and ignore",
                )
        bound[matches[0]] = dict(labels)
    return bound


def _name_all(
    sources: Mapping[str, Sequence[str]], overriding: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    known = _totalsegmentator_names()
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


@lru_cache(maxsize=1)
def _totalsegmentator_names() -> dict[str, str]:
    names = (n for v in ("v1", "v2") for n in load_vocabulary(f"totalsegmentator_{v}").labels[1:])
    return {canonical_name(name): name for name in names}


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
                raise LabelError(
                    "a superclass of unclear meaning",
                    got=f"{name}: {', '.join(parts)} in {source}; {', '.join(translated[name])} before",
                    expected="the same members, all of them structures of the union, wherever it occurs",
                    remedy="Say what it is under superclasses of a mapping file (--mapping).",
                )
    return translated


def _find_superclasses(
    structures: Sequence[str], declared: Mapping[str, tuple[str, ...]], mapping: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, ...]]:
    counts = Counter(map(canonical_name, structures))
    by_canonical = {c: name for name in structures if counts[c := canonical_name(name)] == 1}

    def parts_of(name: str) -> tuple[str, ...]:
        """Parts by name where the union has such, else by canonical name."""
        if name in declared:
            return declared[name]
        return tuple(by_canonical.get(part, part) for part in canonical_parts(canonical_name(name)))

    def divide(name: str, above: tuple[str, ...]) -> tuple[set[str], list[str]]:
        """The leaves that a structure consists of, and the parts that the union lacks."""
        if name in above:
            raise _refuse_cycle("the sources' manifests", (*above, name))
        found: set[str] = set()
        lacking: list[str] = []
        for part in parts_of(name):
            leaves, without = divide(part, (*above, name))
            found |= leaves
            lacking += without
        if found:
            return found, lacking
        return ({name}, []) if name in structures else (set(), [name])

    superclasses = {}
    for name in structures:
        leaves, lacking = divide(name, ())
        if lacking:
            raise _refuse_part(name, sorted(leaves), lacking, mapping)
        if leaves != {name}:
            superclasses[name] = tuple(leaves)
    return superclasses


def _refuse_part(
    name: str, parts: Sequence[str], lacking: Sequence[str], mapping: Mapping[str, Mapping[str, str]]
) -> LabelError:
    def where(structure: str) -> str:
        return ", ".join(s for s, labels in mapping.items() if structure in labels.values())

    source = next(s for s, labels in mapping.items() if name in labels.values())
    label = next(label for label, structure in mapping[source].items() if structure == name)
    return LabelError(
        "a structure that contains another",
        got=f"{name} ({where(name)}) contains {parts[0]} ({where(parts[0])}), and no source has {lacking[0]}",
        expected="structures that do not overlap, or all parts of the larger one, which makes it a superclass",
        remedy=f"Say what it is in a mapping file (--mapping), for example: sources: {{{source}: {{{label}: ignore}}}}",
    )


def _flatten(
    superclasses: Mapping[str, tuple[str, ...]], structures: Sequence[str], path: str
) -> dict[str, tuple[str, ...]]:
    def leaves_of(name: str, above: tuple[str, ...]) -> set[str]:
        if name in above:
            raise refuse_mapping(
                path,
                f"superclasses go round: {' → '.join((*above, name))}",
                "superclasses that do not contain themselves",
            )
        if name not in structures:
            raise refuse_mapping(
                path,
                f"superclasses has the unknown structure {name!r}{_similar(name, structures)}",
                "structures that a label of a source is",
            )
        if name not in superclasses:
            return {name}
        return {leaf for member in superclasses[name] for leaf in leaves_of(member, (*above, name))}

    flat = {}
    for name, members in superclasses.items():
        leaves = leaves_of(name, ())
        if len(leaves) < 2 or len(set(members)) < len(members):
            got = f"{len(leaves)} members" if len(leaves) < 2 else "a member twice"
            raise refuse_mapping(path, f"superclasses, {name} has {got}", "two or more, each once")
        flat[name] = tuple(leaves)
    return flat


def _check_same_members(superclasses: Mapping[str, Sequence[str]]) -> None:
    seen: dict[frozenset[str], str] = {}
    for name, leaves in superclasses.items():
        other = seen.setdefault(frozenset(leaves), name)
        if other != name:
            raise LabelError(
                "two superclasses of the same members",
                got=f"{other} and {name}: {', '.join(sorted(leaves))}",
                expected="one name for one structure",
                remedy="Give them one name in a mapping file (--mapping).",
            )


def _refuse_cycle(place: str, names: tuple[str, ...]) -> LabelError:
    return LabelError(
        "superclasses that go round",
        got=f"{place}: {' → '.join(names)}",
        expected="superclasses that do not contain themselves",
        remedy="Say what they are under superclasses of a mapping file (--mapping).",
    )


def _similar(name: str, known: Iterable[str]) -> str:
    close = close_names(name, known)
    return f" (did you mean {close[0]!r}?)" if close else ""
