"""What is compared when the segmentations of a model are scored against the labels of another dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stunet.errors import LabelError
from stunet.labels.aliases import canonical_name, match_names
from stunet.labels.direct_maps import LabelMap, MapEntry
from stunet.labels.manifest import AnnotationManifest
from stunet.labels.mapping_files import close_names, refuse_mapping
from stunet.labels.vocabularies import list_vocabularies, load_vocabulary

__all__ = ["Comparison", "LabelRelation", "observed_values", "relate_labels", "structure_values"]

_NOT_STRUCTURES = ("background", "ignore")


@dataclass(frozen=True)
class Comparison:
    """One structure that is scored.

    Attributes:
        name: What the scores call it.
        target: Structures of the dataset that it consists of.
        source: Structures of the model that stand for it.
        target_values: Values of the former in the dataset's label maps, in order.
        source_values: Values of the latter in the model's segmentations, in order.
    """

    name: str
    target: tuple[str, ...]
    source: tuple[str, ...]
    target_values: tuple[int, ...]
    source_values: tuple[int, ...]


@dataclass(frozen=True)
class LabelRelation:
    """How the labels of a model and of a dataset are related.

    Attributes:
        comparisons: What is scored, in the order of the dataset's label values.
        left_out: Why each other structure of the dataset is not scored.
        doubtful: Names of the dataset that a published system takes, by their value, for a structure whose name is
            another; pairs of both.
    """

    comparisons: tuple[Comparison, ...]
    left_out: Mapping[str, str]
    doubtful: tuple[tuple[str, str], ...]


def structure_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Values of each structure in label maps, regions of several values among them; no background, no ignore label.

    Args:
        labels: ``labels`` of a ``dataset.json``.

    Raises:
        LabelError: Something else than whole numbers, or no structure.
    """
    values: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        listed = list(value) if isinstance(value, list | tuple) else [value]
        if not listed or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in listed):
            raise LabelError(
                "labels that are no label values",
                got=f"{name!r}: {value!r}",
                expected="a whole number, or a list of them, for each name",
                remedy="Correct the labels of dataset.json.",
            )
        if name not in _NOT_STRUCTURES and listed != [0]:
            values[name] = tuple(sorted(set(listed)))
    if not values:
        raise LabelError(
            "labels without structures",
            got=", ".join(labels) or "none",
            expected="at least one structure besides the background",
            remedy="Correct the labels of dataset.json.",
        )
    return values


def relate_labels(
    source_labels: Mapping[str, Any], target_labels: Mapping[str, Any], label_map: LabelMap | None = None
) -> LabelRelation:
    """Find what of a model can be compared with what of a dataset.

    Structures whose names mean the same (:func:`match_names`) are compared without a label map; one goes before that.
    A published system is whole: what it does not mention is not compared. It says structures of the dataset by value,
    and a value whose name in ``dataset.json`` is known to mean something else is an error.

    Args:
        source_labels: ``labels`` of the model's ``dataset.json``.
        target_labels: ``labels`` of the dataset's ``dataset.json``.
        label_map: The label map, if there is one.

    Raises:
        LabelError: A map that names unknown structures, or the same ones twice, a system that is another dataset's,
            or nothing that could be compared.
    """
    source, target = structure_values(source_labels), structure_values(target_labels)
    origin = label_map.origin if label_map is not None else "dataset.json"
    comparisons: list[Comparison] = []
    left_out: dict[str, str] = {}
    doubtful: list[tuple[str, str]] = []
    spoken_of: set[str] = set()
    is_system = label_map is not None and label_map.is_system
    bind = _bind_system_entry if is_system else _bind_entry
    for entry in label_map.entries if label_map is not None else ():
        bound, names, reason = bind(entry, source, target, origin)
        spoken_of.update(names)
        if not bound.source_values or not bound.target_values:
            left_out.update(dict.fromkeys(names or (entry.name,), reason))
            continue
        comparisons.append(bound)
        if is_system and not _names_agree(entry, names):
            doubtful.append((", ".join(names), entry.name))
    rest = [name for name in target if name not in spoken_of]
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


