"""What label values stand for: the ``labels`` of a ``dataset.json``, and published orders of outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stunet.errors import FormError, LabelError, STUNetError, reading
from stunet.forms import Name, decode, read_document

BACKGROUND, IGNORE = "background", "ignore"

_Value = Annotated[int, msgspec.Meta(ge=0)]
_LABELS = dict[str, _Value | Annotated[list[_Value], msgspec.Meta(min_length=1)]]
_VALUE = Annotated[str, msgspec.Meta(pattern=r"^\d+$")]
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
        if zero := [
            name for name, values in self.values.items() if name not in (BACKGROUND, IGNORE) and values == (0,)
        ]:
            raise LabelError(f"{self.source}: {zero[0]} has the value of the background, 0: give it one of its own")
        region = next((name for name, values in self.structures.items() if len(values) > 1), None)
        if region is not None:
            raise LabelError(f"{self.source}: {region} is a region, {list(self.values[region])}: list one value")
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

    def as_predicted(self, truth: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Merge the values of a label map, which may be finer, as nnU-Net writes regions: later ones over earlier."""
        if self._class_order is None:
            return truth
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
    groups = {group: tuple(names) for group, names in content.get("groups", {}).items()}
    return Vocabulary(name, tuple(content["labels"]), content["source"], groups)


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
