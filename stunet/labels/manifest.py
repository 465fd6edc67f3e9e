"""Annotation manifests: which structures each case of a dataset annotates."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import LabelError
from stunet.labels.manifest_format import FORMAT_VERSION, check_form, parse_manifest, refuse_manifest

__all__ = ["MANIFEST_NAME", "AnnotationManifest", "bind_manifest", "group_cases", "read_manifest", "structures_of"]

MANIFEST_NAME = "annotated_labels.json"
"""Name of the file, which lies beside ``dataset.json``."""

_EVERYTHING = "everything"


@dataclass(frozen=True)
class AnnotationManifest:
    """What the cases of one dataset annotate.

    Attributes:
        structures: Label value of each structure, without background and ignore label, in the order of values.
        superclasses: Values of the members of each structure that stands for several, by its own value.
        cases: Names of the structures that each listed case annotates.
        default: The same for cases that are not listed; None where each must be.
        weights: How often a case is drawn relative to others; 1 for cases that are not listed.
        source: Where this was read.
    """

    structures: Mapping[str, int]
    superclasses: Mapping[int, tuple[int, ...]]
    cases: Mapping[str, tuple[str, ...]]
    default: tuple[str, ...] | None
    weights: Mapping[str, float]
    source: str

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

    def annotated(self, case: str) -> tuple[int, ...]:
        """Label values that a case annotates, in order; a superclass by its own value.

        Raises:
            LabelError: The manifest says nothing about this case.
        """
        names = self.cases.get(case, self.default)
        if names is None:
            raise refuse_manifest(
                self.source, f"nothing about case {case}", "an entry for each case, or a default", "Add the case."
            )
        return tuple(sorted(self.structures[name] for name in names))

    def annotated_mask(self, case: str) -> npt.NDArray[np.bool_]:
        """What a case annotates as a vector over label values.

        Returns:
            Shape ``(1 + highest value,)``; entry 0, the background, is True.
        """
        mask = np.zeros(1 + max(self.structures.values()), np.bool_)
        mask[[0, *self.annotated(case)]] = True
        return mask

    def weight(self, case: str) -> float:
        """How often a case is drawn in training, relative to the others."""
        return float(self.weights.get(case, 1.0))


def structures_of(labels: Mapping[str, Any]) -> dict[str, int]:
    """The structures of a dataset: its labels without background and ignore label, in the order of values.

    Args:
        labels: ``labels`` of a ``dataset.json``.

    Raises:
        LabelError: Regions of several values, values twice, or names that differ only in case.
    """
    structures: dict[str, int] = {}
    for name, value in labels.items():
        if name in ("background", "ignore"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refuse_labels(f"{name!r}: {value!r}", "one whole number above 0 for each structure (no regions)")
        structures[name] = value
    if not structures:
        raise _refuse_labels("no structures", "at least one besides the background")
    check_names(structures)
    if len(set(structures.values())) < len(structures):
        raise _refuse_labels("a value that stands twice", "a value of its own for each structure")
    return dict(sorted(structures.items(), key=lambda item: item[1]))


def check_names(names: Iterable[str]) -> None:
    """Refuse names that differ only in case: where they are file names, some systems take them for one.

    Raises:
        LabelError: Names both.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise _refuse_labels(f"{other!r} and {name!r}", "names that differ in more than upper and lower case")


def _refuse_labels(got: str, expected: str) -> LabelError:
    return LabelError(
        "labels that cannot be annotated in part",
        got=got,
        expected=expected,
        remedy="Correct the labels, in dataset.json for example.",
    )


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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        structures = structures_of(labels)
        return AnnotationManifest(structures, {}, {}, tuple(structures), {}, f"{path} (absent)")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse_manifest(str(path), str(error), "a text file that can be read") from error
    return bind_manifest(parse_manifest(text, source=str(path)), labels=labels, cases=cases, source=str(path))


