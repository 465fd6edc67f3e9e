"""Importing cases with separate masks as an nnU-Net raw dataset: resumable, whole cases only, the dataset last."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.datasets.import_results import list_some, mention_failures, write_results
from stunet.datasets.import_state import ENDING, ImportState, claim_folder
from stunet.datasets.side_files import carry_new_files
from stunet.datasets.totalsegmentator import SourceCase
from stunet.errors import DatasetError, STUNetError
from stunet.labels import group_cases
from stunet.labels.mask_cases import ImportedCase, MaskCase, StagedCase, finished_record, place_cases, stage_case
from stunet.processes import run_jobs, worthwhile_processes

__all__ = ["ImportReport", "import_cases"]

_FORMAT = 1
#: Bytes of images that are imported, with their masks, while a process starts.
_BYTES_PER_START = 2**25
OnCase = Callable[[str, int, bool], None]


@dataclass(frozen=True)
class ImportReport:
    """What an import has done.

    Attributes:
        folder: The dataset's folder.
        splits: ``train``, ``val`` or ``test`` for each case of the dataset.
        reused: How many of them an earlier run had finished.
        left_out: Cases left out because they annotate none of the chosen structures.
        failed: Errors of the cases that could not be imported.
        kept: Cases of an earlier run that this one could not import again, and that stay as they were.
        overlaps: Voxels that a structure has lost to another, by (loser, winner), the most first.
        has_folds: Whether the official split was written as nnU-Net's only fold.
        stale: Files of the preprocessed folder that differ from the new ones and were left alone.
    """

    folder: Path
    splits: dict[str, str]
    reused: int
    left_out: list[str]
    failed: dict[str, STUNetError]
    kept: list[str]
    overlaps: dict[tuple[str, str], int]
    has_folds: bool
    stale: list[Path]


def import_cases(
    cases: Sequence[SourceCase],
    structures: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    details: Mapping[str, Any],
    excluded: Collection[str] = (),
    link_images: bool = False,
    allow_unannotated: bool = False,
    preprocessed: str | os.PathLike[str] | None = None,
    num_processes: int | None = 1,
    on_case: OnCase = lambda case, n_masks, reused: None,
) -> ImportReport:
    """Import cases, or continue an import of the same structures into the same folder.

    Each case is written whole or not at all. ``dataset.json`` appears last, with the cases that could be imported;
    those that could not are reported, and tried again by the next run. Cases that an earlier run has imported leave the
    dataset only where they are excluded by name. The same source gives the same bytes, however often the import was
    interrupted.

    Args:
        cases: What the source has.
        structures: Names in the order of their label values, from 1; later ones are painted over earlier ones.
        folder: The dataset's folder in ``nnUNet_raw``.
        details: What else the report shall say and a later run must agree with.
        excluded: Names of cases to leave out.
        link_images: Hard links (symbolic ones to other file systems) in place of copies of the images.
        allow_unannotated: Whether structures may stay that no training case annotates.
        preprocessed: nnU-Net's ``nnUNet_preprocessed``, where manifest and folds are needed too.
        num_processes: Cases at a time; None for as many as there are processor cores and as the images are worth.
        on_case: Called as a case is done, with its name, number of masks, and whether an earlier run had finished it.

    Raises:
        DatasetError: The folder holds something else, nothing could be imported, or no training case annotates one of
            the structures.
    """
    folder = Path(folder)
    images = "link" if link_images else "copy"
    settings = {"format": _FORMAT, **details, "images": images, "structures": list(structures)}
    included = [case for case in cases if case.name not in excluded]
    # A case without any mask does not annotate other structures: it is broken, and reported as such below.
    left_out = sorted(case.name for case in included if case.masks and not case.masks & set(structures))
    chosen = {case.name: case for case in included if case.name not in left_out}
    if not allow_unannotated:
        _check_annotated(structures, [case.masks for case in chosen.values() if case.split != "test"], {})
    with claim_folder(folder, settings) as state:
        records, failed, reused = _import_all(state, chosen, structures, link_images, num_processes, on_case)
        kept = _keep_earlier(state, {*records, *excluded})
        records = dict(sorted({**records, **kept}.items()))
        if not records or not allow_unannotated:
            annotated = [set(record["voxels"]) for record in records.values() if record["split"] != "test"]
            _check_annotated(structures, annotated, failed)
        splits = {name: record["split"] for name, record in records.items()}
        state.tidy(splits)
        overlaps = _sum_overlaps(records)
        report = {
            **settings,
            "left_out": left_out,
            "failed": {name: str(error) for name, error in failed.items()},
            "kept": list(kept),
            "overlaps": _nested(overlaps),
            "cases": records,
        }
        has_folds = _write_dataset(folder, records, structures, report)
        stale = carry_new_files(folder, preprocessed)
    return ImportReport(folder, splits, reused, left_out, failed, list(kept), overlaps, has_folds, stale)


def _import_all(
    state: ImportState,
    chosen: Mapping[str, SourceCase],
    structures: Sequence[str],
    link: bool,
    num_processes: int | None,
    on_case: OnCase,
) -> tuple[dict[str, dict[str, Any]], dict[str, STUNetError], int]:
    jobs: list[MaskCase] = []
    failed: dict[str, STUNetError] = {}
    for name, case in chosen.items():
        if not case.masks:
            failed[name] = DatasetError(
                "a case without masks",
                got=case.folder / "segmentations",
                expected=f"a STRUCTURE{ENDING} for each structure that it annotates",
                remedy="Add masks, or leave the case out.",
            )
            on_case(name, 0, False)
            continue
        masks = tuple((i, s, case.mask(s)) for i, s in enumerate(structures, start=1) if s in case.masks)
        image, label = state.files(name, case.split)
        record = state.record(name)
        jobs.append(MaskCase(name, case.split, case.ct, masks, len(structures), image, label, record, link))
    if num_processes is None:
        size = sum(job.ct.stat().st_size for job in jobs if job.ct.exists())
        num_processes = worthwhile_processes(size, share=_BYTES_PER_START)
    records, reused = {}, 0
    for job, result in _place_each(run_jobs(stage_case, jobs, num_processes=num_processes)):
        if isinstance(result, STUNetError):
            failed[job.name] = result
            on_case(job.name, len(job.masks), False)
            continue
        records[job.name] = result.record
        reused += result.reused
        on_case(job.name, len(job.masks), result.reused)
    return dict(sorted(records.items())), dict(sorted(failed.items())), reused


_Result = ImportedCase | StagedCase | STUNetError


def _place_each(staged: Iterator[tuple[MaskCase, _Result]]) -> Iterator[tuple[MaskCase, ImportedCase | STUNetError]]:
    """Give staged cases their names while others are being decoded: all that are there, as soon as the disk is free."""
    with ThreadPoolExecutor(1) as disk:
        batch: list[tuple[MaskCase, _Result]] = []
        busy: Future[list[tuple[MaskCase, ImportedCase | STUNetError]]] | None = None
        for entry in staged:
            batch.append(entry)
            if busy is None or busy.done():
                yield from busy.result() if busy else ()
                busy, batch = disk.submit(_place, batch), []
        yield from busy.result() if busy else ()
        yield from _place(batch)


def _place(batch: Sequence[tuple[MaskCase, _Result]]) -> list[tuple[MaskCase, ImportedCase | STUNetError]]:
    others = [(case, result) for case, result in batch if not isinstance(result, StagedCase)]
    staged = [(case, result) for case, result in batch if isinstance(result, StagedCase)]
    return [*others, *zip((case for case, _ in staged), place_cases(staged), strict=True)]


def _keep_earlier(state: ImportState, others: Collection[str]) -> dict[str, dict[str, Any]]:
    """Whole cases of earlier runs that are broken or gone in the source now: they may be all that is left of it."""
    kept = {}
    for name in sorted(set(state.started()) - set(others)):
        for split in ("train", "test"):
            record = finished_record(state.record(name), *state.files(name, split))
            if record is not None:
                kept[name] = record
    return kept


def _check_annotated(
    structures: Sequence[str], annotated: Sequence[Collection[str]], failed: Mapping[str, STUNetError]
) -> None:
    covered = {structure for names in annotated for structure in names}
    missing = [structure for structure in structures if structure not in covered]
    detail = mention_failures(failed)
    if not annotated:
        raise DatasetError(
            "no training cases",
            got=f"none that annotates one of {len(structures)} structures{detail}",
            expected="at least one",
            remedy="Check the source, --structures, --group and --exclude.",
        )
    if missing:
        raise DatasetError(
            "structures that no training case annotates",
            got=list_some(missing) + detail,
            expected="each annotated in at least one training case, since nothing else could teach it",
            remedy="Choose others with --structures or --group, or keep them with --allow-unannotated.",
        )


def _sum_overlaps(records: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    total: Counter[tuple[str, str]] = Counter()
    for record in records.values():
        for loser, winners in record["overlaps"].items():
            total.update({(loser, winner): n for winner, n in winners.items()})
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _nested(overlaps: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (loser, winner), n in sorted(overlaps.items()):
        nested.setdefault(loser, {})[winner] = n
    return nested


def _write_dataset(
    folder: Path, records: Mapping[str, Mapping[str, Any]], structures: Sequence[str], report: Mapping[str, Any]
) -> bool:
    annotated = {name: record["voxels"] for name, record in records.items()}
    dataset_json = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: value for value, name in enumerate(structures, start=1)}},
        "numTraining": sum(record["split"] != "test" for record in records.values()),
        "file_ending": ENDING,
    }
    return write_results(
        folder,
        manifest=group_cases(annotated, structures),
        fold={split: [n for n, record in records.items() if record["split"] == split] for split in ("train", "val")},
        report=report,
        dataset_json=dataset_json,
    )
