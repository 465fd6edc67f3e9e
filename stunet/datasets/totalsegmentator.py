"""TotalSegmentator's layout as a raw dataset: which cases, structures and split a download has, and masks merged."""

import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stunet.datasets.imports import ENDING, ImportCase, ImportReport, Record, case_files, run_import
from stunet.environment import did_you_mean
from stunet.errors import DatasetError, LabelError, reading
from stunet.files import Names, atomic_path, decode, fingerprint, read_document, temporary_path
from stunet.labels.labels import BACKGROUND, IGNORE, check_names, list_vocabularies, load_vocabulary
from stunet.processes import worthwhile_processes
from stunet.volumes import Volume, check_finite, check_same_grid, read_volume, write_labels

KNOWN_BAD_CASES: dict[str, tuple[str, ...]] = {"1": ("s0864",), "2": ()}
"""Cases of each version that are left out by default: in v1, s0864 has a corrupt CT."""

Version = Literal["auto", "1", "2"]
LabelOrder = Literal["stunet", "official"]

_SPLITS = ("train", "val", "test")
_FORMAT = 1
#: Bytes of images that are imported, with their masks, while a process starts.
_BYTES_PER_START = 2**25


@dataclass(frozen=True)
class SourceCase:
    """A case of the source."""

    name: str
    folder: Path  # the folder, with ct.nii.gz and segmentations
    masks: frozenset[str]  # names of the structures that have a mask file, blank or not: those that it annotates
    split: str  # train, val or test; train where meta.csv does not say

    @property
    def ct(self) -> Path:
        """The image."""
        return self.folder / "ct.nii.gz"

    def mask(self, structure: str) -> Path:
        """The mask of a structure."""
        return self.folder / "segmentations" / f"{structure}{ENDING}"


@dataclass(frozen=True)
class TotalSegmentatorSource:
    """A download in TotalSegmentator's layout."""

    folder: Path
    cases: dict[str, SourceCase]  # its cases by name, sorted
    unlisted: tuple[str, ...]  # cases that meta.csv does not list
    absent: tuple[str, ...]  # cases that meta.csv lists and that are not there


