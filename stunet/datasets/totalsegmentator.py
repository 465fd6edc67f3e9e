"""TotalSegmentator's folder layout: which cases, structures and split a download has."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stunet.errors import DatasetError, LabelError, UsageError
from stunet.labels import list_vocabularies, load_vocabulary
from stunet.labels.manifest import check_names

__all__ = ["KNOWN_BAD_CASES", "SourceCase", "TotalSegmentatorSource", "choose_structures", "read_totalsegmentator"]

KNOWN_BAD_CASES: dict[str, tuple[str, ...]] = {"1": ("s0864",), "2": ()}
"""Cases of each version that are left out by default: in v1, s0864 has a corrupt CT."""

_MASK_ENDING = ".nii.gz"
_SPLITS = ("train", "val", "test")
_LABEL_ORDERS = ("stunet", "official")


@dataclass(frozen=True)
class SourceCase:
    """A case as it lies in the source.

    Attributes:
        name: Name of its folder.
        folder: The folder, with ``ct.nii.gz`` and ``segmentations``.
        masks: Names of the structures that have a mask file, blank or not: those that it annotates.
        split: ``train``, ``val`` or ``test``; ``train`` where ``meta.csv`` does not say.
    """

    name: str
    folder: Path
    masks: frozenset[str]
    split: str

    @property
    def ct(self) -> Path:
        """The image."""
        return self.folder / "ct.nii.gz"

    def mask(self, structure: str) -> Path:
        """The mask of a structure."""
        return Path(f"{self.folder}/segmentations/{structure}{_MASK_ENDING}")  # joining parts takes thrice the time


@dataclass(frozen=True)
class TotalSegmentatorSource:
    """A download in TotalSegmentator's layout.

    Attributes:
        folder: Where it is.
        cases: Its cases by name, sorted.
        has_meta: Whether there is a ``meta.csv``.
        unlisted: Cases that ``meta.csv`` does not list.
        absent: Cases that ``meta.csv`` lists and that are not there.
    """

    folder: Path
    cases: dict[str, SourceCase]
    has_meta: bool
    unlisted: tuple[str, ...]
    absent: tuple[str, ...]

    def annotated(self, structures: Iterable[str]) -> dict[str, list[str]]:
        """Which of some structures each case annotates, in their order."""
        structures = list(structures)
        return {name: [s for s in structures if s in case.masks] for name, case in self.cases.items()}


def read_totalsegmentator(folder: str | os.PathLike[str]) -> TotalSegmentatorSource:
    """List the cases of a download and the masks that each has. No image is opened.

    Raises:
        DatasetError: No cases, names that stand twice or differ only in case, or a split that is none.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DatasetError(
            "no such folder", got=folder, expected="a folder in TotalSegmentator's layout", remedy="Check the path."
        )
    splits = _read_splits(folder / "meta.csv")
    cases: dict[str, SourceCase] = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = folder / entry.name
        if entry.is_dir() and ((path / "ct.nii.gz").exists() or (path / "segmentations").is_dir()):
            cases[entry.name] = SourceCase(entry.name, path, _list_masks(path), splits.get(entry.name, "train"))
    if not cases:
        raise DatasetError(
            "a folder without cases",
            got=folder,
            expected="folders such as s0000 with ct.nii.gz and segmentations/STRUCTURE.nii.gz",
            remedy="Give the folder that holds the cases.",
        )
    _check_case_names(cases)
    unlisted = tuple(name for name in cases if splits and name not in splits)
    absent = tuple(sorted(name for name in splits if name not in cases))
    return TotalSegmentatorSource(folder, cases, bool(splits), unlisted, absent)


def _list_masks(folder: Path) -> frozenset[str]:
    try:
        names = [path.name for path in (folder / "segmentations").iterdir()]
    except FileNotFoundError:
        return frozenset()
    masks = {name.removesuffix(_MASK_ENDING) for name in names if name.endswith(_MASK_ENDING) and name[0] != "."}
    # An uncompressed mask would otherwise count as missing, and its structure silently as not annotated.
    plain = sorted(name for name in names if name.endswith(".nii"))
    if plain:
        raise DatasetError(
            "an uncompressed mask",
            got=folder / "segmentations" / plain[0],
            expected="masks that end in .nii.gz",
            remedy="Compress it with gzip.",
        )
    return frozenset(masks)


def _check_case_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise DatasetError(
                "duplicate case names",
                got=f"{other} and {name}",
                expected="names that differ in more than upper and lower case",
                remedy="Rename or remove one of them.",
            )