def _bind_entry(
    entry: MapEntry, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]], path: str
) -> tuple[Comparison, tuple[str, ...], str]:
    names = tuple(_resolve(str(name), target, entry.name, path) for name in entry.target)
    found = tuple(_resolve(name, source, entry.name, path) for name in entry.source)
    comparison = Comparison(entry.name, names, found, _values_of(names, target), _values_of(found, source))
    return comparison, names, "left out by the label map"


def _bind_system_entry(
    entry: MapEntry, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]], system: str
) -> tuple[Comparison, tuple[str, ...], str]:
    names = tuple(name for name, values in target.items() if set(values) <= set(entry.target))
    if names and not _names_agree(entry, names) and _known_names() & set(map(canonical_name, names)):
        raise LabelError(
            "a label system that is another dataset's",
            got=f"label {', '.join(map(str, _values_of(names, target)))} is {', '.join(names)} in dataset.json",
            expected=f"{entry.name}, as {system} has it",
            remedy="Leave --label-map out, or write one: --suggest-map -o map.yaml proposes it.",
        )
    matches = match_names(list(source), entry.source)
    lacking = [name for name, match in matches.items() if match is None]
    found = () if lacking else tuple(match for match in matches.values() if match is not None)
    reason = f"the model has no {', '.join(lacking)}" if names else "the dataset does not have it"
    comparison = Comparison(entry.name, names, found, _values_of(names, target), _values_of(found, source))
    return comparison, names, reason


def _values_of(names: Iterable[str], values: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({value for name in names for value in values[name]}))


def _resolve(name: str, known: Mapping[str, Any], entry: str, path: str) -> str:
    match = match_names(list(known), [name])[name]
    if match is None:
        similar = close_names(name, known, 3)
        raise refuse_mapping(
            path,
            f"{entry} has the unknown structure {name!r}",
            f"close names are {', '.join(similar)}" if similar else f"one of {', '.join(known)}",
            "Correct the name; left sides name structures of the dataset, right sides those of the model.",
        )
    return match


def _names_agree(entry: MapEntry, names: Iterable[str]) -> bool:
    meant = {canonical_name(entry.name), *(canonical_name(name) for name in entry.source)}
    return bool(meant & set(map(canonical_name, names)))


@lru_cache(maxsize=1)
def _known_names() -> frozenset[str]:
    names = (name for vocabulary in list_vocabularies() for name in load_vocabulary(vocabulary).labels[1:])
    return frozenset(map(canonical_name, names))


def _check(
    comparisons: Sequence[Comparison], source: Mapping[str, Any], target: Mapping[str, Any], origin: str
) -> None:
    if not comparisons:
        raise LabelError(
            "nothing that could be compared",
            got=f"the dataset has {_shortened(target)}; the model {_shortened(source)}",
            expected="at least one structure that both have",
            remedy="Say with --label-map what stands for what: --suggest-map -o map.yaml proposes a file to edit.",
        )
    for i, one in enumerate(comparisons):
        for other in comparisons[:i]:
            if one.name == other.name or one.target_values == other.target_values:
                raise refuse_mapping(
                    origin,
                    f"{other.name} ({', '.join(other.target)}) and {one.name} ({', '.join(one.target)})",
                    "a name of its own, and other structures of the dataset, for each entry",
                )


def _shortened(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def observed_values(comparison: Comparison, manifest: AnnotationManifest, case: str) -> tuple[int, ...] | None:
    """The values that a comparison's structures have in the label map of a partially annotated case.

    Superclasses count: voxels of one are inside where all that it may stand for is, and a case that annotates it
    annotates its members as far as their union is asked for.

    Args:
        comparison: What is compared.
        manifest: What the cases of the dataset annotate.
        case: Name of the case.

    Returns:
        The values in order, or None where the case does not annotate all of the comparison's structures.

    Raises:
        LabelError: The manifest says nothing about this case.
    """

    def leaves_of(value: int) -> set[int]:
        return set(manifest.superclasses.get(value, (value,)))

    leaves = {leaf for value in comparison.target_values for leaf in leaves_of(value)}
    within = [value for value in manifest.annotated(case) if leaves_of(value) <= leaves]
    if {leaf for value in within for leaf in leaves_of(value)} != leaves:
        return None
    return tuple(sorted(leaves | {value for value in manifest.superclasses if leaves_of(value) <= leaves}))
