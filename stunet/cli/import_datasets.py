"""``stunet import``: TotalSegmentator's layout, or several nnU-Net raw datasets, as one nnU-Net raw dataset."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from typer import Option

from stunet.cli.console import Group, case_bar, exit_with_failures, print_line, print_table, say, stderr, stdout
from stunet.cli.options import Processes, split_names
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import UsageError

if TYPE_CHECKING:
    from stunet.datasets.imports import ImportReport
    from stunet.datasets.unions import UnionSource
    from stunet.labels.mappings import LabelUnion

app = typer.Typer(cls=Group, help="Turn other layouts into nnU-Net raw datasets.", no_args_is_help=True)

_MOST_OVERLAPS = 8

_Id = Annotated[int, Option("-d", "--dataset-id", help="Id of the new dataset.")]


@app.command("totalsegmentator")
def totalsegmentator(
    source: Path,
    dataset_id: _Id,
    name: str = "TotalSegmentator",
    task: str = "total",
    version: Literal["auto", "1", "2"] = "auto",
    label_order: Literal["stunet", "official"] | None = None,
    structures: list[str] | None = None,
    group: list[str] | None = None,
    exclude: list[str] | None = None,
    images: Literal["copy", "link"] = "copy",
    allow_unannotated: bool = False,
    num_processes: Annotated[int | None, Option("-np", min=1)] = None,
) -> None:
    """Import a dataset in TotalSegmentator's layout: CASE/ct.nii.gz and CASE/segmentations/STRUCTURE.nii.gz.

    A missing mask file means not annotated, a blank mask annotated and absent; annotated_labels.json keeps which is
    which. The split of meta.csv becomes splits_final.json, its test cases go to imagesTs and labelsTs.

    An interrupted import continues when the same command is run again. Cases that cannot be read are listed at the end;
    the dataset is complete without them, and the exit status is 2. Running again tries only those.

    Options:
        source: Folder that holds the cases and meta.csv.
        name: Its name, after the id.
        task: total, a label vocabulary of this package, or a JSON file with a list of structures.
        version: Of the task total: auto, 1 (104 structures) or 2 (117).
        label_order: Order of label values: stunet (alphabetical, as in the published STU-Net weights; default of total)
            or official (that of the task's list; default of others). Where masks overlap, the later one wins.
        structures: Only these, separated by commas; label values are counted anew.
        group: Only those of a group of total: organs, vertebrae, cardiac, muscles or ribs.
        exclude: Cases to leave out, separated by commas, or none; s0864 of version 1 by default.
        images: copy, or link: hard links, symbolic ones where the source is on another file system.
        allow_unannotated: Keep structures that no training case annotates.
        num_processes: Cases at a time; by default up to 8, as cores and images are worth it.
    """
    from stunet.datasets.imports import dataset_folder
    from stunet.datasets.totalsegmentator import KNOWN_BAD_CASES, choose_structures, import_cases, read_totalsegmentator

    folder = dataset_folder(dataset_id, name)
    found = read_totalsegmentator(source)
    names, groups = split_names(*structures or ()), split_names(*group or ())
    told, chosen = choose_structures(found, task, version, label_order, names, groups)
    excluded = set(KNOWN_BAD_CASES.get(told, ())) & set(found.cases)
    if exclude is not None:
        excluded = set(split_names(*exclude)) - {"none"}
        if unknown := sorted(excluded - set(found.cases) - set(found.absent)):
            raise UsageError(f"an unknown case to exclude, {unknown[0]}: give --exclude cases of {source}, or none")
    print_line(f"{len(found.cases)} cases, {len(chosen)} structures" + (f" of version {told}" if told else ""))
    started = time.monotonic()
    with case_bar("Importing", len(set(found.cases) - excluded)) as on_case:
        report = import_cases(
            list(found.cases.values()),
            chosen,
            folder,
            details={"task": task if task == "total" else Path(task).name, "version": told},
            excluded=excluded,
            link_images=images == "link",
            allow_unannotated=allow_unannotated,
            num_processes=num_processes,
            on_case=on_case,
        )
    n_train, n_val, n_test = (list(report.splits.values()).count(split) for split in ("train", "val", "test"))
    print_line(f"Wrote {report.folder}: {n_train} cases to train, {n_val} to validate, {n_test} to test")
    print_line(f"It took {time.monotonic() - started:.1f} s; {report.reused} cases were finished before")
    _print_cases(sorted(excluded & set(found.cases)), "excluded")
    _print_cases(list(found.absent), "in meta.csv and not in the source")
    _print_cases(list(found.unlisted), "not in meta.csv, taken for training")
    if not report.has_folds:
        print_line("No official split: nnU-Net makes five folds of its own.")
    if report.overlaps:
        rows = [(*pair, n) for pair, n in list(report.overlaps.items())[:_MOST_OVERLAPS]]
        print_table(rows, "structure", "lost to", "voxels", title="Overlaps", numbers=["voxels"])
        n_voxels = sum(report.overlaps.values())
        print_line(f"{n_voxels} voxels in {len(report.overlaps)} pairs; all of them in import_report.json")
    _finish(report, f"stunet labels check -d {dataset_id}")


@app.command("union")
def union(
    dataset_id: _Id,
    sources: Annotated[list[str], Option("--from")],
    name: str = "Union",
    mapping: Path | None = None,
    dry_run: bool = False,
    weights: list[str] | None = None,
    allow_unannotated: bool = False,
    num_processes: Processes = 8,
) -> None:
    """Make one dataset of the training cases of several, each case annotating what its source labels.

    Structures are merged by name. A label such as kidney becomes a superclass where another dataset has kidney_left and
    kidney_right: it is listed after the others, and stands for both. Look at what would happen with --dry-run; its YAML
    goes to standard output, may be edited, and is given back with --mapping.

    Images stay where they are, so keep the source datasets. An interrupted run continues when the same command is run
    again. Cases that cannot be read are listed at the end; the dataset is complete without them, and the exit status
    is 2.

    Options:
        sources: Ids or names of two or more datasets in nnUNet_raw.
        name: Name of the new dataset, after the id.
        mapping: YAML file that says which structure each label is, in the form that --dry-run prints.
        dry_run: Write nothing: print what would become of the labels, as a table and as YAML.
        weights: How often each case of a dataset is drawn relative to others, for example 101=1 4=0.5; by default
            inversely to the square root of the dataset's number of cases.
        allow_unannotated: Keep structures that no case annotates.
        num_processes: Cases at a time.
    """
    from stunet.datasets.imports import dataset_folder
    from stunet.datasets.unions import import_union, merge_sources, read_union_source
    from stunet.labels.mappings import dump_mapping, read_mapping

    overrides = None if mapping is None else read_mapping(mapping)
    folder = dataset_folder(dataset_id, name)
    raw = nnunet_folder("nnUNet_raw")
    found = [read_union_source(raw / each) for each in map(find_dataset, sources)]
    merged = merge_sources(found, overrides)
    given = _parse_weights(weights or [], found)
    console = stderr if dry_run else stdout  # whose other output is YAML
    _print_labels(merged, console)
    if dry_run:
        _print_weights(found, {s.name: list(s.cases) for s in found}, given, console)
        typer.echo(dump_mapping(merged.mapping, merged.superclasses), nl=False)
        return
    with case_bar("Label maps", sum(len(source.cases) for source in found)) as on_case:
        report = import_union(
            found,
            merged,
            folder,
            weights=given,
            allow_unannotated=allow_unannotated,
            num_processes=num_processes,
            on_case=on_case,
        )
    print_line(f"Wrote {report.folder}: {len(report.records)} cases; {report.reused} were finished before")
    own_names = {s.name: [case for case, new in s.cases.items() if new in report.records] for s in found}
    _print_weights(found, own_names, given, console)
    own = "Not every source has a splits_final.json in nnUNet_raw: nnU-Net makes five folds of its own."
    print_line("The first folds of the sources' splits_final.json are the only fold." if report.has_folds else own)
    _finish(report, f"stunet labels check -d {dataset_id}")


@app.command("images")
def images(
    source: Path,
    dataset_id: _Id,
    name: str = "Images",
    pattern: str = "*",
    channel_names: list[str] | None = None,
    num_processes: Processes = 8,
) -> None:
    """Import images without labels, to pre-train on: a folder, a BIDS tree, or a text file with a path in each line.

    Formats are .nii.gz, .nii, .mha and .nrrd; several channels by suffix, as NAME_0000.nii.gz and NAME_0001.nii.gz.
    Images stay where they are, so keep them. The only label is body, where an image is brighter than Otsu's threshold:
    nnU-Net plans by it. Cases that cannot be read are listed at the end; the dataset is complete without them, and the
    exit status is 2.

    Options:
        source: The folder, searched with its subfolders, or the list.
        name: Name of the new dataset, after the id.
        pattern: Which file names count, for example '*_T1w.nii.gz'.
        channel_names: By which nnU-Net normalizes; CT by default where values are Hounsfield units.
        num_processes: Cases at a time.
    """
    from stunet.datasets.images import find_images, import_images
    from stunet.datasets.imports import dataset_folder

    folder = dataset_folder(dataset_id, name)
    cases = find_images(source, pattern=pattern)
    with case_bar("Images", len(cases)) as on_case:
        names = tuple(split_names(*channel_names or ()))
        report = import_images(cases, folder, channel_names=names, num_processes=num_processes, on_case=on_case)
    print_line(f"Wrote {report.folder}: {len(report.records)} cases; {report.reused} were finished before")
    _finish(report, f"nnUNetv2_plan_and_preprocess -d {dataset_id}")


def _parse_weights(weights: Sequence[str], sources: Sequence[UnionSource]) -> dict[str, float]:
    names = {alias: s.name for s in sources for alias in (s.name, str(s.id), f"{s.id:03d}")}
    parsed: dict[str, float] = {}
    for text in weights:
        source, _, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if source not in names or names[source] in parsed or not 0 < weight < float("inf"):
            ids = ", ".join(str(s.id) for s in sources)
            raise UsageError(f"an impossible sampling weight {text}: give ID=NUMBER, above 0, once for an id of {ids}")
        parsed[names[source]] = weight
    return parsed


def _print_labels(merged: LabelUnion, console: Console) -> None:
    sources: dict[str, list[str]] = {}
    for source, names in merged.mapping.items():
        number = source[7:10].lstrip("0")
        for label, structure in names.items():
            sources.setdefault(structure, []).append(number if label == structure else f"{number} ({label})")
    rows = []
    for structure, value in merged.labels.items():
        members = merged.superclasses.get(structure, ())
        if structure in sources or members:
            rows.append((value, structure, ", ".join(sources.get(structure, [])), ", ".join(members)))
    columns, title = ("value", "structure", "from", "stands for"), "Structures of the union"
    print_table(rows, *columns, title=title, numbers=["value"], console=console)
    for one, other in merged.doubtful:
        remedy = "If they are the same, or one is part of the other, say so in a mapping file (--mapping)."
        say(f"warning: {one} and {other} may overlap. {remedy}")


def _print_weights(
    sources: Sequence[UnionSource], cases: Mapping[str, Sequence[str]], given: Mapping[str, float], console: Console
) -> None:
    from stunet.datasets.unions import sampling_weights

    totals = {s.name: sum(sampling_weights(s, cases[s.name], given).values()) for s in sources}
    rows = []
    for source, total in totals.items():
        n = len(cases[source])
        rows.append((source, n, f"{total / n:.4g}" if n else "", f"{total / sum(totals.values()):.1%}"))
    numbers = ("cases", "weight of a case", "share of training")
    print_table(rows, "dataset", *numbers, title="Sources", numbers=numbers, console=console)


def _print_cases(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        print_line(f"{len(names)} {'case' if len(names) == 1 else 'cases'} {what}: {shown}")


def _finish(report: ImportReport, following: str) -> None:
    _print_cases(report.left_out, "left out, as they annotate none of these structures")
    _print_cases(report.kept, "kept from an earlier run, as the source does not have them whole any more")
    for path in report.stale:
        again = f"stunet labels carry -d {report.folder.name}"
        print_line(f"Left alone, as it differs: {path}. Preprocess again, then: {again}")
    print_line(f"Next: {following}")
    exit_with_failures(report.failed, "could not be imported; the dataset is complete without them.")