def read_totalsegmentator(folder: str | os.PathLike[str]) -> TotalSegmentatorSource:
    """List the cases of a download and the masks that each has. No image is opened.

    Raises:
        DatasetError: No cases, duplicate names or names that differ only in case, or a split that is none.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DatasetError(f"no such folder {folder}: give a folder in TotalSegmentator's layout")
    splits = _read_splits(folder / "meta.csv")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [path for path in found if (path / "ct.nii.gz").exists() or (path / "segmentations").is_dir()]
    cases = {p.name: SourceCase(p.name, p, _list_masks(p), splits.get(p.name, "train")) for p in found}
    if not cases:
        raise DatasetError(f"no cases in {folder}: give the folder of s0000/ct.nii.gz, s0000/segmentations and so on")
    check_names(cases, folder, DatasetError)
    unlisted = tuple(name for name in cases if splits and name not in splits)
    return TotalSegmentatorSource(folder, cases, unlisted, tuple(sorted(set(splits) - set(cases))))


def _list_masks(folder: Path) -> frozenset[str]:
    names = [path.name for path in (folder / "segmentations").glob("*.nii*") if not path.name.startswith(".")]
    # An uncompressed mask would otherwise count as missing, and its structure silently as not annotated.
    if plain := sorted(name for name in names if name.endswith(".nii")):
        raise DatasetError(f"uncompressed mask {folder / 'segmentations' / plain[0]}: compress it with gzip")
    return frozenset(name.removesuffix(ENDING) for name in names if name.endswith(ENDING))


def _read_splits(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    remedy = "give image_id and split, separated by semicolons, or remove the file to do without the official split"
    with (
        reading(path, "a split that cannot be used", DatasetError, remedy),
        path.open(encoding="utf-8-sig", newline="") as file,
    ):
        rows = [(row["image_id"].strip(), row["split"].strip()) for row in csv.DictReader(file, delimiter=";")]
    if other := next((row for row in rows if row[1] not in _SPLITS), None):
        raise DatasetError(f"{path}: {other[0]} has the split {other[1]!r}, not one of {', '.join(_SPLITS)}: {remedy}")
    name, n = Counter(name for name, _ in rows).most_common(1)[0] if rows else ("", 0)
    if n != 1:
        raise DatasetError(f"{path} has {f'case {name} {n} times' if rows else 'no rows'}: {remedy}")
    return dict(rows)


def choose_structures(
    source: TotalSegmentatorSource,
    task: str = "total",
    version: Version = "auto",
    label_order: LabelOrder | None = None,
    structures: Collection[str] = (),
    groups: Collection[str] = (),
) -> tuple[str, list[str]]:
    """Choose the structures to import, in the order of their label values.

    Args:
        source: Where they are from, which tells the version.
        task: ``total``, the name of a vocabulary of this package, or a JSON file with a list of structures.
        version: Of the task ``total``.
        label_order: ``official``, the order of the task's list; or ``stunet``, alphabetical, as in the published
            weights. ``stunet`` by default for ``total``, ``official`` for others.
        structures: Only these and those of ``groups``; all by default.
        groups: Names of groups of the task.

    Returns:
        The version, or an empty string for other tasks; and the structures.

    Raises:
        LabelError: Unknown task, structure or group.
        DatasetError: The version cannot be told, or masks whose names differ only in case from a structure's.
    """
    known_groups: Mapping[str, Collection[str]] = {}
    told = ""
    if task == "total":
        told = _tell_version(source) if version == "auto" else version
        vocabulary = load_vocabulary(f"totalsegmentator_v{told}")
        known, known_groups = list(vocabulary.labels[1:]), vocabulary.groups
    else:
        known = _read_task(task)
    if unknown := next((group for group in groups if group not in known_groups), None):
        listed = ", ".join(known_groups) or "none"
        raise LabelError(f"unknown group {unknown}: give one of {listed} as --group, or name --structures")
    # liver.nii.gz written Liver.nii.gz would silently count as not annotated.
    folded = {name.casefold(): name for name in known}
    for case in source.cases.values():
        for mask in sorted(case.masks - set(known)):
            if mask.casefold() in folded:
                raise DatasetError(f"{case.mask(mask)} must be spelled {folded[mask.casefold()]}{ENDING}: rename it")
    wanted = {*structures, *(name for group in groups for name in known_groups[group])} or set(known)
    if odd := sorted(wanted - set(known)):
        remedy = f"{did_you_mean(odd[0], known)}Give --structures of the task, such as {', '.join(known[:3])}"
        raise LabelError(f"unknown structure {odd[0]}: {remedy}")
    alphabetical = (label_order or ("stunet" if task == "total" else "official")) == "stunet"
    return told, [name for name in (sorted(known) if alphabetical else known) if name in wanted]


def _tell_version(source: TotalSegmentatorSource) -> str:
    names = {version: set(load_vocabulary(f"totalsegmentator_v{version}").labels) for version in ("1", "2")}
    found = frozenset().union(*(case.masks for case in source.cases.values()))
    only = {"1": sorted(found & names["1"] - names["2"]), "2": sorted(found & names["2"] - names["1"])}
    versions = [version for version in only if only[version]]
    if len(versions) == 1:
        return versions[0]
    got = "; ".join(f"only version {v} has {', '.join(only[v][:3])}" for v in versions)
    got = got or "all masks are such as versions 1 and 2 both have"
    raise DatasetError(f"the version cannot be told: {got}; say which with --version 1 or --version 2")


def _read_task(task: str) -> list[str]:
    if task in list_vocabularies():
        return list(load_vocabulary(task).labels[1:])
    remedy = f"give total, {', '.join(list_vocabularies())}, or a JSON list of structures"
    with reading(task, "an unknown task", LabelError, remedy):
        names: list[str] = decode(read_document(task), Names)
    odd = [name for name, n in Counter(names).items() if n > 1 or name in (BACKGROUND, IGNORE)]
    if odd:
        raise LabelError(f"{task} lists {odd[0]} twice, or as what is no structure: correct the file")
    check_names(names, task)
    return names


@dataclass(frozen=True)
class MergedMasks:
    """A label map made of masks."""

    labels: npt.NDArray[Any]  # label values, uint8 or uint16 of shape (X, Y, Z)
    voxels: dict[int, int]  # voxels by label value, for each mask; 0 where a mask is blank or others cover it wholly
    # how many voxels a structure has lost to others, by its value and theirs. A voxel that three masks claim is lost by
    # the first to the second and by the second to the third
    overlaps: dict[int, dict[int, int]]


def merge_masks(masks: Sequence[tuple[int, Path]], reference: Volume, n_labels: int) -> MergedMasks:
    """Merge one mask per structure into one label map; later masks are painted over earlier ones.

    Raises:
        DatasetError: A mask that cannot be read, lies on another grid, or has other values.
    """
    labels = np.zeros(reference.voxels.shape, np.uint8 if n_labels <= 255 else np.uint16, order="F")
    voxels = {value: 0 for value, _ in masks}
    overlaps: dict[int, dict[int, int]] = {}
    for value, path in masks:
        mask = read_volume(path)
        check_same_grid(mask, reference)
        inside = _inside(mask)
        for loser, n in enumerate(np.bincount(labels[inside]).tolist()):
            if loser and n:
                overlaps.setdefault(loser, {})[value] = n
                voxels[loser] -= n
        labels[inside] = value
        voxels[value] = int(inside.sum())
    return MergedMasks(labels, voxels, overlaps)


def _inside(mask: Volume) -> npt.NDArray[np.bool_]:
    """Where a mask is 1, or 255, after its header's scaling, and 0 elsewhere."""
    # Slope and intercept have 32 bits: 255 times 1/255 is not quite 1.
    values = mask.values if mask.scaling is None else mask.values.round(4)
    inside: npt.NDArray[np.bool_] = values != 0
    marked = values[inside]
    remedy = "write 0 outside and 1 (or 255) inside, of probabilities what is above 0.5"
    if marked.size and not (marked[0] in (1, 255) and (marked == marked[0]).all()):
        found = np.unique(marked)
        shown = ", ".join(f"{v:g}" for v in found[:5]) + ", …" * (len(found) > 5)
        raise DatasetError(f"{mask.path}: values {shown}, not 0 and 1, or 0 and 255: {remedy}")
    if inside.all() and mask.scaling is not None:
        slope, inter = mask.scaling
        raise DatasetError(f"{mask.path}: 1 everywhere, by slope {slope:g} and intercept {inter:g}: {remedy}")
    return inside


