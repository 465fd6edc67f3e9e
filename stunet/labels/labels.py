"""What label values stand for: ``labels`` of a ``dataset.json``, orders of outputs, and spellings of one structure."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from stunet.errors import FormError, LabelError, STUNetError, reading
from stunet.files import Name, decode, read_document

if TYPE_CHECKING:
    import numpy.typing as npt

BACKGROUND, IGNORE = "background", "ignore"

_Value = Annotated[int, msgspec.Meta(ge=0)]
_VALUE = Annotated[str, msgspec.Meta(pattern=r"^\d+$")]
_LABELS = dict[str, _Value | Annotated[list[_Value], msgspec.Meta(min_length=1)]]
#: Orders that weights were published in; the others are those of datasets.
_OF_PUBLISHED_WEIGHTS = ("abdomenatlas_9", "totalsegmentator_104")


class Outputs(NamedTuple):
    """Names of a network's outputs."""

    names: tuple[str, ...]  # one for each output, in order
    # whether a softmax over the outputs, the first of them background, assigns each voxel to one of them; otherwise
    # each is a region with a sigmoid of its own
    exclusive: bool


def _as_numbers(value: Any) -> Any:
    """Turn numbers that are written as text into numbers, which nnU-Net does too."""
    if isinstance(value, dict):
        return {name: _as_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_as_numbers(one) for one in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Labels:
    """The labels of a dataset.

    Args:
        dataset_json: Content of its ``dataset.json``: ``labels`` with a value, or a list of values, for each name.
        source: Where it was read, for messages.

    Attributes:
        values: Label values of each name, background and ignore label included.
        structures: The same, sorted, without background and ignore label.
        ignore: Value of the ignore label, if there is one.
        has_regions: Whether a label has several values: then nnU-Net trains regions, which may overlap.

    Raises:
        LabelError: Labels that are no label values.

    >>> labels = Labels({"labels": {"background": 0, "organ": [1, 2], "tumour": 2, "ignore": 3}})
    >>> labels.structures, labels.ignore, labels.outputs.names
    ({'organ': (1, 2), 'tumour': (2,)}, 3, ('organ', 'tumour'))
    """

    def __init__(self, dataset_json: Mapping[str, Any], source: object = "dataset.json") -> None:
        with reading(source, "a description with no label values", LabelError, "give each name one, or several"):
            listed = decode(_as_numbers(dataset_json.get("labels")), _LABELS)
        self.source = source
        self.values = {name: tuple(v) if isinstance(v, list) else (v,) for name, v in listed.items()}
        self.ignore = self.values[IGNORE][0] if IGNORE in self.values else None
        trained = {name: values for name, values in self.values.items() if name != IGNORE}
        self.structures = {n: tuple(sorted(set(v))) for n, v in trained.items() if n != BACKGROUND and set(v) != {0}}
        self.has_regions = any(len(values) > 1 for values in trained.values())
        self._class_order = dataset_json.get("regions_class_order")

    @property
    def outputs(self) -> Outputs:
        """The outputs of a network that nnU-Net trains: with regions neither background nor ignore label has one."""
        names = [name for name in self.values if name != IGNORE]
        if self.has_regions:
            return Outputs(tuple(name for name in names if set(self.values[name]) != {0}), exclusive=False)
        return Outputs(tuple(sorted(names, key=lambda name: self.values[name])), exclusive=True)

    @property
    def exclusive(self) -> dict[str, int]:
        """Value of each structure, in the order of values.

        Raises:
            LabelError: Regions, values twice, names that differ only in case, or no structure.
        """
        if zero := [n for n, values in self.values.items() if n not in (BACKGROUND, IGNORE) and values == (0,)]:
            raise LabelError(f"{self.source}: {zero[0]} has the value of the background, 0: give it one of its own")
        if regions := [name for name, values in self.structures.items() if len(values) > 1]:
            found = f"{regions[0]} is a region, {list(self.values[regions[0]])}"
            raise LabelError(f"{self.source}: {found}: list one value")
        check_names(self.structures, self.source)
        values = {name: value for name, (value,) in sorted(self.structures.items(), key=lambda item: item[1])}
        if not values or len(set(values.values())) < len(values):
            found = "duplicate values" if values else "no structures"
            raise LabelError(f"{self.source} has {found}: list structures with a value of its own for each")
        return values

    def check(self) -> list[int]:
        """Check nnU-Net's rules, without which a training stops at the first batch.

        Values from 0 without a gap, background 0, the ignore label the highest; with regions a
        ``regions_class_order`` that has an entry for each region but the background.

        Returns:
            The values that label maps may have, background and ignore label included.

        Raises:
            LabelError: A rule is broken.
        """
        if self.values.get(BACKGROUND) != (0,):
            found = self.values.get(BACKGROUND, "missing")
            raise LabelError(f"{self.source}: background must be label 0, and is {found}: correct the labels")
        plain = sorted({v for name, values in self.values.items() if name != IGNORE for v in values})
        everything = plain + list(self.values.get(IGNORE, ()))
        if everything != list(range(len(everything))):
            lacking = sorted(set(range(max(everything))) - set(everything))
            shown = ", ".join(map(str, everything[:20])) + (f"; {lacking[0]} is missing" if lacking else "")
            raise LabelError(f"{self.source}: labels must be consecutive, ignore the highest ({shown}): renumber them")
        n = len(self.outputs.names)
        if self.has_regions and (not isinstance(self._class_order, list) or len(self._class_order) != n):
            raise LabelError(f"{self.source}: regions_class_order is {self._class_order}: list {n} values")
        return everything

    @property
    def predicted(self) -> dict[str, int]:
        """Value of each name in predictions: with regions that of ``regions_class_order``, without background."""
        if self._class_order is None:
            return {name: values[0] for name, values in self.values.items() if name != IGNORE}
        return dict(zip(self.structures, self._class_order, strict=True))

    def as_predicted(self, truth: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
        """Merge the values of a label map, which may be finer, as nnU-Net writes regions: later ones over earlier."""
        if self._class_order is None:
            return truth
        import numpy as np

        merged = np.zeros_like(truth)
        for name, value in self.predicted.items():
            merged[np.isin(truth, self.values[name])] = value
        return merged


def check_names(names: Iterable[str], source: object, kind: type[STUNetError] = LabelError) -> None:
    """Refuse names that differ only in case: where they are file names, some systems take them for one."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise kind(f"{source}: {other!r} and {name!r} differ in upper and lower case alone: rename one")


@dataclass(frozen=True)
class Vocabulary:
    """Names of a network's outputs, in order."""

    name: str  # name of the vocabulary, or of the file it was read from
    labels: tuple[str, ...]  # names by label value, background first
    source: str  # where the order is from
    # structures by the name of a group, where the source makes such groups
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dataset_labels(self) -> dict[str, int]:
        """Return ``labels`` of a ``dataset.json``: values by name."""
        return {name: value for value, name in enumerate(self.labels)}


def list_vocabularies() -> list[str]:
    """Return the names of all vocabularies of this package."""
    return sorted(entry.name.removesuffix(".json") for entry in (files("stunet.labels") / "vocabularies").iterdir())


@lru_cache
def load_vocabulary(name: str) -> Vocabulary:
    """Read a vocabulary of this package.

    >>> load_vocabulary("totalsegmentator_104").labels[:3]
    ('background', 'adrenal_gland_left', 'adrenal_gland_right')

    Raises:
        LabelError: There is none of this name.
    """
    if name not in list_vocabularies():
        raise LabelError(f"unknown label vocabulary {name!r}: choose one of {', '.join(list_vocabularies())}")
    content = json.loads((files("stunet.labels") / "vocabularies" / f"{name}.json").read_text(encoding="utf-8"))
    return msgspec.convert({"name": name, **content}, Vocabulary)


def vocabulary_for(num_classes: int) -> Vocabulary:
    """Return the label order of the published weights that have so many outputs, background included.

    Raises:
        LabelError: No published weights have so many.
    """
    known = {len(v.labels): v for v in map(load_vocabulary, _OF_PUBLISHED_WEIGHTS)}
    if num_classes not in known:
        published = " or ".join(map(str, known))
        raise LabelError(f"no names for {num_classes} outputs, only for {published}: name them with --labels FILE.json")
    return known[num_classes]


def read_label_file(path: str | os.PathLike[str], num_classes: int) -> Vocabulary:
    """Read the names of a network's outputs.

    Args:
        path: JSON: a list of names, names by value, values by name, or a ``dataset.json`` with ``labels``.
        num_classes: Outputs of the network, background included.

    Raises:
        LabelError: Missing, not JSON, another number of names, values with gaps, names twice, no background at 0.
    """
    forms = '["background", "liver", …], {"0": "background", …} or {"background": 0, …}'
    with reading(path, "a label file that cannot be used", LabelError, f"give {forms}"):
        content = read_document(path)
        labels = _in_order(content.get("labels", content) if isinstance(content, dict) else content)
        if len(labels) != num_classes:
            raise FormError(f"{len(labels)} names for {num_classes} outputs, background included")
        if labels[0] != BACKGROUND:
            raise FormError(f"label 0 is {labels[0]!r}, not {BACKGROUND!r}")
    return Vocabulary(Path(path).name, labels, str(path))


def _in_order(content: Any) -> tuple[str, ...]:
    if isinstance(content, list):
        pairs: list[tuple[int, str]] = list(enumerate(decode(content, list[Name])))
    elif isinstance(content, dict) and all(isinstance(value, int) for value in content.values()):
        pairs = [(value, name) for name, value in decode(content, dict[Name, _Value]).items()]
    else:
        pairs = [(int(value), name) for value, name in decode(content, dict[_VALUE, Name]).items()]
    names = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FormError(f"{twice} twice")
    if missing := set(range(len(pairs))) - {value for value, _ in pairs}:
        raise FormError(f"no name for label {min(missing)}")
    return tuple(names)


# The same structure under the names that different datasets give it ---------------------------------------------------

_SIDES = {"left": "left", "lt": "left", "l": "left", "right": "right", "rt": "right", "r": "right"}
_FILLERS = {"of", "the", "and"}


def _read_aliases(table: str) -> dict[str, tuple[str, ...]]:
    text = (files("stunet.labels") / "aliases.json").read_text(encoding="utf-8")
    return {name: tuple(aliases) for name, aliases in json.loads(text)[table].items()}


def _inverted(table: str) -> dict[str, str]:
    return {alias: name for name, aliases in _read_aliases(table).items() for alias in aliases}


_WORD_OF, _NAME_OF, _SIDED_OF = _inverted("words"), _inverted("names"), _inverted("sided")

PARTS = _read_aliases("parts")
"""Canonical names of the parts of structures that have other parts than a left and a right one."""


def canonical_name(name: str) -> str:
    """Return one spelling for all usual spellings of a structure.

    Case, separators, word order of the side (``Left Kidney``, ``kidney_l``), plurals and the abbreviations of public
    datasets (``IVC``, ``RAG``, ``L1``) make no difference. A name that is not known is only normalised, so two
    datasets' own names still match.

    >>> canonical_name("Left Kidney"), canonical_name("IVC")
    ('kidney_left', 'inferior_vena_cava')
    """
    words = [w for w in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if w]
    if len(words) == 1 and words[0] in _SIDED_OF:
        return _SIDED_OF[words[0]]
    if len(words) == 1 and re.fullmatch(r"c[1-7]|t([1-9]|1[0-3])|l[1-6]|s1", words[0]):
        words.insert(0, "vertebrae")  # as VerSe and its kin name them
    sides = [_SIDES[word] for word in words if word in _SIDES]
    rest = [_WORD_OF.get(word, word) for word in words if word not in _SIDES and word not in _FILLERS]
    if len(sides) != 1 or not rest:  # no side, or something that is no side at all, such as "l" alone
        return _NAME_OF.get("_".join(rest), "_".join(rest)) if not sides else "_".join(words)
    joined = "_".join(rest)
    return f"{_NAME_OF.get(joined, joined)}_{sides[0]}"


def canonical_parts(name: str) -> tuple[str, ...]:
    """Return the canonical names of the sides, lobes or ribs that a structure of a canonical name consists of."""
    sided = name.endswith(("_left", "_right"))
    return PARTS.get(name, () if sided else (f"{name}_left", f"{name}_right"))


def match_names(source: Sequence[str], target: Sequence[str]) -> dict[str, str | None]:
    """Find which name of one list means the same structure as each name of another.

    Equal names match before spellings do. Where several names of one list have the same canonical name, spelling
    cannot tell them apart, and they only match by equality.

    Args:
        source: Names to choose from.
        target: Names to find.

    Returns:
        For each target name the source name, or None. No source name is used twice.

    >>> match_names(["kidney_left", "liver"], ["Left Kidney", "spleen"])
    {'Left Kidney': 'kidney_left', 'spleen': None}
    """
    matches = {name: name if name in source else None for name in target}
    by_canonical = unambiguous(source)
    for canonical, name in unambiguous(target).items():
        candidate = by_canonical.get(canonical)
        if matches[name] is None and candidate not in matches.values():
            matches[name] = candidate
    return matches


def unambiguous(names: Sequence[str]) -> dict[str, str]:
    """Return those names by canonical name that spelling can tell from the others."""
    counts = Counter(map(canonical_name, names))
    return {canonical: name for name in names if counts[canonical := canonical_name(name)] == 1}
