"""What every import does: write cases atomically, resume what was interrupted, and describe the dataset at the end."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stunet.datasets.raw import SPLITS_NAME, sync_to_preprocessed
from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.files import atomic_path, fingerprint, locked, naming_file, remove_leftovers, write_json_files
from stunet.labels import MANIFEST_NAME, order_manifest
from stunet.processes import run_jobs

REPORT_NAME = "import_report.json"
"""Name of the file that says what an import has found; beside ``dataset.json``."""

ENDING = ".nii.gz"
"""File ending of images and label maps made of masks."""

_JOURNAL, _LOCK = ".import.jsonl", ".import.lock"

Record = dict[str, Any]
"""What is known of an imported case: ``source`` and ``output``, fingerprints, and what the kind of import adds."""


@dataclass(frozen=True, kw_only=True)
class ImportCase:
    """A case to import; a subclass for each kind of source.

    Attributes:
        name: Name of the case.
        outputs: The files that it becomes.
        earlier: The record of an earlier run.
    """

    name: str
    outputs: tuple[Path, ...]
    earlier: Record | None = None

    def source(self) -> Record:
        """Return fingerprint and settings, with which the outputs are what they were."""
        raise NotImplementedError

    def write(self) -> Record:
        """Write the outputs, each atomically and none before everything is checked; return what was found."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImportReport:
    """What an import has done.

    Attributes:
        folder: The dataset's folder.
        records: What is known of each case of the dataset.
        reused: How many of them an earlier run had finished.
        left_out: Cases left out because they annotate none of the structures.
        failed: Errors of the cases that could not be imported.
        kept: Cases of an earlier run that this one could not import again, and that stay as they were.
        has_folds: Whether the source's split was written as nnU-Net's only fold.
        stale: Files of the preprocessed folder that differ from the new ones and were left alone.
    """

    folder: Path
    records: dict[str, Record]
    reused: int
    left_out: list[str]
    failed: dict[str, STUNetError]
    kept: list[str]
    has_folds: bool = False
    stale: list[Path] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, str]:
        """``train``, ``val`` or ``test`` for each case."""
        return {name: record.get("split", "train") for name, record in self.records.items()}

    @property
    def overlaps(self) -> dict[tuple[str, str], int]:
        """Voxels that a structure has lost to another, by (loser, winner), the most first."""
        total: Counter[tuple[str, str]] = Counter()
        for record in self.records.values():
            for loser, winners in record.get("overlaps", {}).items():
                total.update({(loser, winner): n for winner, n in winners.items()})
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def mention_failures(self) -> str:
        """Return the end of a sentence about what is missing: cases that failed may be why."""
        if not self.failed:
            return ""
        name, error = next(iter(self.failed.items()))
        return f" ({len(self.failed)} cases failed, {name} first: {error})"


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset that are no cases.

    Attributes:
        manifest: What the cases annotate.
        fold: Cases to ``train`` and to ``val``; where either is missing nnU-Net makes five folds of its own.
        dataset_json: Content of ``dataset.json``.
        report: What the report says besides.
    """

    manifest: Mapping[str, Any]
    fold: Mapping[str, Sequence[str]]
    dataset_json: Mapping[str, Any]
    report: Mapping[str, Any] = field(default_factory=dict)


def case_files(folder: Path, case: str, split: str = "train", ending: str = ENDING) -> tuple[Path, Path]:
    """Return where image and label map of a case belong."""
    part = "Ts" if split == "test" else "Tr"
    return folder / f"images{part}" / f"{case}_0000{ending}", folder / f"labels{part}" / f"{case}{ending}"


def dataset_folder(dataset_id: int, name: str, *, raw: Path, others: Collection[Path] = ()) -> Path:
    """Return the folder of a new raw dataset, which need not exist yet.

    Args:
        dataset_id: From 1 to 999.
        name: What follows ``Dataset101_``.
        raw: The folder that ``nnUNet_raw`` names.
        others: nnU-Net's other folders, where the id must be free too.

    Raises:
        UsageError: An id or name that nnU-Net cannot take.
        DatasetError: The id belongs to a dataset of another name.
    """
    if not 1 <= dataset_id <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        rule = "give an id from 1 to 999 with -d, and letters, digits, hyphens and underscores with --name"
        raise UsageError(f"impossible id or name {dataset_id}, {name!r}: {rule}")
    full_name = f"Dataset{dataset_id:03d}_{name}"
    taken = [d for root in (raw, *others) for d in sorted(root.glob(f"Dataset{dataset_id:03d}_*"))]
    if taken := [d for d in taken if d.name != full_name]:
        raise DatasetError(f"dataset id {dataset_id} is taken by {taken[0]}: choose another one with -d")
    return raw / full_name


def run_import(
    folder: Path,
    settings: Mapping[str, Any],
    cases: Sequence[ImportCase],
    describe: Callable[[ImportReport], DatasetFiles],
    *,
    outputs_of: Callable[[str, Record], Sequence[Path]],
    left_out: list[str],
    failed: Mapping[str, STUNetError],
    may_keep: Callable[[str], bool],
    preprocessed: str | os.PathLike[str] | None,
    num_processes: int,
    on_case: Callable[[str, bool], None],
) -> ImportReport:
    """Import cases, or resume an import with the same settings into the same folder.

    Args:
        folder: The dataset's folder in ``nnUNet_raw``.
        settings: What a later run must agree with.
        cases: The cases.
        describe: Checks what was imported, and says what the dataset's other files hold.
        outputs_of: The files of a case of an earlier run.
        left_out: Cases left out, for the report.
        failed: Cases that could not even be tried.
        may_keep: Whether a case of an earlier run that this one could not import may stay: its copy may be all that is
            left of it.
        preprocessed: nnU-Net's ``nnUNet_preprocessed``, where manifest and folds are needed too.
        num_processes: Cases at a time.
        on_case: Called as a case is done, with its name and whether an earlier run had finished it.

    Raises:
        DatasetError: The folder holds something else, or files that no import wrote.
        CommandError: Another import is at work there.
    """
    with _claimed(folder, settings, [case.name for case in cases]) as (earlier, began, note):
        records, failed, reused = {}, dict(failed), 0
        jobs = [replace(case, earlier=earlier.get(case.name)) for case in cases]
        for job, result in run_jobs(import_case, jobs, num_processes=num_processes):
            if isinstance(result, STUNetError):
                failed[job.name] = result
            else:
                records[job.name], again = result
                reused += again
                note({"case": job.name, "record": result[0]})
            on_case(job.name, not isinstance(result, STUNetError) and result[1])
        old = {name: record for name, record in earlier.items() if name not in records and may_keep(name)}
        kept = {name: record for name, record in sorted(old.items()) if _is_whole(record, outputs_of(name, record))}
        records = dict(sorted({**records, **kept}.items()))
        report = ImportReport(folder, records, reused, left_out, dict(sorted(failed.items())), list(kept))
        files = describe(report)
        _tidy(folder, report.splits, began, str(files.dataset_json["file_ending"]))
        has_folds = bool(files.fold.get("train") and files.fold.get("val"))
        if not has_folds:
            (folder / SPLITS_NAME).unlink(missing_ok=True)
        content = {
            **settings,
            "left_out": left_out,
            "failed": {name: str(error) for name, error in report.failed.items()},
            "kept": report.kept,
            **files.report,
            "cases": records,
        }
        manifest = order_manifest(files.manifest, source=str(folder / MANIFEST_NAME))
        splits = {folder / SPLITS_NAME: [files.fold]} if has_folds else {}
        last = {folder / REPORT_NAME: content, folder / "dataset.json": files.dataset_json}  # which makes it a dataset
        write_json_files({folder / MANIFEST_NAME: manifest, **splits, **last})
        stale = _sync(folder, preprocessed)
    return replace(report, has_folds=has_folds, stale=stale)


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


@contextmanager
def _claimed(
    folder: Path, settings: Mapping[str, Any], cases: Collection[str]
) -> Iterator[tuple[dict[str, Record], set[str], Callable[[Record], None]]]:
    """Make a folder ours for one import, new or resumed.

    ``dataset.json`` is removed at the start, since cases may change; the block writes it at its end. A journal of
    finished cases disappears when the block ends without an error; the lock file stays.

    Yields:
        Records of earlier runs; names of all cases that any run has begun; and what appends to the journal.
    """
    journal = folder / _JOURNAL
    _read_state(folder, settings)  # before anything is written there
    with locked(folder / _LOCK, "import into the same dataset"):
        records, began = _read_state(folder, settings)  # another import may have ended in between
        for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "."):
            remove_leftovers(folder / sub, "*")
        began |= set(cases)
        lines = [{**settings, "began": sorted(began)}, *({"case": n, "record": r} for n, r in records.items())]
        with atomic_path(journal) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (folder / "dataset.json").unlink(missing_ok=True)
        with journal.open("a", encoding="utf-8") as file:

            def note(line: Record) -> None:
                with naming_file(journal):
                    file.write(f"{json.dumps(line)}\n")
                    file.flush()

            yield records, began, note
        journal.unlink()


def _read_state(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Record], set[str]]:
    """Records and begun cases of the import that a folder holds, unfinished (journal) or finished (report)."""
    known: dict[str, Any] = {}
    records: dict[str, Record] = {}
    if (folder / _JOURNAL).exists():
        known, *lines = map(_parse, (folder / _JOURNAL).read_text(encoding="utf-8").splitlines())
        records = {line["case"]: line["record"] for line in lines if line}
    elif (folder / REPORT_NAME).exists():
        known = _parse((folder / REPORT_NAME).read_text(encoding="utf-8"))
        records = known.get("cases", {})
    others = [key for key in settings if known.get(key) != settings[key]]
    left = (
        [path for path in folder.iterdir() if not path.name.lstrip(".").startswith("import.")]
        if folder.is_dir()
        else []
    )
    if others and (known or left):
        found = f"an import with other {', '.join(others)}" if known else "no import of this kind"
        raise DatasetError(f"{folder} is there already, {found}: choose another id with -d, or remove the folder")
    return records, {*known.get("began", ()), *records}


def _parse(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):  # a line whose writing was interrupted
        return {}


def _tidy(folder: Path, splits: Mapping[str, str], began: Collection[str], ending: str) -> None:
    """Remove files of cases that an import began and that are not part of the dataset, or of another part now."""
    for part in ("Tr", "Ts"):
        mine = {name for name, split in splits.items() if (split == "test") == (part == "Ts")}
        for kind, tail in (("images", f"_0000{ending}"), ("labels", ending)):
            sub = folder / f"{kind}{part}"
            for path in sorted(sub.iterdir()) if sub.is_dir() else ():
                case = path.name.removesuffix(tail)
                if case not in began or not path.name.endswith(tail):
                    raise DatasetError(f"the import did not write {path}: move it elsewhere and run the command again")
                if case not in mine:
                    path.unlink()
            if sub.is_dir() and not any(sub.iterdir()):
                sub.rmdir()


def _sync(folder: Path, preprocessed: str | os.PathLike[str] | None) -> list[Path]:
    if preprocessed is None:
        return []
    target = Path(preprocessed) / folder.name
    for name in (MANIFEST_NAME, SPLITS_NAME):
        remove_leftovers(target, name)
    return sync_to_preprocessed(folder, target)