@dataclass(frozen=True, kw_only=True)
class MaskCase(ImportCase):
    """A case of one image and separate masks."""

    case: SourceCase
    structures: Sequence[str]  # all structures of the dataset, later ones painted over earlier ones
    link: bool  # whether the image is linked instead of copied

    def source(self) -> Record:
        """Return split and fingerprint."""
        if not self.case.masks:
            raise DatasetError(f"no masks in {self.case.folder / 'segmentations'}: add some, or leave it out")
        names = self._names.items()
        files = [self.case.ct, *(self.case.mask(name) for _, name in names)]
        return {"split": self.split, "source": fingerprint(files, list(map(str, names)))}

    @property
    def _names(self) -> dict[int, str]:
        """The structures that it annotates, by label value."""
        return {value: name for value, name in enumerate(self.structures, start=1) if name in self.annotated}

    def write(self) -> Record:
        """Write image and label map; return voxels by structure, and overlaps by loser and winner."""
        ct, names = read_volume(self.case.ct), self._names
        check_finite(ct)
        merged = merge_masks([(value, self.case.mask(s)) for value, s in names.items()], ct, len(self.structures))
        image, label = self.outputs
        if self.link:
            temporary = temporary_path(image)
            try:
                os.link(self.case.ct.resolve(), temporary)
            except OSError:  # another file system, or one without hard links
                temporary.symlink_to(self.case.ct.resolve())
            os.replace(temporary, image)
            temporary.unlink(missing_ok=True)  # a rename of one link of a file over another does nothing
        else:
            with atomic_path(image) as temporary:
                shutil.copyfile(self.case.ct, temporary)
        write_labels(merged.labels, ct, label)
        lost = sorted(merged.overlaps.items())
        overlaps = {names[loser]: {names[winner]: n for winner, n in to.items()} for loser, to in lost}
        return {"voxels": {names[value]: n for value, n in merged.voxels.items()}, "overlaps": overlaps}


