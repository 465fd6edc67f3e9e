"""Does a dataset hold what its manifest says: which structures are annotated, and which occur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stunet.errors import STUNetError
from stunet.labels.label_maps import count_labels
from stunet.labels.manifest import AnnotationManifest
from stunet.processes import run_jobs

__all__ = ["Coverage", "SourceCoverage", "StructureCoverage", "measure_coverage"]


@dataclass(frozen=True)
class StructureCoverage:
    """How far one structure is covered.

    Attributes:
        name: The structure.
        value: Its label value.
        annotated: Cases that annotate it.
        present: Cases that have a voxel of it.
        voxels: Its voxels in all cases.
    """

    name: str
    value: int
    annotated: int
    present: int
    voxels: int


@dataclass(frozen=True)
class SourceCoverage:
    """What one dataset of a union contributes.

    Attributes:
        name: The dataset.
        cases: How many of its cases could be read.
        annotated: How many of them annotate a structure, by structure, for those that any annotates.
        present: How many of them have a voxel of a structure, by structure, for those that any has.
    """

    name: str
    cases: int
    annotated: Mapping[str, int]
    present: Mapping[str, int]

    @property
    def never_present(self) -> list[str]:
        """Structures that some of its cases annotate and none has: often a label mapped to the wrong structure."""
        return [name for name in self.annotated if name not in self.present]


@dataclass(frozen=True)
class Coverage:
    """What the label maps of a dataset hold, beside what its manifest says.

    Attributes:
        manifest: The manifest.
        voxels: Voxels by label value, of each case that could be read.
        unreadable: Errors of the cases that could not.
        ignore: Value of the ignore label, if there is one.
        source_of: The dataset that each case of a union is from; empty where the dataset is no union.
    """

    manifest: AnnotationManifest
    voxels: Mapping[str, Mapping[int, int]]
    unreadable: Mapping[str, STUNetError]
    ignore: int | None = None
    source_of: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def structures(self) -> list[StructureCoverage]:
        """One row per structure, in the order of label values."""
        annotated = {case: set(self.manifest.annotated(case)) for case in self.voxels}
        rows = []
        for name, value in self.manifest.structures.items():
            counts = [voxels[value] for voxels in self.voxels.values() if voxels.get(value)]
            n_annotated = sum(value in values for values in annotated.values())
            rows.append(StructureCoverage(name, value, n_annotated, len(counts), sum(counts)))
        return rows

    @cached_property
    def sources(self) -> list[SourceCoverage]:
        """One row per dataset of a union, by name; structures in the order of label values."""
        rows = []
        for source in sorted(set(self.source_of.values())):
            cases = [case for case in self.voxels if self.source_of.get(case) == source]
            annotated = Counter(value for case in cases for value in self.manifest.annotated(case))
            present = Counter(value for case in cases for value, n in self.voxels[case].items() if n)
            counts = (
                {name: found[value] for name, value in self.manifest.structures.items() if found[value]}
                for found in (annotated, present)
            )
            rows.append(SourceCoverage(source, len(cases), *counts))
        return rows

    @property
    def never_annotated(self) -> list[str]:
        """Structures that no case annotates, not even as a member of a superclass: nothing could teach them."""
        covered = {
            leaf
            for case in self.voxels
            for value in self.manifest.annotated(case)
            for leaf in (value, *self.manifest.superclasses.get(value, ()))
        }
        return [name for name, value in self.manifest.structures.items() if value not in covered]

    @property
    def never_present(self) -> list[str]:
        """Structures that some case annotates and none has."""
        return [row.name for row in self.structures if row.annotated and not row.present]

    @cached_property
    def contradictions(self) -> dict[str, list[str]]:
        """By case, the structures that it has without annotating them."""
        names = {value: name for name, value in self.manifest.structures.items()}
        found = {
            case: [names[v] for v in voxels if v in names and v not in self.manifest.annotated(case)]
            for case, voxels in self.voxels.items()
        }
        return {case: structures for case, structures in found.items() if structures}

    @property
    def unknown_values(self) -> dict[str, list[int]]:
        """By case, label values that ``dataset.json`` does not list."""
        known = {0, *self.manifest.structures.values(), *([] if self.ignore is None else [self.ignore])}
        found = {case: [v for v in voxels if v not in known] for case, voxels in self.voxels.items()}
        return {case: values for case, values in found.items() if values}

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        names = {value: name for name, value in self.manifest.structures.items()}
        return {
            "structures": [vars(row) for row in self.structures],
            "sources": [vars(row) for row in self.sources],
            "cases": {
                case: {
                    "annotated": [names[value] for value in self.manifest.annotated(case)],
                    "voxels": {names[v]: n for v, n in self.voxels[case].items() if v in names},
                }
                for case in self.voxels
            },
            "never_annotated": self.never_annotated,
            "never_present": self.never_present,
            "occurs_without_annotation": self.contradictions,
            "unknown_values": self.unknown_values,
            "unreadable": {case: str(error) for case, error in self.unreadable.items()},
        }


def measure_coverage(
    manifest: AnnotationManifest,
    label_files: Mapping[str, Path],
    *,
    ignore: int | None = None,
    source_of: Mapping[str, str] | None = None,
    num_processes: int = 1,
    on_case: Callable[[str], None] = lambda case: None,
) -> Coverage:
    """Count the labels of all cases.

    Args:
        manifest: What the cases annotate.
        label_files: Label map of each case.
        ignore: Value of the ignore label, if there is one.
        source_of: The dataset that each case is from, for unions.
        num_processes: Cases read at a time, each by a process of its own.
        on_case: Called with the name of each case as it is done.
    """
    case_of = {path: case for case, path in label_files.items()}
    voxels: dict[str, dict[int, int]] = {}
    unreadable: dict[str, STUNetError] = {}
    for path, counts in run_jobs(count_labels, list(case_of), num_processes=num_processes):
        if isinstance(counts, STUNetError):
            unreadable[case_of[path]] = counts
        else:
            voxels[case_of[path]] = counts
        on_case(case_of[path])
    readable = dict(sorted(voxels.items()))
    return Coverage(manifest, readable, dict(sorted(unreadable.items())), ignore, source_of or {})
