"""Annotation manifests: which structures each case of a dataset annotates, and whether its label maps agree."""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from stunet.environment import did_you_mean
from stunet.errors import LabelError, STUNetError, reading
from stunet.files import Name, Names, decode, read_document
from stunet.labels.labels import Labels
from stunet.processes import run_jobs
from stunet.volumes import count_labels

MANIFEST_NAME = "annotated_labels.json"
"""Name of the file, which lies beside ``dataset.json``."""

_VERSION = 1
_EVERYTHING = "everything"


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The form of ``annotated_labels.json``; ``schemas/`` has it as JSON schema for programs of others."""

    version: Annotated[float, msgspec.Meta(ge=_VERSION, le=_VERSION)]
    cases: dict[Name, Name | list[Name]]  # nothing annotated is not background
    groups: dict[Name, Names] = {}
    default: Name | list[Name] | msgspec.UnsetType = msgspec.UNSET
    weights: dict[Name, Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)]] = {}
    superclasses: dict[Name, Annotated[list[Name], msgspec.Meta(min_length=2)]] = {}


@dataclass(frozen=True)
class AnnotationManifest:
    """What the cases of one dataset annotate."""

    # label value of each structure, without background and ignore label, in the order of values
    structures: Mapping[str, int]
    # values of the members of each structure that stands for several, by its own value
    superclasses: Mapping[int, tuple[int, ...]]
    cases: Mapping[str, tuple[str, ...]]  # names of the structures that each listed case annotates
    default: tuple[str, ...] | None  # the same for cases that are not listed; None where each must be
    weights: Mapping[str, float]  # how often a case is drawn relative to others; 1 for cases that are not listed
    source: str  # where this was read

    @cached_property
    def names(self) -> dict[int, str]:
        """Structures by label value."""
        return {value: name for name, value in self.structures.items()}

    @property
    def leaves(self) -> tuple[int, ...]:
        """Values of the structures that stand for themselves: those that a network has outputs for."""
        return tuple(value for value in self.structures.values() if value not in self.superclasses)

    @property
    def is_complete(self) -> bool:
        """Whether every case annotates every leaf, so that no partial supervision is needed."""
        leaves = set(self.leaves)
        lists = [*self.cases.values(), *([] if self.default is None else [self.default])]
        return all(leaves <= {self.structures[name] for name in names} for names in lists)

    def leaves_of(self, *values: int) -> set[int]:
        """Values of the members of superclasses, and of other structures their own."""
        return {leaf for value in values for leaf in self.superclasses.get(value, (value,))}

    def annotated(self, case: str) -> tuple[int, ...]:
        """Label values that a case annotates, in order; a superclass by its own value.

        Raises:
            LabelError: The manifest says nothing about this case.
        """
        names = self.cases.get(case, self.default)
        if names is None:
            raise LabelError(f"{self.source} says nothing about case {case}: add the case, or a default")
        return tuple(sorted(self.structures[name] for name in names))

    def annotated_mask(self, case: str) -> npt.NDArray[np.bool_]:
        """What a case annotates over label values, ``(1 + highest value,)``; entry 0, the background, is True."""
        mask = np.zeros(1 + max(self.structures.values()), np.bool_)
        mask[[0, *self.annotated(case)]] = True
        return mask

    def weight(self, case: str) -> float:
        """How often a case is drawn in training, relative to the others."""
        return float(self.weights.get(case, 1.0))


def read_manifest(
    path: str | os.PathLike[str], *, labels: Mapping[str, Any], cases: Iterable[str] | None = None
) -> AnnotationManifest:
    """Read a manifest and check it against the dataset that it belongs to.

    Args:
        path: ``annotated_labels.json``; where it is absent, every case annotates everything.
        labels: ``labels`` of the dataset's ``dataset.json``.
        cases: Names of the dataset's cases. Where given, the manifest must speak of each of them and of no other.

    Raises:
        LabelError: Not JSON, of another form, or speaking of structures, groups or cases that do not exist.
    """
    structures, source = Labels({"labels": labels}).exclusive, str(path)
    if not Path(path).exists():
        return AnnotationManifest(structures, {}, {}, tuple(structures), {}, f"{path} (absent)")
    with reading(path, "a manifest that cannot be used", LabelError, "correct it"):
        form: _Manifest = decode(read_document(path), _Manifest)

    def check(place: str, names: Iterable[str]) -> tuple[str, ...]:
        owner: dict[int, str] = {}
        for name in names:
            if name not in structures:
                remedy = f"{did_you_mean(name, structures)}See dataset.json"
                raise LabelError(f"{source}: {place} has the unknown structure {name!r}: {remedy}")
            # A voxel labelled with one of two overlapping structures would say nothing certain about the other.
            for leaf in superclasses.get(structures[name], (structures[name],)):
                if leaf in owner:
                    found = f"{name!r} twice" if owner[leaf] == name else f"{owner[leaf]!r} and {name!r}, which overlap"
                    raise LabelError(f"{source}: {place} has {found}: list either a superclass or its members, once")
                owner[leaf] = name
        return tuple(names)

    def check_entry(place: str, entry: str | list[str]) -> tuple[str, ...]:
        if not isinstance(entry, str):
            return check(place, entry)
        if entry not in form.groups:
            known = ", ".join(form.groups) or "the groups, of which there are none"
            raise LabelError(f"{source}: {place} is the unknown group {entry!r}: name one of {known}")
        return tuple(form.groups[entry])

    superclasses: dict[int, tuple[int, ...]] = {}
    for name, members in form.superclasses.items():
        if nested := next((member for member in members if member in form.superclasses), None):
            raise LabelError(f"{source}: superclasses[{name!r}] has the superclass {nested!r} as a member")
        check(f"superclasses[{name!r}]", [name, *members])
    for name, members in form.superclasses.items():
        superclasses[structures[name]] = tuple(sorted(structures[member] for member in members))
    for group, names in form.groups.items():
        check(f"groups[{group!r}]", names)
    listed = {case: check_entry(f"cases[{case!r}]", entry) for case, entry in form.cases.items()}
    default = None if isinstance(form.default, msgspec.UnsetType) else check_entry("default", form.default)
    if cases is not None:
        known = set(cases)
        if unknown := sorted({*listed, *form.weights} - known):
            remedy = f"{did_you_mean(unknown[0], known)}Correct the name"
            raise LabelError(f"{source}: unknown case {unknown[0]!r}{_and_more(unknown)}: {remedy}")
        if missing := [] if default is not None else sorted(known - set(listed)):
            raise LabelError(f"{source} says nothing about case {missing[0]}{_and_more(missing)}: add it, or a default")
    return AnnotationManifest(structures, superclasses, listed, default, form.weights, source)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def order_manifest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest in the order in which it is written, so that equal contents give equal bytes."""
    keys = [key for key in ("groups", "cases", "default", "weights", "superclasses") if key in content]
    ordered = {key: dict(sorted(value.items())) if isinstance(value := content[key], dict) else value for key in keys}
    return {"version": _VERSION, **ordered}


