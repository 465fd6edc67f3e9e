"""The datasets that a union is made of: read, and found to fit together or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stunet.datasets.raw import RawDataset, case_names, read_raw_dataset
from stunet.datasets.side_files import SPLITS_NAME
from stunet.errors import DatasetError, LabelError
from stunet.labels import MANIFEST_NAME, AnnotationManifest, read_manifest, structures_of
from stunet.labels.label_cases import LABEL_ENDINGS
from stunet.labels.label_maps import NIFTI_ENDINGS
from stunet.labels.nifti import open_volume
from stunet.labels.union_mapping import UnionMapping
from stunet.labels.unions import LabelUnion, merge_labels

__all__ = ["UnionSource", "check_sources", "merge_sources", "read_union_source", "sampling_weights"]


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
        return int(self.name.removeprefix("Dataset").partition("_")[0])

    @cached_property
    def cases(self) -> dict[str, str]:
        """Name in the union of each of its training cases, by name in the source."""
        return {case: f"D{self.id:03d}_{case}" for case in sorted(self.dataset.cases)}

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


def check_sources(sources: Sequence[UnionSource]) -> None:
    """Check that one dataset can hold all these.

    Raises:
        DatasetError: A dataset twice, or datasets of different channels, readers, file endings or units of spacing.
    """
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or len(sources) < 2:
        raise DatasetError(
            "datasets that make no union",
            got=f"{twice} twice" if twice else ", ".join(names) or "none",
            expected="two or more datasets, each once",
            remedy="Correct --from.",
        )
    _check_same(
        sources,
        "file endings",
        lambda source: source.dataset.dataset_json["file_ending"],
        "one file ending, since nnU-Net reads all files of a dataset with one reader",
        "Convert one of them, nnU-Net's dataset.json and all its files.",
    )
    ending = sources[0].dataset.dataset_json["file_ending"]
    if ending not in LABEL_ENDINGS:
        raise DatasetError(
            "label maps that cannot be written anew",
            got=f"{sources[0].name}: {ending}",
            expected=f"one of {', '.join(LABEL_ENDINGS)}, which hold values and geometry in one file",
            remedy="Convert the datasets.",
        )
    _check_same(
        sources,
        "channels",
        lambda source: ", ".join(source.channels),
        "the same channels in the same order",
        "Leave one out, or make its channels those of the other.",
        str.casefold,  # as nnU-Net compares them to choose a normalisation
    )
    _check_same(
        sources,
        "image readers",
        lambda source: str(source.dataset.dataset_json.get("overwrite_image_reader_writer", "None")),
        "the same overwrite_image_reader_writer in dataset.json",
        "Make it the same.",
    )
    if ending in NIFTI_ENDINGS:
        _check_same(
            sources,
            "units of spacing",
            _unit,
            "the same unit in the headers of their images",
            "Convert one of them, spacing and position included.",
        )


def _check_same(
    sources: Sequence[UnionSource],
    what: str,
    of: Callable[[UnionSource], str],
    expected: str,
    remedy: str,
    key: Callable[[str], str] = str,
) -> None:
    values = {source.name: of(source) for source in sources}
    first = sources[0].name
    for name, value in values.items():
        if key(value) != key(values[first]):
            raise DatasetError(
                f"datasets of different {what}",
                got=f"{first}: {values[first]}; {name}: {value}",
                expected=expected,
                remedy=remedy,
            )


def _unit(source: UnionSource) -> str:
    """The unit of spacing in the first image's header; mm where it says nothing, as all programs take it."""
    images, _ = next(iter(source.dataset.cases.values()))
    with open_volume(images[0]) as volume:
        unit = str(volume.header.get_xyzt_units()[0])
    return {"unknown": "mm", "meter": "m", "micron": "µm"}.get(unit, unit)


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
