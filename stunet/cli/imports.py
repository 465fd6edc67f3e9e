"""``stunet import``: other layouts as nnU-Net raw datasets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stunet.cli.console import Command, Group, examples
from stunet.cli.import_steps import PREPROCESSED, new_dataset, print_failures, print_line, print_stale, shorten
from stunet.cli.unions import union

if TYPE_CHECKING:
    from stunet.datasets import ImportReport, OnCase, TotalSegmentatorSource

__all__ = ["app"]

app = typer.Typer(cls=Group, help="Turn other layouts into nnU-Net raw datasets.", no_args_is_help=True)
app.command(
    "union",
    cls=Command,
    epilog=examples(
        "stunet import union -d 110 --from 101 4 --dry-run > mapping.yaml",
        "stunet import union -d 110 --from 101 4 --mapping mapping.yaml",
    ),
)(union)

_MOST_OVERLAPS = 8


class Images(str, Enum):
    """How images get into a dataset."""

    copy = "copy"
    link = "link"


@app.callback()
def _options() -> None:
    """Turn other layouts into nnU-Net raw datasets."""


@app.command(
    cls=Command,
    epilog=examples(
        "stunet import totalsegmentator Totalsegmentator_v2 -d 101",
        "stunet import totalsegmentator Totalsegmentator_v2 -d 102 --group ribs",
    ),
)
def totalsegmentator(
    source: Annotated[Path, typer.Argument(help="Folder that holds the cases and meta.csv.")],
    dataset_id: Annotated[int, typer.Option("-d", "--dataset-id", help="Id of the new dataset.")],
    name: Annotated[str, typer.Option(help="Its name, after the id.")] = "TotalSegmentator",
    task: Annotated[
        str, typer.Option(help="total, a label vocabulary of this package, or a JSON file with a list of structures.")
    ] = "total",
    version: Annotated[str, typer.Option(help="Of the task total: auto, 1 (104 structures) or 2 (117).")] = "auto",
    label_order: Annotated[
        str | None,
        typer.Option(
            help="Order of label values: stunet (alphabetical, as in the published STU-Net weights; default of total) "
            "or official (that of the task's list; default of others). Where masks overlap, the later one wins."
        ),
    ] = None,
    structures: Annotated[
        list[str] | None, typer.Option(help="Only these, separated by commas; label values are counted anew.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Only those of a group of total: organs, vertebrae, cardiac, muscles or ribs."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Cases to leave out, separated by commas, or none; s0864 of version 1 by default."),
    ] = None,
    images: Annotated[
        Images,
        typer.Option(help="copy, or link: hard links, symbolic ones where the source is on another file system."),
    ] = Images.copy,
    allow_unannotated: Annotated[
        bool, typer.Option("--allow-unannotated", help="Keep structures that no training case annotates.")
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option("-np", help="Cases at a time; by default up to 8, as cores and images are worth it.", min=1),
    ] = None,
) -> None:
    """Import a dataset in TotalSegmentator's layout: CASE/ct.nii.gz and CASE/segmentations/STRUCTURE.nii.gz.

    A missing mask file means not annotated, a blank mask annotated and absent; annotated_labels.json keeps which is
    which. The split of meta.csv becomes splits_final.json, its test cases go to imagesTs and labelsTs.

    An interrupted import continues when the same command is run again. Cases that cannot be read are listed at the end;
    the dataset is complete without them, and the exit status is 2. Running again tries only those.
    """
    from stunet.cli.console import stdout
    from stunet.datasets import KNOWN_BAD_CASES, choose_structures, import_cases, read_totalsegmentator

    folder = new_dataset(dataset_id, name)
    found = read_totalsegmentator(source)
    told, chosen = choose_structures(
        found, task=task, version=version, label_order=label_order, structures=_split(structures), groups=_split(group)
    )
    excluded = _excluded(_split(exclude) if exclude is not None else None, KNOWN_BAD_CASES.get(told, ()), found)
    print_line(f"{len(found.cases)} cases, {len(chosen)} structures" + (f" of version {told}" if told else ""))
    details = {"task": task if task == "total" else Path(task).name, "version": told}
    n_cases = sum(case.name not in excluded for case in found.cases.values())
    started = time.monotonic()
    with _progress(n_cases) as (on_case, decoded):
        report = import_cases(
            list(found.cases.values()),
            chosen,
            folder,
            details=details,
            excluded=excluded,
            link_images=images is Images.link,
            preprocessed=os.environ.get(PREPROCESSED) or None,
            allow_unannotated=allow_unannotated,
            num_processes=num_processes,
            on_case=on_case,
        )
    seconds = time.monotonic() - started
    _report(report, found, excluded, decoded[0], seconds)
    stdout.print(f"Next: stunet labels check -d {dataset_id}", highlight=False)
    if report.failed:
        raise typer.Exit(2)


def _split(values: list[str] | None) -> list[str]:
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


def _excluded(given: list[str] | None, known_bad: tuple[str, ...], source: TotalSegmentatorSource) -> set[str]:
    from stunet.errors import UsageError

    if given is None:
        return set(known_bad) & set(source.cases)
    names = set(given) - {"none"}
    unknown = sorted(names - set(source.cases) - set(source.absent))
    if unknown:
        raise UsageError(
            "an unknown case to exclude",
            got=unknown[0],
            expected=f"cases of {source.folder}, or none",
            remedy="Correct --exclude.",
        )
    return names


@contextmanager
def _progress(n_cases: int) -> Iterator[tuple[OnCase, list[int]]]:
    """A bar with cases and masks per second; yields what to call for each case, and a count of masks decoded."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stunet.cli.console import stdout

    decoded = [0]
    columns = (
        TextColumn("Importing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cases"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stdout) as progress:
        started, bar = time.monotonic(), progress.add_task("", total=n_cases, rate="")

        def on_case(case: str, n_masks: int, reused: bool) -> None:
            decoded[0] += 0 if reused else n_masks
            rate = decoded[0] / max(time.monotonic() - started, 1e-9)
            progress.update(bar, advance=1, rate=f"{rate:.0f} masks/s")

        yield on_case, decoded
        progress.update(bar, completed=n_cases)


def _report(
    report: ImportReport, source: TotalSegmentatorSource, excluded: set[str], n_masks: int, seconds: float
) -> None:
    n_train, n_val, n_test = (list(report.splits.values()).count(split) for split in ("train", "val", "test"))
    print_line(f"Wrote {report.folder}: {n_train} cases to train, {n_val} to validate, {n_test} to test")
    rate = f", {n_masks / seconds:.0f} masks/s" if n_masks else ""
    print_line(f"{n_masks} masks decoded in {seconds:.1f} s{rate}; {report.reused} cases were finished before")
    for names, what in (
        (sorted(excluded & set(source.cases)), "excluded"),
        (report.left_out, "left out, as they annotate none of these structures"),
        (report.kept, "kept from an earlier run, as the source does not have them whole any more"),
        (list(source.absent), "in meta.csv and not in the source"),
        (list(source.unlisted), "not in meta.csv, taken for training"),
    ):
        if names:
            print_line(f"{len(names)} {'case' if len(names) == 1 else 'cases'} {what}: {shorten(names)}")
    if not report.has_folds:
        print_line("No official split: nnU-Net makes five folds of its own.")
    _print_overlaps(report)
    print_stale(report.stale, report.folder.name)
    print_failures(report.failed)


def _print_overlaps(report: ImportReport) -> None:
    from stunet.cli.console import PlainTable, stdout

    if not report.overlaps:
        return
    table = PlainTable("structure", "lost to", "voxels", title="Overlaps", numbers=("voxels",))
    for (loser, winner), n in list(report.overlaps.items())[:_MOST_OVERLAPS]:
        table.add_row(loser, winner, str(n))
    stdout.print(table)
    print_line(
        f"{sum(report.overlaps.values())} voxels in {len(report.overlaps)} pairs; all of them in import_report.json"
    )
