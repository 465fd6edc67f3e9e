"""Label vocabularies: the JSON files beside this module, and label files of users."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from stunet.errors import LabelError

__all__ = ["Vocabulary", "list_vocabularies", "load_vocabulary", "read_label_file", "vocabulary_for"]

_BACKGROUND = "background"
#: Orders that weights were published in; the others are those of datasets.
_OF_PUBLISHED_WEIGHTS = ("abdomenatlas_9", "totalsegmentator_104")


@dataclass(frozen=True)
class Vocabulary:
    """Names of a network's outputs.

    Attributes:
        name: Name of the vocabulary, or of the file it was read from.
        labels: Names by label value, background first.
        source: Where the order is from.
        groups: Structures by the name of a group, where the source makes such groups.
    """

    name: str
    labels: tuple[str, ...]
    source: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dataset_labels(self) -> dict[str, int]:
        """The form of ``labels`` in nnU-Net's ``dataset.json``: values by name."""
        return {name: value for value, name in enumerate(self.labels)}


def list_vocabularies() -> list[str]:
    """Names of all vocabularies of this package."""
    return sorted(
        entry.name.removesuffix(".json") for entry in files("stunet.labels").iterdir() if entry.name.endswith(".json")
    )


def load_vocabulary(name: str) -> Vocabulary:
    """A vocabulary of this package.

    Raises:
        LabelError: There is none of this name.
    """
    if name not in list_vocabularies():
        raise LabelError(
            "unknown label vocabulary",
            got=name,
            expected=f"one of {', '.join(list_vocabularies())}",
            remedy="Choose one of these.",
        )
    content = json.loads((files("stunet.labels") / f"{name}.json").read_text(encoding="utf-8"))
    groups = {group: tuple(names) for group, names in content.get("groups", {}).items()}
    return Vocabulary(name, tuple(content["labels"]), content["source"], groups)


def vocabulary_for(num_classes: int) -> Vocabulary:
    """The label order of the published weights that have so many outputs.

    Args:
        num_classes: Outputs, background included.

    Raises:
        LabelError: No published weights have so many.
    """
    known = [load_vocabulary(name) for name in _OF_PUBLISHED_WEIGHTS]
    for vocabulary in known:
        if len(vocabulary.labels) == num_classes:
            return vocabulary
    raise LabelError(
        "outputs without names",
        got=f"{num_classes} outputs",
        expected=f"a label file, or {' or '.join(str(len(v.labels)) for v in known)} outputs, whose names are known",
        remedy=f"Name the {num_classes} outputs with --labels FILE.json, background included.",
    )


def read_label_file(path: str | os.PathLike[str], num_classes: int) -> Vocabulary:
    """Read the names of a network's outputs.

    Args:
        path: JSON: a list of names, names by value, values by name, or a ``dataset.json`` with ``labels``.
        num_classes: Outputs of the network, background included.

    Raises:
        LabelError: Missing, not JSON, another number of names, values with gaps, names twice, no background at 0.
    """
    path = Path(path)
    if not path.is_file():
        raise LabelError("missing label file", got=path, expected="a JSON file", remedy="Check --labels.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _malformed(path, f"not JSON: {error}") from error
    labels = _in_order(content.get("labels", content) if isinstance(content, dict) else content, path)
    if len(labels) != num_classes:
        raise LabelError(
            "a label list of the wrong length",
            got=f"{path}: {len(labels)} names",
            expected=f"{num_classes} names, background included, as the network has so many outputs",
            remedy="Give the list that belongs to these weights.",
        )
    if labels[0] != _BACKGROUND:
        raise _malformed(path, f"label 0 is {labels[0]!r}, not 'background'")
    return Vocabulary(path.name, labels, str(path))


def _in_order(content: Any, path: Path) -> tuple[str, ...]:
    if isinstance(content, list):
        pairs = list(enumerate(content))
    elif isinstance(content, dict) and all(isinstance(v, int) and not isinstance(v, bool) for v in content.values()):
        pairs = [(value, name) for name, value in content.items()]
    elif isinstance(content, dict) and all(key.isdecimal() for key in content):
        pairs = [(int(value), name) for value, name in content.items()]
    else:
        raise _malformed(path, "neither names in order, nor names by value, nor values by name")
    names = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if not all(isinstance(name, str) and name for name in names):
        raise _malformed(path, "a name that is not text")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _malformed(path, f"{twice} twice")
    values = sorted(value for value, _ in pairs)
    if values != list(range(len(values))):
        missing = next(value for value in range(len(values)) if value not in values)
        raise _malformed(path, f"no name for label {missing}")
    return tuple(names)


def _malformed(path: Path, problem: str) -> LabelError:
    return LabelError(
        "a label file that cannot be used",
        got=f"{path}: {problem}",
        expected='["background", "liver", …], {"0": "background", …} or {"background": 0, …}',
        remedy="Correct the file.",
    )