def group_cases(annotated: Mapping[str, Iterable[str]], structures: Iterable[str]) -> dict[str, Any]:
    """Return the content of a manifest for cases that each annotate some structures.

    Cases that annotate the same share a group: ``everything``, or ``group_1`` and so on in the order of the cases'
    names. A list that only one case has stands in the case.
    """
    order = {name: i for i, name in enumerate(structures)}
    lists = {case: tuple(sorted(annotated[case], key=order.__getitem__)) for case in sorted(annotated)}
    groups: dict[str, list[str]] = {}
    cases: dict[str, str | list[str]] = {}
    for names in dict.fromkeys(lists.values()):
        members = [case for case in lists if lists[case] == names]
        if len(names) < len(order) and len(members) == 1:
            cases[members[0]] = list(names)
            continue
        group = _EVERYTHING if len(names) == len(order) else f"group_{1 + len(groups) - (_EVERYTHING in groups)}"
        groups[group] = list(names)
        cases.update(dict.fromkeys(members, group))
    return {"version": _VERSION, "groups": groups, "cases": dict(sorted(cases.items()))}


def measure_coverage(
    manifest: AnnotationManifest,
    label_files: Mapping[str, Path],
    *,
    ignore: int | None = None,
    source_of: Mapping[str, str] = MappingProxyType({}),
    num_processes: int = 1,
    on_case: Callable[[str], None] = lambda case: None,
) -> dict[str, Any]:
    """Compare what the label maps of a dataset hold with what its manifest says.

    Args:
        manifest: What the cases annotate.
        label_files: The label map of each case.
        ignore: Value of the ignore label, if there is one.
        source_of: The dataset that each case of a union is from.
        num_processes: Label maps at a time.
        on_case: Called as a case is done.

    Returns:
        What ``stunet labels check --json`` prints. Of each structure how many cases annotate it and how many have a
        voxel of it, in all and by source; what each case annotates and has; structures that no case annotates, not even
        as a member of a superclass, so that nothing could teach them; structures that some case annotates and none has;
        by case, the structures that it has without annotating them, and label values that ``dataset.json`` does not
        list; and errors of the cases that could not be read.
    """
    case_of = {path: case for case, path in label_files.items()}
    voxels: dict[str, dict[int, int]] = {}
    unreadable: dict[str, str] = {}
    for path, counts in run_jobs(count_labels, list(case_of), num_processes=num_processes):
        if isinstance(counts, STUNetError):
            unreadable[case_of[path]] = str(counts)
        else:
            voxels[case_of[path]] = counts
        on_case(case_of[path])
    voxels, names = dict(sorted(voxels.items())), manifest.names
    annotated = {case: manifest.annotated(case) for case in voxels}
    taught = {value for values in annotated.values() for value in (*values, *manifest.leaves_of(*values))}
    cases: dict[str, dict[str, Any]] = {}
    for case, counts in voxels.items():
        found = {names[value]: n for value, n in counts.items() if value in names}
        cases[case] = {"annotated": [names[value] for value in annotated[case]], "voxels": found}
    odd = {case: [name for name in found["voxels"] if name not in found["annotated"]] for case, found in cases.items()}
    unknown = {case: [value for value in found if value not in (0, ignore, *names)] for case, found in voxels.items()}

    def cover(within: Collection[str]) -> list[dict[str, Any]]:
        rows = []
        for name, value in manifest.structures.items():
            having = [voxels[case][value] for case in within if value in voxels[case]]
            row = {"name": name, "value": value, "annotated": sum(value in annotated[case] for case in within)}
            rows.append({**row, "present": len(having), "voxels": sum(having)})
        return rows

    sources = []
    for source in sorted(set(source_of.values())):
        own = [case for case in voxels if source_of.get(case) == source]
        rows = cover(own)
        counted = {key: {row["name"]: row[key] for row in rows if row[key]} for key in ("annotated", "present")}
        sources.append({"name": source, "cases": len(own), **counted})
    structures = cover(voxels)
    return {
        "structures": structures,
        "sources": sources,
        "cases": cases,
        "never_annotated": [name for value, name in names.items() if value not in taught],
        "never_present": [row["name"] for row in structures if row["annotated"] and not row["present"]],
        "occurs_without_annotation": {case: found for case, found in odd.items() if found},
        "unknown_values": {case: found for case, found in unknown.items() if found},
        "unreadable": dict(sorted(unreadable.items())),
    }