def bind_manifest(
    content: Mapping[str, Any], *, labels: Mapping[str, Any], cases: Iterable[str] | None = None, source: str
) -> AnnotationManifest:
    """Check the content of a manifest against a dataset. Arguments and errors as in :func:`read_manifest`."""
    check_form(dict(content), source=source)
    structures = structures_of(labels)
    superclasses = _bind_superclasses(content.get("superclasses", {}), structures, source)
    groups = content.get("groups", {})
    for group, names in groups.items():
        _check_structures(f"groups[{group!r}]", names, structures, superclasses, source)

    def names_of(place: str, entry: Any) -> tuple[str, ...]:
        if isinstance(entry, str):
            if entry not in groups:
                raise refuse_manifest(
                    source,
                    f"{place} is the unknown group {entry!r}",
                    f"one of {', '.join(groups) or 'the groups, of which there are none'}",
                )
            return tuple(groups[entry])
        _check_structures(place, entry, structures, superclasses, source)
        return tuple(entry)

    listed = {case: names_of(f"cases[{case!r}]", entry) for case, entry in content["cases"].items()}
    default = names_of("default", content["default"]) if "default" in content else None
    weights = dict(content.get("weights", {}))
    if cases is not None:
        _check_cases({*listed, *weights}, set(listed), set(cases), default is not None, source)
    return AnnotationManifest(structures, superclasses, listed, default, weights, source)


def _check_cases(named: set[str], listed: set[str], cases: set[str], has_default: bool, source: str) -> None:
    unknown = sorted(named - cases)
    if unknown:
        raise refuse_manifest(
            source,
            f"unknown case {unknown[0]!r}{_and_more(unknown)}{_similar(unknown[0], cases)}",
            "cases of the dataset",
            "Correct the case's name, or take it out.",
        )
    missing = [] if has_default else sorted(cases - listed)
    if missing:
        raise refuse_manifest(
            source,
            f"nothing about case {missing[0]}{_and_more(missing)}",
            "an entry for each case, or a default",
            "Add the case.",
        )


def _bind_superclasses(
    content: Mapping[str, list[str]], structures: Mapping[str, int], source: str
) -> dict[int, tuple[int, ...]]:
    for name, members in content.items():
        place = f"superclasses[{name!r}]"
        _check_structures(place, [name, *members], structures, {}, source)
        nested = next((member for member in members if member in content), None)
        if nested is not None:
            raise refuse_manifest(source, f"{place} has the superclass {nested!r} as a member", "members that are none")
    return {structures[name]: tuple(sorted(structures[m] for m in members)) for name, members in content.items()}


def _check_structures(
    place: str,
    names: Iterable[str],
    structures: Mapping[str, int],
    superclasses: Mapping[int, tuple[int, ...]],
    source: str,
) -> None:
    owner: dict[int, str] = {}
    for name in names:
        if name not in structures:
            raise refuse_manifest(
                source,
                f"{place} has the unknown structure {name!r}{_similar(name, structures)}",
                "structures that dataset.json lists",
                "Correct the name, here or in dataset.json.",
            )
        # A voxel labelled with one of two overlapping structures would say nothing certain about the other.
        for leaf in superclasses.get(structures[name], (structures[name],)):
            other = owner.setdefault(leaf, name)
            if other != name:
                raise refuse_manifest(
                    source, f"{place} has {other!r} and {name!r}, which overlap", "either a superclass or its members"
                )


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1) or [k for k in known if k.casefold() == name.casefold()]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def group_cases(annotated: Mapping[str, Iterable[str]], structures: Iterable[str]) -> dict[str, Any]:
    """The content of a manifest for cases that each annotate some structures.

    Cases that annotate the same share a group: ``everything``, or ``group_1`` and so on in the order of the cases'
    names. A list that only one case has stands in the case.

    Args:
        annotated: Structures by case.
        structures: All structures, in the order in which lists shall have them.
    """
    order = {name: i for i, name in enumerate(structures)}
    lists = {case: tuple(sorted(annotated[case], key=order.__getitem__)) for case in sorted(annotated)}
    shared = {names: [case for case in lists if lists[case] == names] for names in dict.fromkeys(lists.values())}
    groups: dict[str, list[str]] = {}
    cases: dict[str, str | list[str]] = {}
    for names, members in shared.items():
        if len(names) < len(order) and len(members) == 1:
            cases[members[0]] = list(names)
            continue
        group = _EVERYTHING if len(names) == len(order) else f"group_{1 + len(groups) - (_EVERYTHING in groups)}"
        groups[group] = list(names)
        cases.update(dict.fromkeys(members, group))
    return {"version": FORMAT_VERSION, "groups": groups, "cases": dict(sorted(cases.items()))}
