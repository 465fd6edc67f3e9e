"""``stunet rank``: which pre-trained checkpoint to fine-tune on a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stunet.cli.options import Device, complete_weights

if TYPE_CHECKING:
    from stunet.ranking import CandidateScores, Ranking


def rank(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Target dataset: id or name, preprocessed.")],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoints",
            help="Checkpoints, model folders or fetched names. Takes several.",
            autocompletion=complete_weights,
        ),
    ] = None,
    zoo: Annotated[Path | None, typer.Option(help="YAML file with the checkpoints and names for them.")] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="A configuration.")] = "3d_fullres",
    fold: Annotated[str, typer.Option("-f", "--fold", help="Take only cases that this fold trains on.")] = "all",
    plans: Annotated[
        str, typer.Option("--plans", "-p", help="Plans that the target is preprocessed with.")
    ] = "nnUNetPlans",
    metrics: Annotated[
        str, typer.Option(help="Names with commas between; the first one ranks.")
    ] = "ccfv,logme,transrate,leep,gbc,zero-shot",
    n_cases: Annotated[int, typer.Option("--cases", help="Cases to look at, drawn by seed.", min=2)] = 20,
    per_class: Annotated[int, typer.Option("--points", help="Voxels of each structure in a case.", min=8)] = 100,
    n_whole: Annotated[int, typer.Option("--whole", help="Voxels of the whole volume of a case.", min=8)] = 1000,
    normalize: Annotated[
        Literal["none", "variety", "both"], typer.Option(help="Unit features: none, variety or both.")
    ] = "both",
    debias: Annotated[
        Literal["none", "null", "project"], typer.Option(help="Noise of small samples: none, null or project.")
    ] = "null",
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows at once.", min=1)] = 2,
    n_resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples of the cases.", min=10)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of cases, points and resamples.", min=0)] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")] = Path("ranking"),
    trust: Annotated[
        list[str] | None, typer.Option("--trust", help="A network class of others' that may be imported. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ranking.json instead of a table.")] = False,
) -> None:
    """Rank checkpoints by how well they will transfer to a dataset, without fine-tuning any of them.

    Each is scored by its features of a few labelled cases: CC-FV (arXiv 2307.11958) and rivals. Writes ranking.json,
    ranking.csv and ranking.html, and keeps results, so that an interrupted ranking can be resumed. Exit status 1 where
    a candidate could not be scored, 2 where none could.
    """
    from stunet.cli.preflight import preflight

    preflight(dataset, plans=plans, configuration=configuration, device=device, writes=output)
    from stunet import ranking
    from stunet.cli.options import choose_device
    from stunet.errors import UsageError
    from stunet.reports.ranking import write_ranking

    if bool(checkpoints) == (zoo is not None):
        got = "neither --checkpoints nor --zoo" if zoo is None else "both --checkpoints and --zoo"
        raise UsageError(f"{got} given: name the checkpoints by one of them")
    with _progress() as (on_progress, on_candidate):
        result = ranking.rank(
            zoo or checkpoints or [],
            dataset,
            configuration=configuration,
            plans=plans,
            fold=fold,
            metrics=[name.strip() for name in metrics.split(",") if name.strip()],
            n_cases=n_cases,
            per_class=per_class,
            n_whole=n_whole,
            normalise=normalize,
            debias=debias,
            device=choose_device(device),
            batch_size=batch_size,
            n_resamples=n_resamples,
            seed=seed,
            trust=trust or (),
            keep_in=output / "results",
            on_progress=on_progress,
            on_candidate=on_candidate,
        )
    output.mkdir(parents=True, exist_ok=True)
    paths = write_ranking(result, output)
    if as_json:
        typer.echo(paths[0].read_text(encoding="utf-8"), nl=False)
    else:
        _show(result, paths[2])
    if result.failures:
        raise typer.Exit(1 if result.rows else 2)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str, float], None], Callable[[CandidateScores], None]]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from stunet.cli.console import stderr

    columns = (BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        bar = progress.add_task("reading cases", total=1.0)

        def report(result: CandidateScores) -> None:
            took = f"{result.seconds:.1f} s" if result.seconds else "kept from an earlier run"
            said = f"{result.name} could not be scored: {result.error}" if result.error else f"{result.name}: {took}"
            stderr.print(said, highlight=False, markup=False, soft_wrap=True)

        yield lambda doing, share: progress.update(bar, completed=share, description=doing), report


def _show(ranking: Ranking, page: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from stunet.cli.console import stdout
    from stunet.reports.ranking import short_names

    def say(line: str, **style: Any) -> None:
        stdout.print(line, highlight=False, markup=False, soft_wrap=True, **style)

    mean_ranks, has_interval = ranking.mean_ranks, "ccfv" in ranking.metrics
    heads = [name.replace("transrate", "trans-\nrate").replace("zero-shot", "zero-\nshot") for name in ranking.metrics]
    heads += ["mean\nrank"] * bool(mean_ranks) + ["ccfv, 95 %\nof resamples"] * has_interval
    rows = []
    for place, row in enumerate(ranking.rows):
        scores = [(row.scores.get(metric), ranking.preferred.get(metric) is row) for metric in ranking.metrics]
        cells = [Text("-" if score is None else f"{score:.2f}", "bold" if best else "") for score, best in scores]
        if mean_ranks:
            cells.append(Text(f"{mean_ranks[place]:.1f}", "bold" if row is ranking.consensus else ""))
        if has_interval:
            cells.append(Text("" if row.interval is None else "{:.2f} to {:.2f}".format(*row.interval)))
        rows.append(cells)
    widths = [max(map(len, [*head.split("\n"), *map(str, column)])) for head, *column in zip(heads, *rows, strict=True)]
    full = [row.name for row in ranking.rows]
    names = short_names(full, max(12, stdout.width - sum(widths) - len(widths) - 6))
    table = Table(title=f"Best first by {ranking.metric}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", justify="right", min_width=len(str(len(rows))))
    table.add_column("candidate", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for place, (name, cells) in enumerate(zip(names, rows, strict=True), start=1):
        table.add_row(str(place), Text(name), *cells)
    stdout.print(table)
    for place, (name, whole) in enumerate(zip(names, full, strict=True), start=1):
        if name != whole:
            say(f"{place}: {whole}")
    stdout.print(f"\n{ranking.verdict}", highlight=False, markup=False)
    for warning in ranking.warnings:
        say(f"warning: {warning}")
    say(f"Report: {page}")
    for number, command in enumerate(ranking.commands):
        say("or:" if number else "Next:")
        say(f"$ {command}", style="bold")
