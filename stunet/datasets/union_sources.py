"""The datasets that a union is made of, and what their labels and cases are in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stunet.datasets.import_state import REPORT_NAME
from stunet.datasets.raw import RawDataset, case_names, read_raw_dataset
from stunet.datasets.side_files import SPLITS_NAME
from stunet.errors import DatasetError, LabelError
from stunet.labels import MANIFEST_NAME, AnnotationManifest, read_manifest, structures_of
from stunet.labels.union_mapping import UnionMapping
from stunet.labels.unions import LabelUnion, merge_labels

__all__ = [
    "UnionSource",
    "annotated_in_union",
    "merge_sources",
    "read_union_source",
    "sampling_weights",
    "source_lookup",
    "sources_of_cases",
]


@dataclass(frozen=True)
class UnionSource:
    """A dataset that goes into a union.

    Attributes:
        name: For example ``Dataset004_Hippocampus``.
        dataset: Its cases.
        manifest: What its cases annotate.
        ignore: Value of its ignore label, if it has one.
    """

    name: str
    dataset: RawDataset
    manifest: AnnotationManifest
    ignore: int | None

    @property
    def id(self) -> int:
        """The number in its name."""
        return _id_of(self.name)

    @cached_property
    def cases(self) -> dict[str, str]:
        """Name in the union of each of its training cases, by name in the source."""
        return {case: f"{_prefix(self.name)}{case}" for case in sorted(self.dataset.cases)}

    @property
    def channels(self) -> list[str]:
        """Names of its channels, in order."""
        names = self.dataset.dataset_json["channel_names"]
        return [str(names[key]) for key in sorted(names, key=int)]

    @property
    def declared(self) -> dict[str, list[str]]:
        """Superclasses that its manifest has, and their members, by name."""
        names = {value: name for name, value in self.manifest.structures.items()}
        return {names[value]: [names[m] for m in members] for value, members in self.manifest.superclasses.items()}

    def first_fold(self) -> dict[str, list[str]] | None:
        """The first fold of its ``splits_final.json`` with the cases' names in the union, if it has such a file.

        Raises:
            DatasetError: Not of nnU-Net's form, or with cases that it does not have.
        """
        path = self.dataset.folder / SPLITS_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {part: [self.cases[case] for case in content[0][part]] for part in ("train", "val")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise DatasetError(
                "folds that cannot be used",
                got=f"{path}: {type(error).__name__} {error}",
                expected="nnU-Net's list of folds with the dataset's own training cases",
                remedy="Correct the file, or move it elsewhere to do without.",
            ) from error


def _id_of(dataset: str) -> int:
    return int(dataset.removeprefix("Dataset").partition("_")[0])


def _prefix(dataset: str) -> str:
    """What the names of a dataset's cases begin with in a union."""
    return f"D{_id_of(dataset):03d}_"


