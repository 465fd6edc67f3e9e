"""A union of datasets as an nnU-Net raw dataset: images stay where they are, label maps are written anew."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stunet import volumes
from stunet.datasets.imports import REPORT_NAME, ImportCase, ImportReport, Record, case_files, run_import
from stunet.datasets.raw import SPLITS_NAME, RawDataset, case_names, read_raw_dataset
from stunet.errors import DatasetError, LabelError, reading
from stunet.files import fingerprint
from stunet.labels.annotations import MANIFEST_NAME, AnnotationManifest, read_manifest
from stunet.labels.labels import Labels, check_names
from stunet.labels.mappings import LabelUnion, UnionMapping, merge_labels

_FORMAT = 1
_SPACING_TOLERANCE = 1e-5  # of the spacing, as nnU-Net's integrity check has it


@dataclass(frozen=True)
class UnionSource:
    """A dataset that goes into a union."""

    name: str  # for example Dataset004_Hippocampus
    dataset: RawDataset
    manifest: AnnotationManifest  # what its cases annotate
    ignore: int | None  # value of its ignore label, if it has one

    @property
    def id(self) -> int:
        """The number in its name."""
        return int(self.name.removeprefix("Dataset").partition("_")[0])

    @cached_property
    def cases(self) -> dict[str, str]:
        """Name in the union of each of its training cases, by name in the source."""
        return {case: f"D{self.id:03d}_{case}" for case in sorted(self.dataset.cases)}

    def first_fold(self) -> dict[str, list[str]] | None:
        """Return the first fold of its ``splits_final.json`` with the cases' names in the union, if there is one.

        Raises:
            DatasetError: Not of nnU-Net's form, or with cases that it does not have.
        """
        path = self.dataset.folder / SPLITS_NAME
        if not path.is_file():
            return None
        remedy = "list folds of the dataset's own training cases, or move the file elsewhere to do without"
        with reading(path, "a list of folds that cannot be used", DatasetError, remedy):
            content = json.loads(path.read_text(encoding="utf-8"))
            fold: dict[str, list[str]] = {p: [self.cases[case] for case in content[0][p]] for p in ("train", "val")}
        return fold


def sources_of_cases(folder: str | os.PathLike[str], cases: Iterable[str]) -> dict[str, str]:
    """Return the dataset that each case of a union is from; nothing where a folder is no union."""
    try:
        report = json.loads((Path(folder) / REPORT_NAME).read_text(encoding="utf-8"))
        source_of = {f"D{source[7:10]}": source for source in report["mapping"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {case: source_of[start] for case in cases if (start := case.partition("_")[0]) in source_of}


def read_union_source(folder: str | os.PathLike[str]) -> UnionSource:
    """Read a dataset that goes into a union.

    Raises:
        DatasetError: Incomplete, or with case names that differ only in case.
        LabelError: Its labels or its manifest are malformed, or it has regions: a voxel of a union has one label.
    """
    name, dataset = Path(folder).name, read_raw_dataset(folder)
    labels = Labels(dataset.dataset_json, name)
    structures = {**labels.exclusive, **({} if labels.ignore is None else {"ignore": labels.ignore})}
    check_names(dataset.cases, name, DatasetError)
    manifest = read_manifest(dataset.folder / MANIFEST_NAME, labels=structures, cases=case_names(dataset))
    return UnionSource(name, dataset, manifest, labels.ignore)


def merge_sources(sources: Sequence[UnionSource], mapping: UnionMapping | None = None) -> LabelUnion:
    """Merge the labels of datasets; see :func:`merge_labels`.

    Raises:
        DatasetError: A dataset twice, or datasets of different channels, readers, file endings or units of spacing.
        LabelError: As of :func:`merge_labels`.
    """
    check_sources(sources)
    declared = {
        s.name: {
            s.manifest.names[value]: [s.manifest.names[m] for m in members]
            for value, members in s.manifest.superclasses.items()
        }
        for s in sources
    }
    return merge_labels(
        {source.name: list(source.manifest.structures) for source in sources},
        declared=declared,
        has_ignore=any(source.ignore is not None for source in sources),
        overrides=mapping,
    )


def sampling_weights(
    source: UnionSource, cases: Sequence[str], given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return how often each case of a source is drawn, relative to all others.

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


def check_sources(sources: Sequence[UnionSource]) -> None:
    """Check that one dataset can hold all these; errors as of :func:`merge_sources`."""
    names = [source.name for source in sources]
    if len(set(names)) < max(2, len(names)):
        found = next((f"{name} twice" for name in names if names.count(name) > 1), f"{len(names)} datasets")
        raise DatasetError(f"no union of {found}: give two or more datasets, each once")

    def check_same(what: str, values: Sequence[str], why: str) -> None:
        for name, value in zip(names, values, strict=True):
            if value.casefold() != values[0].casefold():
                raise DatasetError(f"different {what}, {names[0]}: {values[0]}; {name}: {value}: {why}")

    described = [source.dataset.dataset_json for source in sources]
    ending = str(described[0]["file_ending"]).casefold()
    one_reader = "nnU-Net reads all files of a dataset with one reader; convert one of them"
    check_same("file endings", [str(content["file_ending"]) for content in described], one_reader)
    if ending not in volumes.LABEL_ENDINGS:
        known = ", ".join(volumes.LABEL_ENDINGS)
        raise DatasetError(f"{names[0]}: label maps cannot be written as {ending}: convert them to one of {known}")
    channels = [
        [str(name) for _, name in sorted((int(key), name) for key, name in d["channel_names"].items())]
        for d in described
    ]
    check_same("channels", list(map(", ".join, channels)), "leave one out, or make its channels those of the other")
    readers = [str(content.get("overwrite_image_reader_writer")) for content in described]
    check_same("image readers", readers, "make overwrite_image_reader_writer the same")
    if ending in volumes.NIFTI_ENDINGS:
        firsts = (next(iter(source.dataset.cases.values()))[0][0] for source in sources)
        units = [str(volumes.read_volume(image, header_only=True).header.get_xyzt_units()[0]) for image in firsts]
        names_of_units = {"unknown": "mm", "meter": "m", "micron": "µm"}  # all programs take mm where nothing is said
        shown = [names_of_units.get(unit, unit) for unit in units]
        check_same("units of spacing", shown, "convert one of them, spacing and position included")


def annotated_in_union(source: UnionSource, union: LabelUnion, case: str) -> tuple[set[str], set[str]]:
    """Find what a case of a source annotates in the union.

    A structure that several labels of the source are parts of is annotated where the case annotates all of these.

    Returns:
        The structures, and the labels that the case annotates without annotating all of the structure.

    Raises:
        LabelError: It annotates a superclass of the union and one of its members.
    """
    manifest, own = source.manifest, set(source.manifest.annotated(case))
    structures: set[str] = set()
    partial: set[str] = set()
    for structure in (*union.leaves, *union.superclasses):
        values = {manifest.structures[label] for label, n in union.mapping[source.name].items() if n == structure}
        if values & own and manifest.leaves_of(*(values & own)) == manifest.leaves_of(*values):
            structures.add(structure)
        else:
            partial |= {manifest.names[value] for value in values & own}
    owner: dict[str, str] = {}
    for name in (name for name in (*union.superclasses, *union.leaves) if name in structures):
        for leaf in union.superclasses.get(name, (name,)):
            if (other := owner.setdefault(leaf, name)) != name:
                got = f"{source.name}, case {case} annotates {other} and {name}, which overlap"
                raise LabelError(f"{got}: say what the labels are with --mapping, or correct the source's manifest")
    return structures, partial


@dataclass(frozen=True, kw_only=True)
class LabelCase(ImportCase):
    """A case whose label map is written anew."""

    images: tuple[Path, ...]  # its images, which stay where they are
    label: Path  # its label map in the source
    # value in the union by value in the source, for all values that the source lists
    lookup: Mapping[int, int]
    highest: int  # the highest label value of the union, which decides the type: uint8 up to 255, else uint16

    def source(self) -> Record:
        """Return fingerprint and annotated structures."""
        details = [str(tuple(self.lookup.items())), str(self.highest)]
        return {"source": fingerprint([self.label], details), "annotated": list(self.annotated)}

    def write(self) -> Record:
        """Write the label map with other values."""
        labels = volumes.read_labels(self.label)
        for path in self.images:
            # What nnU-Net's integrity check insists on. Of position and direction it only warns.
            image = volumes.read_volume(path, header_only=True)
            volumes.check_shape(labels, image)
            mine, others = labels.spacing, image.spacing
            if not np.allclose(mine, others, rtol=_SPACING_TOLERANCE, atol=0):
                both = f"{mine.tolist()}, than its image {path}, {others.tolist()}"
                raise DatasetError(f"{self.label} has another spacing, {both}: resample it, or leave the case out")
        volumes.check_listed(labels, self.lookup)
        table = np.zeros(2**16, np.uint8 if self.highest <= 255 else np.uint16)
        table[list(self.lookup)] = list(self.lookup.values())
        volumes.write_labels(table[labels.voxels], labels, self.outputs[0])
        return {}


def import_union(
    sources: Sequence[UnionSource],
    union: LabelUnion,
    folder: str | os.PathLike[str],
    *,
    weights: Mapping[str, float] | None = None,
    allow_unannotated: bool = False,
    num_processes: int = 1,
    on_case: Callable[[str, bool], None] = lambda case, reused: None,
) -> ImportReport:
    """Make a union of datasets' training cases, or resume making it; images stay where they are.

    Label maps are written atomically, ``dataset.json`` last. Cases that cannot be read are reported, and tried again by
    the next run. The same sources give the same bytes, however often it was interrupted. The first folds of the
    sources' ``splits_final.json`` become the union's only fold where each source has such a file in ``nnUNet_raw``.

    Args:
        sources: The datasets.
        union: Their labels, as of ``merge_sources``.
        folder: The new dataset's folder in ``nnUNet_raw``, and likewise other arguments and errors as of
            :func:`stunet.datasets.imports.run_import`.
        weights: Mean sampling weight of a case by source; see ``sampling_weights``.
        allow_unannotated: Whether structures may stay that no case annotates.
        num_processes: Cases at a time.
        on_case: Called as a case is done.

    Raises:
        LabelError: A case that annotates two overlapping structures.
    """
    folder = Path(folder)
    folds = [source.first_fold() for source in sources]
    superclasses = {name: list(members) for name, members in union.superclasses.items()}
    mapping = {source: dict(labels) for source, labels in union.mapping.items()}
    settings = {"format": _FORMAT, "kind": "union", "labels": union.labels}
    settings |= {"superclasses": superclasses, "mapping": mapping}
    order, first = [*union.leaves, *union.superclasses], sources[0].dataset.dataset_json
    ending = first["file_ending"]
    jobs = []
    for source in sources:
        for case, name in source.cases.items():
            structures, partial = annotated_in_union(source, union, case)
            values = {label: union.labels[name] for label, name in union.mapping[source.name].items()}
            lookup = {0: 0, **{v: 0 if n in partial else values[n] for n, v in source.manifest.structures.items()}}
            if source.ignore is not None:
                lookup[source.ignore] = union.labels["ignore"]
            images, label = source.dataset.cases[case]
            job = LabelCase(
                name=name,
                images=tuple(images),
                label=label,
                lookup=dict(sorted(lookup.items())),
                highest=max(union.labels.values()),
                annotated=tuple(structure for structure in order if structure in structures),
                outputs=case_files(folder, name, ending=ending)[1:],
            )
            jobs.append(job)
    chosen = {job.name: job for job in jobs if job.annotated}

    def describe(report: ImportReport) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]:
        imported, more = report.records, {"superclasses": superclasses} if superclasses else {}
        weight_of: dict[str, float] = {}
        for source in sources:
            cases = [case for case, name in source.cases.items() if name in imported]
            own = sampling_weights(source, cases, weights)
            weight_of |= {source.cases[case]: weight for case, weight in own.items()}
        listed = {}
        for name in imported:
            images = [_reference(image, folder) for image in chosen[name].images]
            listed[name] = {"images": images, "label": f"labelsTr/{name}{ending}"}
        described = {"channel_names": first["channel_names"], "labels": union.labels, "numTraining": len(imported)}
        described |= {key: first[key] for key in ("file_ending", "overwrite_image_reader_writer") if key in first}
        parts = ("train", "val") if all(folds) else ()
        fold = {part: sorted(n for fold in folds if fold for n in fold[part] if n in imported) for part in parts}
        return {**described, "dataset": listed}, fold, {"weights": weight_of, **more}

    return run_import(
        folder,
        settings,
        list(chosen.values()),
        describe,
        structures=order,
        superclasses=superclasses,
        left_out=[job.name for job in jobs if not job.annotated],
        outputs_of=lambda name, record: chosen[name].outputs if name in chosen else (),
        remedy='drop it in a mapping file ("background", --mapping)',
        allow_unannotated=allow_unannotated,
        num_processes=num_processes,
        on_case=on_case,
    )


def _reference(image: Path, folder: Path) -> str:
    """A path for ``dataset.json``: relative to its folder where it stays right when ``nnUNet_raw`` is moved."""
    raw = folder.resolve().parent
    return f"../{image.relative_to(raw).as_posix()}" if image.is_relative_to(raw) else str(image)