def _read_splits(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refuse_meta(path, str(error), "a text file with the columns image_id and split") from error
    if not rows or not {"image_id", "split"} <= set(rows[0]):
        columns = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise _refuse_meta(path, columns, "the columns image_id and split, separated by semicolons")
    splits: dict[str, str] = {}
    for row in rows:
        name, split = (row["image_id"] or "").strip(), (row["split"] or "").strip()
        if split not in _SPLITS:
            raise _refuse_meta(path, f"{name} has the split {split!r}", f"one of {', '.join(_SPLITS)}")
        if name in splits:
            raise _refuse_meta(path, f"duplicate case name {name}", "each case once")
        splits[name] = split
    return splits


def _refuse_meta(path: Path, got: str, expected: str) -> DatasetError:
    return DatasetError(
        "a meta.csv that cannot be used",
        got=f"{path}: {got}",
        expected=expected,
        remedy="Correct the file, or remove it to do without the official split.",
    )


def choose_structures(
    source: TotalSegmentatorSource,
    *,
    task: str = "total",
    version: str = "auto",
    label_order: str | None = None,
    structures: Collection[str] = (),
    groups: Collection[str] = (),
) -> tuple[str, list[str]]:
    """The structures to import, in the order of their label values.

    Args:
        source: Where they are from, which tells the version.
        task: ``total``, the name of a vocabulary of this package, or a JSON file with a list of structures.
        version: ``auto``, ``1`` or ``2``; counts for the task ``total`` alone.
        label_order: ``official``, the order of the task's list; or ``stunet``, alphabetical, which is the order of
            the published STU-Net weights where all 104 structures of version 1 are imported. ``stunet`` by default
            for ``total``, ``official`` for others.
        structures: Only these and those of ``groups``; all by default.
        groups: Names of groups of the task.

    Returns:
        The version, or an empty string for other tasks; and the structures.

    Raises:
        UsageError, LabelError: Unknown task, version, order, structure or group.
        DatasetError: The version cannot be told, or masks whose names differ only in case from a structure's.
    """
    if label_order not in (None, *_LABEL_ORDERS):
        raise UsageError(
            "unknown label order", got=label_order, expected=" or ".join(_LABEL_ORDERS), remedy="Correct --label-order."
        )
    if version not in ("auto", "1", "2"):
        raise UsageError("unknown version", got=version, expected="auto, 1 or 2", remedy="Correct --version.")
    known_groups: dict[str, tuple[str, ...]] = {}
    if task == "total":
        version = _tell_version(source) if version == "auto" else version
        vocabulary = load_vocabulary(f"totalsegmentator_v{version}")
        known, known_groups = list(vocabulary.labels[1:]), dict(vocabulary.groups)
    else:
        version, known = "", _read_task(task)
    for group in groups:
        if group not in known_groups:
            raise LabelError(
                "unknown group",
                got=group,
                expected=f"one of {', '.join(known_groups) or 'none'}",
                remedy="Correct --group, or name the structures with --structures.",
            )
    _check_masks(source, known)
    wanted = {*structures, *(name for group in groups for name in known_groups[group])} or set(known)
    for name in sorted(wanted - set(known)):
        close = difflib.get_close_matches(name, known, 3) or known[:3]
        raise LabelError(
            "unknown structure",
            got=name,
            expected=f"one of the task's, such as {', '.join(close)}",
            remedy="Correct --structures, or choose another --task or --version.",
        )
    alphabetical = (label_order or ("stunet" if task == "total" else "official")) == "stunet"
    return version, [name for name in (sorted(known) if alphabetical else known) if name in wanted]


def _tell_version(source: TotalSegmentatorSource) -> str:
    names = {version: set(load_vocabulary(f"totalsegmentator_v{version}").labels) for version in ("1", "2")}
    found = frozenset().union(*(case.masks for case in source.cases.values()))
    only = {"1": sorted(found & names["1"] - names["2"]), "2": sorted(found & names["2"] - names["1"])}
    versions = [version for version in only if only[version]]
    if len(versions) == 1:
        return versions[0]
    got = "; ".join(f"only version {v} has {', '.join(only[v][:3])}" for v in versions)
    raise DatasetError(
        "a source whose version cannot be told",
        got=got or "masks that versions 1 and 2 both have",
        expected="masks that one of the versions alone has",
        remedy="Say which with --version 1 or --version 2.",
    )


def _read_task(task: str) -> list[str]:
    if task in list_vocabularies():
        return list(load_vocabulary(task).labels[1:])
    try:
        names = json.loads(Path(task).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(
            "unknown task",
            got=f"{task}: {error}",
            expected=f"total, {', '.join(list_vocabularies())}, or a JSON file with a list of structures",
            remedy="Correct --task.",
        ) from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise _refuse_task(task, "no list of names")
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise _refuse_task(task, f"{twice[0]} twice")
    reserved = {"background", "ignore"} & set(names)
    if reserved:
        raise _refuse_task(task, f"{reserved.pop()}, which is no structure")
    check_names(names)
    return names


def _refuse_task(task: str, got: str) -> LabelError:
    return LabelError(
        "a list of structures that cannot be used",
        got=f"{task}: {got}",
        expected='["liver", "spleen", …]',
        remedy="Correct the file.",
    )


def _check_masks(source: TotalSegmentatorSource, known: Sequence[str]) -> None:
    # liver.nii.gz written Liver.nii.gz would silently count as not annotated.
    folded = {name.casefold(): name for name in known}
    for case in source.cases.values():
        for mask in sorted(case.masks - set(known)):
            if mask.casefold() in folded:
                raise DatasetError(
                    "a mask whose name differs from its structure's in case",
                    got=case.mask(mask),
                    expected=f"{folded[mask.casefold()]}{_MASK_ENDING}",
                    remedy="Rename it.",
                )