def import_cases(
    cases: Sequence[SourceCase],
    structures: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    details: Mapping[str, Any],
    excluded: Collection[str] = (),
    link_images: bool = False,
    allow_unannotated: bool = False,
    num_processes: int | None = 1,
    on_case: Callable[[str, bool], None] = lambda case, reused: None,
) -> ImportReport:
    """Import cases, or resume an import of the same structures into the same folder.

    Cases are written atomically, ``dataset.json`` last, with the cases that could be imported; those that could not are
    reported, and tried again by the next run. Cases of an earlier run leave the dataset only where they are excluded by
    name. The same source gives the same bytes, however often the import was interrupted.

    Args:
        cases: What the source has.
        structures: Names in the order of their label values, from 1; later ones are painted over earlier ones.
        folder: The dataset's folder in ``nnUNet_raw``, and likewise other arguments and errors as of
            :func:`stunet.datasets.imports.run_import`.
        details: What else the report shall say and a later run must agree with.
        excluded: Names of cases to leave out.
        link_images: Hard links (symbolic ones to other file systems) in place of copies of the images.
        allow_unannotated: Whether structures may stay that no training case annotates.
        num_processes: Cases at a time; None for as many as cores and images are worth.
        on_case: Called as a case is done.
    """
    folder, mode = Path(folder), "link" if link_images else "copy"
    jobs: list[ImportCase] = []
    left_out, included = [], [case for case in cases if case.name not in excluded]
    for case in included:
        annotated = tuple(name for name in structures if name in case.masks)
        if case.masks and not annotated:  # without any mask a case does not annotate other structures: it is broken
            left_out.append(case.name)
            continue
        job = MaskCase(
            name=case.name,
            split=case.split,
            annotated=annotated,
            outputs=case_files(folder, case.name, case.split),
            case=case,
            structures=structures,
            link=link_images,
        )
        jobs.append(job)

    def describe(report: ImportReport) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]:
        parts = report.splits
        labels = {name: value for value, name in enumerate([BACKGROUND, *structures])}
        n_training = sum(part != "test" for part in parts.values())
        described = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": n_training, "file_ending": ENDING}
        return described, {part: [n for n in parts if parts[n] == part] for part in ("train", "val")}, {}

    if num_processes is None:
        size = sum(case.ct.stat().st_size for case in included if case.ct.exists())
        num_processes = worthwhile_processes(size, share=_BYTES_PER_START)
    return run_import(
        folder,
        {"format": _FORMAT, **details, "images": mode, "structures": list(structures)},
        jobs,
        describe,
        structures=structures,
        left_out=left_out,
        outputs_of=lambda name, record: () if name in excluded else case_files(folder, name, record["split"]),
        remedy="choose --structures or --group, see --exclude",
        allow_unannotated=allow_unannotated,
        num_processes=num_processes,
        on_case=on_case,
    )