def sources_of_cases(folder: str | os.PathLike[str], cases: Iterable[str]) -> dict[str, str]:
    """The dataset that each case of a union is from; empty where a folder is no union.

    Args:
        folder: The union's folder in ``nnUNet_raw``.
        cases: Names of its cases.
    """
    try:
        report = json.loads((Path(folder) / REPORT_NAME).read_text(encoding="utf-8"))
        source_of = {_prefix(source): source for source in report["mapping"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    found = {case: source_of.get(case.partition("_")[0] + "_") for case in cases}
    return {case: source for case, source in found.items() if source is not None}


def read_union_source(folder: str | os.PathLike[str], *, name: str | None = None) -> UnionSource:
    """Read a dataset that goes into a union.

    Args:
        folder: Its folder in ``nnUNet_raw``.
        name: Its name, where that is not the folder's.

    Raises:
        DatasetError: Incomplete, with regions in place of labels, or with case names that differ only in case.
        LabelError: Its labels or its manifest are malformed.
    """
    name = name or Path(folder).name
    dataset = read_raw_dataset(folder)
    labels = {
        label: value[0] if isinstance(value, list) and len(value) == 1 else value
        for label, value in dataset.dataset_json["labels"].items()
    }
    region = next((label for label, value in labels.items() if isinstance(value, list)), None)
    if region is not None:
        raise DatasetError(
            "a dataset with regions",
            got=f"{name}: {region} is {labels[region]}",
            expected="one label value for each structure; regions overlap, and a voxel of a union has one label",
            remedy="List the plain labels in a copy of its dataset.json, or leave the dataset out.",
        )
    try:
        structures_of(labels)
    except LabelError as error:
        raise LabelError(
            error.problem, got=f"{name}: {error.got}", expected=error.expected, remedy=error.remedy
        ) from error
    folded: dict[str, str] = {}
    for case in dataset.cases:
        if folded.setdefault(case.casefold(), case) != case:
            raise DatasetError(
                "duplicate case names",
                got=f"{name}: {folded[case.casefold()]} and {case}",
                expected="names that differ in more than upper and lower case",
                remedy="Rename one of them.",
            )
    manifest = read_manifest(dataset.folder / MANIFEST_NAME, labels=labels, cases=case_names(dataset))
    return UnionSource(name, dataset, manifest, labels.get("ignore"))


def merge_sources(sources: Sequence[UnionSource], mapping: UnionMapping | None = None) -> LabelUnion:
    """Merge the labels of datasets; see :func:`stunet.labels.unions.merge_labels`."""
    return merge_labels(
        {source.name: list(source.manifest.structures) for source in sources},
        declared={source.name: source.declared for source in sources},
        has_ignore=any(source.ignore is not None for source in sources),
        overrides=mapping,
    )


def sampling_weights(
    source: UnionSource, cases: Sequence[str], given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """How often each case of a source is drawn, relative to all others.

    By default inversely to the square root of the number of cases (arXiv 2303.14444), so that a source of n cases is
    drawn in proportion to sqrt(n). Where the source's own manifest weighs its cases, they keep their proportions.

    Args:
        source: The source.
        cases: Its cases that are part of the union, by their names in the source.
        given: Mean weight of a case by source, in place of that.
    """
    mean = (given or {}).get(source.name, len(cases) ** -0.5 if cases else 1.0)
    own = {case: source.manifest.weight(case) for case in cases}
    scale = mean * len(own) / sum(own.values()) if own else 1.0
    return {case: float(f"{weight * scale:.6g}") for case, weight in own.items()}


def annotated_in_union(source: UnionSource, union: LabelUnion, case: str) -> tuple[set[str], set[str]]:
    """What a case of a source annotates in the union.

    A structure that several labels of the source are parts of is annotated where the case annotates all of these.

    Returns:
        The structures, and the labels that the case annotates without annotating the whole structure.

    Raises:
        LabelError: It annotates a superclass of the union and one of its members.
    """
    manifest = source.manifest
    names = {value: name for name, value in manifest.structures.items()}
    own = {names[value] for value in manifest.annotated(case)}

    def leaves(labels: set[str]) -> set[int]:
        values = (manifest.structures[label] for label in labels)
        return {leaf for value in values for leaf in manifest.superclasses.get(value, (value,))}

    labels_of: dict[str, set[str]] = {}
    for label, structure in union.mapping[source.name].items():
        labels_of.setdefault(structure, set()).add(label)
    structures: set[str] = set()
    partial: set[str] = set()
    for structure in (*union.leaves, *union.superclasses):
        labels = labels_of.get(structure, set())
        if not labels & own:
            continue
        if leaves(labels & own) == leaves(labels):
            structures.add(structure)
        else:
            partial |= labels & own
    for name in structures & set(union.superclasses):
        member = next((leaf for leaf in union.superclasses[name] if leaf in structures), None)
        other = member or next((s for s in structures - {name} if _overlap(union, name, s)), None)
        if other is not None:
            raise LabelError(
                "a case that annotates two overlapping structures",
                got=f"{source.name}, case {case}: {name} and {other}",
                expected="either a superclass or its members",
                remedy="Say what the labels are in a mapping file (--mapping), or mend the source's manifest.",
            )
    return structures, partial


def _overlap(union: LabelUnion, one: str, other: str) -> bool:
    return bool(set(union.superclasses.get(one, ())) & set(union.superclasses.get(other, ())))


def source_lookup(source: UnionSource, union: LabelUnion, dropped: Any = ()) -> dict[int, int]:
    """Value in the union by value in the source; labels in ``dropped`` become background."""
    values = {label: 0 if label in dropped else union.labels[s] for label, s in union.mapping[source.name].items()}
    lookup = {0: 0, **{source.manifest.structures[label]: value for label, value in values.items()}}
    if source.ignore is not None:
        lookup[source.ignore] = union.labels["ignore"]
    return lookup
