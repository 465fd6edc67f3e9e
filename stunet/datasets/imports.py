"""What every import does: write cases atomically, resume what was interrupted, and describe the dataset at last."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stunet.datasets.raw import SPLITS_NAME, sync_to_preprocessed
from stunet.environment import nnunet_folder
from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.files import atomic_path, fingerprint, locked, naming_file, remove_leftovers, write_json_files
from stunet.labels.annotations import MANIFEST_NAME, group_cases, order_manifest
from stunet.processes import run_jobs

REPORT_NAME = "import_report.json"
"""Name of the file that says what an import has found; beside ``dataset.json``."""

ENDING = ".nii.gz"
"""File ending of images and label maps made of masks."""

_JOURNAL, _LOCK = ".import.jsonl", ".import.lock"
_PREPROCESSED = "nnUNet_preprocessed"

Record = dict[str, Any]
"""What is known of an imported case: ``source`` and ``output``, fingerprints, and what the kind of import adds."""


@dataclass(frozen=True, kw_only=True)
class ImportCase:
    """A case to import; a subclass for each kind of source."""

    name: str
    outputs: tuple[Path, ...]  # the files that it becomes
    annotated: tuple[str, ...]  # structures of the dataset
    split: str = "train"  # or val or test
    earlier: Record | None = None  # the record of an earlier run

    def source(self) -> Record:
        """Return fingerprint and settings, with which the outputs are what they were."""
        raise NotImplementedError

    def write(self) -> Record:
        """Write the outputs, each atomically and none before everything is checked; return what was found."""
        raise NotImplementedError


@dataclass
class ImportReport:
    """What an import has done."""

    folder: Path
    records: dict[str, Record]  # what is known of each case of the dataset
    reused: int  # how many of them an earlier run had finished
    failed: dict[str, STUNetError]  # errors of the cases that could not be imported
    kept: list[str]  # cases of an earlier run that this one could not import again, and that stay as they were
    left_out: list[str]  # cases that annotate none of the structures
    has_folds: bool = False  # whether the source's split was written as nnU-Net's only fold
    stale: list[Path] = field(default_factory=list)  # files of the preprocessed folder that differ and were left alone

    @property
    def splits(self) -> dict[str, str]:
        """``train``, ``val`` or ``test`` for each case."""
        return {name: record.get("split", "train") for name, record in self.records.items()}

    @property
    def annotated(self) -> dict[str, Collection[str]]:
        """The structures that each case annotates."""
        return {name: record.get("annotated") or record["voxels"] for name, record in self.records.items()}

    @property
    def overlaps(self) -> dict[tuple[str, str], int]:
        """Voxels that a structure has lost to another, by (loser, winner), the most first."""
        total: Counter[tuple[str, str]] = Counter()
        for record in self.records.values():
            for loser, winners in record.get("overlaps", {}).items():
                total.update({(loser, winner): n for winner, n in winners.items()})
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def case_files(folder: Path, case: str, split: str = "train", ending: str = ENDING) -> tuple[Path, Path]:
    """Return where image and label map of a case belong."""
    part = "Ts" if split == "test" else "Tr"
    return folder / f"images{part}" / f"{case}_0000{ending}", folder / f"labels{part}" / f"{case}{ending}"


def dataset_folder(dataset_id: int, name: str) -> Path:
    """Return the folder of a new raw dataset in ``nnUNet_raw``, which need not exist yet.

    Args:
        dataset_id: From 1 to 999, free in all of nnU-Net's folders.
        name: What follows ``Dataset101_``.

    Raises:
        UsageError: An id or name that nnU-Net cannot take.
        DatasetError: The id belongs to a dataset of another name.
    """
    if not 1 <= dataset_id <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        rule = "give an id from 1 to 999 with -d, and letters, digits, hyphens and underscores with --name"
        raise UsageError(f"impossible id or name {dataset_id}, {name!r}: {rule}")
    full_name = f"Dataset{dataset_id:03d}_{name}"
    others = [Path(v) for v in map(os.environ.get, (_PREPROCESSED, "nnUNet_results")) if v]
    raw = nnunet_folder("nnUNet_raw")
    taken = [d for root in (raw, *others) for d in sorted(root.glob(f"Dataset{dataset_id:03d}_*"))]
    if taken := [d for d in taken if d.name != full_name]:
        raise DatasetError(f"a dataset id that is taken, {dataset_id} by {taken[0]}: choose another one with -d")
    return raw / full_name


def run_import(
    folder: Path,
    settings: Mapping[str, Any],
    cases: Sequence[ImportCase],
    describe: Callable[[ImportReport], tuple[dict[str, Any], Mapping[str, Sequence[str]], Mapping[str, Any]]],
    *,
    structures: Sequence[str],
    superclasses: Mapping[str, Collection[str]] = MappingProxyType({}),
    left_out: Sequence[str],
    outputs_of: Callable[[str, Record], Sequence[Path]],
    remedy: str,
    allow_unannotated: bool,
    num_processes: int,
    on_case: Callable[[str, bool], None],
) -> ImportReport:
    """Import cases, or resume an import of the same settings into the same folder.

    ``dataset.json`` is removed at the start, since cases may change, and written last, since it makes the folder a
    dataset. A journal of finished cases, from which an interrupted import resumes, disappears at the end; the lock file
    stays. Cases that cannot be read are reported, and tried again by the next run. Manifest and folds go into
    ``nnUNet_preprocessed``, too, where that is set.

    Args:
        folder: The dataset's folder in ``nnUNet_raw``.
        settings: What earlier runs must agree with.
        cases: The cases.
        describe: Returns the content of ``dataset.json``, the only fold, and what the manifest has beside groups and
            cases. Where the fold lacks ``train`` or ``val``, nnU-Net makes five folds of its own.
        structures: All structures of the dataset.
        superclasses: Members of those that stand for several.
        left_out: Cases that annotate none of the structures, for the report.
        outputs_of: The files of a case of an earlier run that this one cannot import, and that may stay: they may be
            all that is left of it. None where it may not.
        remedy: What to do about a structure that no training case annotates.
        allow_unannotated: Whether such structures may stay.
        num_processes: Cases at a time.
        on_case: Called as a case is done, with its name and whether an earlier run had finished it.

    Raises:
        DatasetError: The folder holds something else, an import with other settings, or files that no import wrote;
            or a structure that no training case annotates, be it as a member of a superclass.
        CommandError: Another import is at work there.
    """

    def check_annotated(annotated: Iterable[Collection[str]], failed: Mapping[str, STUNetError]) -> None:
        names = {name for each in annotated for name in each}
        covered = names | {leaf for name in names for leaf in superclasses.get(name, ())}
        if missing := [name for name in structures if name not in covered]:
            why = "".join(f" ({len(failed)} cases failed, {name} first: {failed[name]})" for name in [*failed][:1])
            got = f"no training case annotates {', '.join(missing[:5])}{' …' * (len(missing) > 5)}{why}"
            raise DatasetError(f"{got}, and nothing else could teach it: {remedy}, or keep it with --allow-unannotated")

    if not allow_unannotated:
        check_annotated((case.annotated for case in cases if case.split != "test"), {})
    journal = folder / _JOURNAL
    _read_state(folder, settings)  # before anything is written there
    with locked(folder / _LOCK, "import into the same dataset"):
        earlier, began = _read_state(folder, settings)  # another import may have ended in between
        for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "."):
            remove_leftovers(folder / sub, "*")
        began |= {case.name for case in cases}
        lines = [{**settings, "began": sorted(began)}, *({"case": n, "record": r} for n, r in earlier.items())]
        with atomic_path(journal) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (folder / "dataset.json").unlink(missing_ok=True)
        records: dict[str, Record] = {}
        failed: dict[str, STUNetError] = {}
        n_reused = 0
        jobs = [replace(case, earlier=earlier.get(case.name)) for case in cases]
        with naming_file(journal), journal.open("a", encoding="utf-8") as file:
            for job, result in run_jobs(import_case, jobs, num_processes=num_processes):
                if isinstance(result, STUNetError):
                    failed[job.name] = result
                    on_case(job.name, False)
                    continue
                records[job.name], reused = result
                n_reused += reused
                file.write(f"{json.dumps({'case': job.name, 'record': result[0]})}\n")
                file.flush()
                on_case(job.name, reused)
        old = {name: record for name, record in sorted(earlier.items()) if name not in records}
        kept = {name: record for name, record in old.items() if _is_whole(record, outputs_of(name, record))}
        records, failed = dict(sorted({**records, **kept}.items())), dict(sorted(failed.items()))
        report = ImportReport(folder, records, n_reused, failed, list(kept), sorted(left_out))
        if not records or not allow_unannotated:
            training = (names for name, names in report.annotated.items() if report.splits[name] != "test")
            check_annotated(training, failed)
        dataset_json, fold, more = describe(report)
        report.has_folds = bool(fold.get("train") and fold.get("val"))
        _tidy(report, began, str(dataset_json["file_ending"]))
        overlaps: dict[str, dict[str, int]] = {}
        for (loser, winner), n in sorted(report.overlaps.items()):
            overlaps.setdefault(loser, {})[winner] = n
        found = {"left_out": report.left_out, "failed": {name: str(error) for name, error in failed.items()}}
        found |= {"kept": report.kept, "overlaps": overlaps, "cases": records}
        manifest = order_manifest({**group_cases(report.annotated, structures), **more})
        files: dict[Path, Any] = {folder / MANIFEST_NAME: manifest}
        files |= {folder / SPLITS_NAME: [fold]} if report.has_folds else {}
        write_json_files({**files, folder / REPORT_NAME: {**settings, **found}, folder / "dataset.json": dataset_json})
        if preprocessed := os.environ.get(_PREPROCESSED):
            for name in (MANIFEST_NAME, SPLITS_NAME):
                remove_leftovers(Path(preprocessed) / folder.name, name)
            report.stale = sync_to_preprocessed(folder, Path(preprocessed) / folder.name)
        journal.unlink()
    return report


def import_case(case: ImportCase) -> tuple[Record, bool]:
    """Import a case unless an earlier run has, and neither source nor outputs have changed; what processes do.

    Returns:
        Its record, and whether an earlier run had finished it.
    """
    source = case.source()
    if case.earlier and source.items() <= case.earlier.items() and _is_whole(case.earlier, case.outputs):
        return case.earlier, True
    for path in case.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    return {**source, **case.write(), "output": fingerprint(case.outputs)}, False


def _is_whole(record: Record, outputs: Sequence[Path]) -> bool:
    return all(path.exists() for path in outputs) and record.get("output") == fingerprint(outputs)


def _tidy(report: ImportReport, began: Collection[str], ending: str) -> None:
    """Remove files of cases that an import began and that are not part of the dataset, or of another part now."""
    for part in ("Tr", "Ts"):
        mine = {name for name, split in report.splits.items() if (split == "test") == (part == "Ts")}
        for kind, tail in (("images", f"_0000{ending}"), ("labels", ending)):
            sub = report.folder / f"{kind}{part}"
            for path in sorted(sub.iterdir()) if sub.is_dir() else ():
                case = path.name.removesuffix(tail)
                if case not in began or not path.name.endswith(tail):
                    raise DatasetError(f"the import did not write {path}: move it elsewhere and run again")
                if case not in mine:
                    path.unlink()
            if sub.is_dir() and not any(sub.iterdir()):
                sub.rmdir()
    if not report.has_folds:
        (report.folder / SPLITS_NAME).unlink(missing_ok=True)


def _read_state(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Record], set[str]]:
    """Records and begun cases of the import that a folder holds, unfinished (journal) or finished (report)."""
    known: dict[str, Any] = {}
    records: dict[str, Record] = {}
    try:  # without asking first: another import may end in between
        known, *lines = map(_parse, (folder / _JOURNAL).read_text(encoding="utf-8").splitlines())
        records = {line["case"]: line["record"] for line in lines if line}
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            known = _parse((folder / REPORT_NAME).read_text(encoding="utf-8"))
            records = known.get("cases", {})
    others = [key for key in settings if known.get(key) != settings[key]]
    present = folder.iterdir() if folder.is_dir() else ()
    if others and (known or any(not path.name.lstrip(".").startswith("import.") for path in present)):
        found = f"an import with other {', '.join(others)}" if known else "no import of this kind"
        got = f"a dataset that is there already, {folder}, {found}"
        raise DatasetError(f"{got}: choose another id with -d, or remove it")
    return records, {*known.get("began", ()), *records}


def _parse(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):  # a line whose writing was interrupted
        return {}
