"""``stunet import union``: several nnU-Net raw datasets as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stunet.cli.console import PlainTable, stderr, stdout
from stunet.cli.import_steps import PREPROCESSED, new_dataset, print_failures, print_line, print_stale, shorten

if TYPE_CHECKING:
    from stunet.datasets import UnionReport, UnionSource
    from stunet.labels import LabelUnion

__all__ = ["union"]


def union(
    dataset_id: Annotated[int, typer.Option("-d", "--dataset-id", help="Id of the new dataset.")],
    sources: Annotated[list[str], typer.Option("--from", help="Ids or names of two or more datasets in nnUNet_raw.")],
    name: Annotated[str, typer.Option(help="Name of the new dataset, after the id.")] = "Union",
    mapping: Annotated[
        Path | None,
        typer.Option(help="YAML file that says which structure each label is, in the form that --dry-run prints."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write nothing: print what would become of the labels, as a table and as YAML."),
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="How often each case of a dataset is drawn relative to others, for example 101=1 4=0.5; by default "
            "inversely to the square root of the dataset's number of cases."
        ),
    ] = None,
    allow_unannotated: Annotated[
        bool, typer.Option("--allow-unannotated", help="Keep structures that no case annotates.")
    ] = False,
    num_processes: Annotated[int, typer.Option("-np", "--np", help="Cases at a time.", min=1)] = 8,
) -> None:
    """Make one dataset of the training cases of several, each case annotating what its source labels.

    Structures are merged by name. A label such as kidney becomes a superclass where another dataset has kidney_left and
    kidney_right: it is listed after the others, and stands for both. Look at what would happen with --dry-run; its YAML
    goes to standard output, may be edited, and is given back with --mapping.

    Images stay where they are, so keep the source datasets. An interrupted run continues when the same command is run
    again. Cases that cannot be read are listed at the end; the dataset is complete without them, and the exit status
    is 2.
    """
    from stunet.datasets import check_sources, import_union, merge_sources
    from stunet.labels import dump_mapping, read_mapping

    overrides = read_mapping(mapping) if mapping is not None else None
    folder = new_dataset(dataset_id, name)
    found = _read_sources(sources)
    check_sources(found)
    given = _parse_weights(weights or [], found)
    merged = merge_sources(found, overrides)
    _print_labels(merged, error=dry_run)
    if dry_run:
        _print_weights(found, {s.name: list(s.cases) for s in found}, given, error=True)
        typer.echo(dump_mapping(merged.mapping, merged.superclasses), nl=False)
        return
    with _progress(sum(len(source.cases) for source in found)) as on_case:
        report = import_union(
            found,
            merged,
            folder,
            weights=given,
            allow_unannotated=allow_unannotated,
            preprocessed=os.environ.get(PREPROCESSED) or None,
            num_processes=num_processes,
            on_case=on_case,
        )
    _print_report(report, found, given)
    print_line(f"Next: stunet labels check -d {dataset_id}")
    if report.failed:
        raise typer.Exit(2)


def _read_sources(sources: Sequence[str]) -> list[UnionSource]:
    from stunet.datasets import read_union_source
    from stunet.environment import find_dataset, nnunet_folder

    raw = nnunet_folder("nnUNet_raw")
    names = [find_dataset(source) for source in sources]
    once = {name: read_union_source(raw / name, name=name) for name in dict.fromkeys(names)}
    return [once[name] for name in names]


def _parse_weights(weights: Sequence[str], sources: Sequence[UnionSource]) -> dict[str, float]:
    from stunet.errors import UsageError

    names = {alias: s.name for s in sources for alias in (s.name, str(s.id), f"{s.id:03d}")}
    parsed: dict[str, float] = {}
    for text in weights:
        source, _, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if source not in names or names[source] in parsed or not 0 < weight < float("inf"):
            raise UsageError(
                "an impossible sampling weight",
                got=text,
                expected=f"ID=NUMBER with a number above 0, once for an id of {', '.join(str(s.id) for s in sources)}",
                remedy="Correct --weights, for example: --weights 101=1 4=0.5",
            )
        parsed[names[source]] = weight
    return parsed


def _print_labels(merged: LabelUnion, *, error: bool) -> None:
    table = PlainTable("value", "structure", "from", "stands for", title="Structures of the union", numbers=("value",))
    for structure, value in merged.labels.items():
        labels = [
            source.partition("_")[0].removeprefix("Dataset").lstrip("0") + (f" ({label})" if label != structure else "")
            for source, names in merged.mapping.items()
            for label, name in names.items()
            if name == structure
        ]
        if labels or structure in merged.superclasses:
            members = ", ".join(merged.superclasses.get(structure, ()))
            table.add_row(str(value), structure, ", ".join(labels), members)
    (stderr if error else stdout).print(table)
    for one, other in merged.doubtful:
        print_line(
            f"warning: {one} and {other} may overlap. If they are the same, or one is part of the other, say so in a "
            "mapping file (--mapping).",
            error=True,
        )


def _print_weights(
    sources: Sequence[UnionSource], cases: Mapping[str, Sequence[str]], given: Mapping[str, float], *, error: bool
) -> None:
    from stunet.datasets import sampling_weights

    totals = {s.name: sum(sampling_weights(s, cases[s.name], given).values()) for s in sources}
    numbers = ("cases", "weight of a case", "share of training")
    table = PlainTable("dataset", *numbers, title="Sources", numbers=numbers)
    for source, total in totals.items():
        n = len(cases[source])
        share = total / sum(totals.values())
        table.add_row(source, str(n), f"{total / n:.4g}" if n else "", f"{share:.1%}")
    (stderr if error else stdout).print(table)


@contextmanager
def _progress(n_cases: int) -> Iterator[Callable[[str, bool], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stunet.cli.console import stdout

    columns = (TextColumn("Label maps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stdout) as progress:
        bar = progress.add_task("", total=n_cases)
        yield lambda case, reused: progress.advance(bar)
        progress.update(bar, completed=n_cases)


def _print_report(report: UnionReport, sources: Sequence[UnionSource], given: Mapping[str, float]) -> None:
    n_cases = sum(map(len, report.cases.values()))
    print_line(f"Wrote {report.folder}: {n_cases} cases; {report.reused} were finished before")
    own_names = {
        source.name: [case for case, name in source.cases.items() if name in report.cases[source.name]]
        for source in sources
    }
    _print_weights(sources, own_names, given, error=False)
    for names, what in (
        (report.left_out, "left out, as they annotate none of these structures"),
        (report.kept, "kept from an earlier run, as their source cannot be read any more"),
    ):
        if names:
            print_line(f"{len(names)} {'case' if len(names) == 1 else 'cases'} {what}: {shorten(names)}")
    if report.has_folds:
        print_line("The first folds of the sources' splits_final.json are the only fold.")
    else:
        print_line("Not every source has a splits_final.json in nnUNet_raw: nnU-Net makes five folds of its own.")
    print_stale(report.stale, report.folder.name)
    print_failures(report.failed)
