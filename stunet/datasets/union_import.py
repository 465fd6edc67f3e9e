"""A union of datasets as an nnU-Net raw dataset: images stay where they are, label maps are written anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.datasets.import_results import list_some, mention_failures, write_results
from stunet.datasets.import_state import ImportState, claim_folder
from stunet.datasets.side_files import carry_new_files
from stunet.datasets.union_checks import check_sources
from stunet.datasets.union_sources import UnionSource, annotated_in_union, sampling_weights, source_lookup
from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.labels import MANIFEST_NAME, bind_manifest, group_cases
from stunet.labels.label_cases import LabelCase, relabel_case
from stunet.labels.mask_cases import finished_record
from stunet.labels.unions import LabelUnion
from stunet.processes import run_jobs

__all__ = ["UnionReport", "import_union"]

_FORMAT = 1


@dataclass(frozen=True)
class UnionReport:
    """What has become of a union.

    Attributes:
        folder: The dataset's folder.
        cases: Names of the union's cases, by source.
        weights: How often each case is drawn, relative to the others.
        reused: How many cases an earlier run had finished.
        left_out: Cases left out because they annotate no structure of the union.
        failed: Errors of the cases that could not be read.
        kept: Cases of an earlier run that cannot be read any more, and whose label maps stay as they were.
        has_folds: Whether the sources' own folds were carried.
        stale: Files of the preprocessed folder that differ from the new ones and were left alone.
    """

    folder: Path
    cases: dict[str, list[str]]
    weights: dict[str, float]
    reused: int
    left_out: list[str]
    failed: dict[str, STUNetError]
    kept: list[str]
    has_folds: bool
    stale: list[Path]


def import_union(
    sources: Sequence[UnionSource],
    union: LabelUnion,
    folder: str | os.PathLike[str],
    *,
    weights: Mapping[str, float] | None = None,
    allow_unannotated: bool = False,
    preprocessed: str | os.PathLike[str] | None = None,
    num_processes: int = 1,
    on_case: Callable[[str, bool], None] = lambda case, reused: None,
) -> UnionReport:
    """Make a union of datasets' training cases, or continue to make it.

    ``dataset.json`` refers to the sources' images by paths relative to its folder where they lie in the same
    ``nnUNet_raw``. Each label map is written whole or not at all, ``dataset.json`` last. Cases that cannot be read are
    reported, and tried again by the next run. The same sources give the same bytes, however often it was interrupted.

    The first folds of the sources' ``splits_final.json`` become the union's only fold where each source has such a file
    in ``nnUNet_raw``; otherwise nnU-Net makes five folds of its own.

    Args:
        sources: The datasets.
        union: Their labels, as of ``merge_sources``.
        folder: The new dataset's folder in ``nnUNet_raw``.
        weights: Mean sampling weight of a case by source, in place of the default; see ``sampling_weights``.
        allow_unannotated: Whether structures may stay that no case annotates.
        preprocessed: nnU-Net's ``nnUNet_preprocessed``, where manifest and folds are needed too.
        num_processes: Cases at a time.
        on_case: Called as a case is done, with its name and whether an earlier run had finished it.

    Raises:
        DatasetError: Sources that do not fit together, a folder that holds something else, no room, or a structure that
            no case annotates.
        LabelError: A case that annotates two overlapping structures.
        UsageError: A weight that is none.
    """
    folder = Path(folder)
    check_sources(sources)
    _check_weights(sources, weights or {})
    fold = _merge_folds(sources)
    settings = {
        "format": _FORMAT,
        "kind": "union",
        "labels": union.labels,
        "superclasses": {name: list(members) for name, members in union.superclasses.items()},
        "mapping": {source: dict(labels) for source, labels in union.mapping.items()},
    }
    annotated = {
        (source.name, case): annotated_in_union(source, union, case) for source in sources for case in source.cases
    }
    if not allow_unannotated:
        _check_annotated(union, [structures for structures, _ in annotated.values()], {})
    ending = sources[0].dataset.dataset_json["file_ending"]
    with claim_folder(folder, settings, ending=ending) as state:
        left_out = sorted(s.cases[c] for s in sources for c in s.cases if not annotated[s.name, c][0])
        jobs = _jobs(sources, union, annotated, state)
        records, failed, reused = _run(jobs, num_processes, on_case)
        kept = _keep_earlier(state, failed)
        records = dict(sorted({**records, **kept}.items()))
        if not records or not allow_unannotated:
            _check_annotated(union, [set(record["annotated"]) for record in records.values()], failed)
        state.tidy(dict.fromkeys(records, "train"))
        weight_of = _weights(sources, records, weights or {})
        report = {
            **settings,
            "left_out": left_out,
            "failed": {name: str(error) for name, error in failed.items()},
            "kept": list(kept),
            "cases": records,
        }
        has_folds = write_results(
            folder,
            manifest=_manifest(folder, union, records, weight_of),
            fold={part: [case for case in cases if case in records] for part, cases in fold.items()},
            report=report,
            dataset_json=_dataset_json(folder, sources, union, records),
        )
        stale = carry_new_files(folder, preprocessed)
    cases = {source.name: [name for name in source.cases.values() if name in records] for source in sources}
    return UnionReport(folder, cases, weight_of, reused, left_out, failed, list(kept), has_folds, stale)


def _check_weights(sources: Sequence[UnionSource], weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if name not in [source.name for source in sources] or not 0 < weight < float("inf"):
            raise UsageError(
                "an impossible sampling weight",
                got=f"{name}={weight:g}",
                expected=f"a number above 0 for {', '.join(source.name for source in sources)}",
                remedy="Correct --weights.",
            )


def _jobs(
    sources: Sequence[UnionSource],
    union: LabelUnion,
    annotated: Mapping[tuple[str, str], tuple[set[str], set[str]]],
    state: ImportState,
) -> list[LabelCase]:
    order = [*union.leaves, *union.superclasses]
    highest = max(union.labels.values())
    jobs = []
    for source in sources:
        for case, name in source.cases.items():
            structures, partial = annotated[source.name, case]
            images, label = source.dataset.cases[case]
            if structures:
                jobs.append(
                    LabelCase(
                        name=name,
                        images=tuple(images),
                        source=label,
                        lookup=tuple(sorted(source_lookup(source, union, partial).items())),
                        highest=highest,
                        annotated=tuple(structure for structure in order if structure in structures),
                        label=state.label(name),
                        record=state.record(name),
                    )
                )
    return jobs


def _run(
    jobs: Sequence[LabelCase], num_processes: int, on_case: Callable[[str, bool], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, STUNetError], int]:
    records, failed, reused = {}, {}, 0
    for job, result in run_jobs(relabel_case, jobs, num_processes=num_processes):
        if isinstance(result, STUNetError):
            failed[job.name] = result
        else:
            records[job.name] = result.record
            reused += result.reused
        on_case(job.name, not isinstance(result, STUNetError) and result.reused)
    return records, dict(sorted(failed.items())), reused


def _keep_earlier(state: ImportState, failed: Mapping[str, STUNetError]) -> dict[str, dict[str, Any]]:
    """Whole label maps of earlier runs whose sources are broken now: they may be all that is left of these."""
    found = {name: finished_record(state.record(name), state.label(name)) for name in failed}
    return {name: record for name, record in found.items() if record is not None}


def _check_annotated(union: LabelUnion, annotated: Sequence[set[str]], failed: Mapping[str, STUNetError]) -> None:
    covered = {
        leaf for structures in annotated for name in structures for leaf in (name, *union.superclasses.get(name, ()))
    }
    missing = [name for name in (*union.leaves, *union.superclasses) if name not in covered]
    if annotated and not missing:
        return
    raise DatasetError(
        "structures that no case annotates",
        got=list_some(missing) + mention_failures(failed),
        expected="each annotated in at least one case, since nothing else could teach it",
        remedy='Drop them in a mapping file ("background", --mapping), or keep them with --allow-unannotated.',
    )


def _weights(
    sources: Sequence[UnionSource], records: Mapping[str, Any], given: Mapping[str, float]
) -> dict[str, float]:
    weight_of: dict[str, float] = {}
    for source in sources:
        cases = [case for case, name in source.cases.items() if name in records]
        weights = sampling_weights(source, cases, given)
        weight_of.update({source.cases[case]: weight for case, weight in weights.items()})
    return weight_of


def _manifest(
    folder: Path, union: LabelUnion, records: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]
) -> dict[str, Any]:
    structures = (*union.leaves, *union.superclasses)
    manifest = group_cases({name: record["annotated"] for name, record in records.items()}, structures)
    manifest["weights"] = dict(weights)
    if union.superclasses:
        manifest["superclasses"] = {name: list(members) for name, members in union.superclasses.items()}
    bind_manifest(manifest, labels=union.labels, cases=records, source=str(folder / MANIFEST_NAME))
    return manifest


def _merge_folds(sources: Sequence[UnionSource]) -> dict[str, list[str]]:
    """Cases to train and validate on; empty where a source has no folds."""
    folds = [source.first_fold() for source in sources]
    if any(fold is None for fold in folds):
        return {}
    return {part: sorted(case for fold in folds if fold for case in fold[part]) for part in ("train", "val")}


def _dataset_json(
    folder: Path, sources: Sequence[UnionSource], union: LabelUnion, records: Mapping[str, Any]
) -> dict[str, Any]:
    first = sources[0].dataset.dataset_json
    reader = {key: first[key] for key in ("overwrite_image_reader_writer",) if key in first}
    ending = first["file_ending"]
    cases = {
        name: {
            "images": [_reference(image, folder) for image in source.dataset.cases[case][0]],
            "label": f"labelsTr/{name}{ending}",
        }
        for source in sources
        for case, name in source.cases.items()
        if name in records
    }
    return {
        "channel_names": first["channel_names"],
        "labels": union.labels,
        "numTraining": len(cases),
        "file_ending": ending,
        **reader,
        "dataset": dict(sorted(cases.items())),
    }


def _reference(image: Path, folder: Path) -> str:
    """A path for ``dataset.json``: relative to its folder where it stays right when ``nnUNet_raw`` is moved."""
    raw = folder.resolve().parent
    return f"../{image.relative_to(raw).as_posix()}" if image.is_relative_to(raw) else str(image)
