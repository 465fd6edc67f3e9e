"""``stunet rank``: which pre-trained checkpoint to fine-tune on a dataset."""

from __future__ import annotations

import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stunet.cli.options import Device, complete_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stunet.planning import PreprocessedDataset
    from stunet.ranking import CandidateScores, Ranking, TargetCases, ZooEntry
    from stunet.reports.ranking import RankingReport

__all__ = ["rank"]

_DEFAULT_METRICS = "ccfv,logme,transrate,leep,gbc,zero-shot"


def rank(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Target dataset: id or name, preprocessed.")],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoints",
            help="Checkpoints, model folders or fetched names. Takes several.",
            autocompletion=complete_weights,
        ),
    ] = None,
    zoo: Annotated[Path | None, typer.Option(help="YAML file with the checkpoints and names for them.")] = None,
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="A configuration.")] = "3d_fullres",
    fold: Annotated[str, typer.Option("-f", "--fold", help="Take only cases that this fold trains on.")] = "all",
    plans: Annotated[str, typer.Option("--plans", "-p", help="Plans that the target is preprocessed with.")] = (
        "nnUNetPlans"
    ),
    metrics: Annotated[str, typer.Option(help="Names with commas between; the first one ranks.")] = _DEFAULT_METRICS,
    n_cases: Annotated[int, typer.Option("--cases", help="Cases to look at, drawn by seed.", min=2)] = 20,
    per_class: Annotated[int, typer.Option("--points", help="Voxels of each structure in a case.", min=8)] = 100,
    n_whole: Annotated[int, typer.Option("--whole", help="Voxels of the whole volume of a case.", min=8)] = 1000,
    normalize: Annotated[str, typer.Option(help="Unit features: none, variety or both.")] = "both",
    debias: Annotated[str, typer.Option(help="Noise of small samples: none, null or project.")] = "null",
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
    ranking.csv and ranking.html, and keeps results, so that a ranking that was interrupted goes on where it was. Exit
    status 1 where a candidate could not be scored, 2 where none could.
    """
    from stunet.cli.console import stderr
    from stunet.cli.options import choose_device
    from stunet.cli.preflight import preflight

    preflight(dataset, plans=plans, configuration=configuration, device=device, writes=output)
    from stunet.planning import open_preprocessed
    from stunet.ranking import MetricSettings, ResultCache, check_metrics
    from stunet.reports.ranking import RankingReport, write_ranking

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    check_metrics(names)
    settings = MetricSettings(normalise=_one_of("--normalize", normalize, ("none", "variety", "both")),
                              debias=_one_of("--debias", debias, ("none", "null", "project")))  # fmt: skip
    chosen_device = choose_device(device)
    entries = _entries(checkpoints or [], zoo)
    target = open_preprocessed(dataset, plans, configuration)
    cases = target.choose(target.training_cases(fold), n_cases, seed)
    output.mkdir(parents=True, exist_ok=True)
    cache = ResultCache(output / "results")
    prepared, ranking = _rank(target, cases, entries, cache, metrics=names, settings=settings, device=chosen_device,
                              per_class=per_class, n_whole=n_whole, batch_size=batch_size, n_resamples=n_resamples,
                              seed=seed, trust=trust or [])  # fmt: skip
    for path in cache.outdated:
        stderr.print(f"Computed again, as another version of this package wrote it: {path}", soft_wrap=True)
    report = RankingReport(
        ranking=ranking,
        target=prepared,
        about={"dataset": target.name, "configuration": configuration, "plans": plans},
        metrics=names,
        settings={"fold": fold, "cases": len(cases), "points of each structure": per_class,
                  "points of the whole volume": n_whole, "normalize": normalize, "debias": debias,
                  "resamples": n_resamples, "seed": seed, "device": chosen_device},
        commands=_commands(ranking, target, configuration, plans, fold),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    _show(report, write_ranking(report, output), as_json)
    if ranking.failures:
        raise typer.Exit(1 if ranking.candidates else 2)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    from stunet.errors import UsageError

    if value not in allowed:
        raise UsageError(
            f"impossible value of {option}", got=value, expected=" or ".join(allowed), remedy=f"Correct {option}."
        )
    return value


def _entries(checkpoints: Sequence[Path], zoo: Path | None) -> list[ZooEntry]:
    from stunet.cli.convert import find_fetched
    from stunet.errors import UsageError
    from stunet.ranking import name_checkpoints, read_zoo

    if bool(checkpoints) == (zoo is not None):
        raise UsageError(
            "no checkpoints to choose from" if zoo is None else "checkpoints from two places",
            got="neither --checkpoints nor --zoo" if zoo is None else "--checkpoints and --zoo",
            expected="one of them",
            remedy="Give the checkpoints, or a zoo file that lists them.",
        )
    if zoo is not None:
        return read_zoo(zoo)
    return name_checkpoints([find_fetched([path])[1][0] for path in checkpoints])


def _rank(
    dataset: PreprocessedDataset, cases: Sequence[str], entries: Sequence[ZooEntry], cache: Any, **options: Any
) -> tuple[TargetCases, Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from stunet.cli.console import stderr
    from stunet.planning import fit_strides
    from stunet.ranking import Failure, Target, prepare_target, rank_candidates

    configuration = dataset.configuration
    network = Target(
        input_channels=dataset.input_channels,
        patch_size=configuration["patch_size"],
        strides=fit_strides(configuration["architecture"]["arch_kwargs"]["strides"]),
        trust=options.pop("trust"),
    )
    columns = (BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        # Reading the cases takes little of the time that a candidate takes.
        bar = progress.add_task("reading cases", total=0.2 + len(entries))
        prepared = prepare_target(
            dataset.load,
            cases,
            structures=dataset.structures,
            target=network,
            per_class=options.pop("per_class"),
            n_whole=options.pop("n_whole"),
            seed=options["seed"],
            ignore_label=dataset.ignore_label,
            annotated=dataset.annotated,
            on_case=lambda case: progress.advance(bar, 0.2 / len(cases)),
        )
        done = 0

        def finished(outcome: CandidateScores | Failure) -> None:
            nonlocal done
            done += 1
            progress.update(bar, completed=0.2 + done)
            took = "failed" if isinstance(outcome, Failure) else _took(outcome)
            stderr.print(f"{outcome.name}: {took}", highlight=False, markup=False, soft_wrap=True)

        def scoring(name: str, doing: str, share: float) -> None:
            progress.update(bar, completed=0.2 + done + 0.95 * share, description=f"{doing}: {name}")

        ranking = rank_candidates(entries, prepared, cache=cache, on_progress=scoring, on_candidate=finished, **options)
    return prepared, ranking


def _took(outcome: Any) -> str:
    return f"{outcome.seconds:.1f} s" if outcome.seconds else "kept from an earlier run"


def _commands(ranking: Ranking, target: PreprocessedDataset, configuration: str, plans: str, fold: str) -> list[str]:
    """How to fine-tune the first candidate, and the one of the lowest mean rank, where these are STU-Nets."""
    commands = []
    for candidate in {c.name: c for c in (*ranking.candidates[:1], ranking.consensus) if c is not None}.values():
        if str(candidate.description["network"]).startswith("STU-Net"):  # another network needs its own plans
            command = ["stunet", "finetune", "-d", str(int(target.name[7:10])), "-c", configuration]
            command += ["-f", fold] if fold != "all" else []  # whose validation cases the ranking has not seen
            command += ["--from", candidate.path, *(["-p", plans] if plans != "nnUNetPlans" else [])]
            commands.append(shlex.join(command))
    return commands


def _show(report: RankingReport, paths: Sequence[Path], as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from stunet.cli.console import stderr, stdout
    from stunet.reports.ranking_figures import short_names

    ranking = report.ranking
    for failure in ranking.failures:
        stderr.print(f"{failure.name} could not be scored: {failure.error}", soft_wrap=True)
    if as_json:
        typer.echo(paths[0].read_text(encoding="utf-8"), nl=False)
        return

    def say(line: str, **style: Any) -> None:
        stdout.print(line, highlight=False, markup=False, soft_wrap=True, **style)

    mean_ranks = ranking.mean_ranks
    has_interval = "ccfv" in report.metrics
    heads = [name.replace("transrate", "trans-\nrate").replace("zero-shot", "zero-\nshot") for name in report.metrics]
    heads += ["mean\nrank"] * bool(mean_ranks) + ["ccfv, 95 %\nof resamples"] * has_interval
    rows = []
    for place, candidate in enumerate(ranking.candidates):
        scores = [(candidate.scores.get(m), ranking.preferred.get(m) is candidate) for m in report.metrics]
        cells = [Text("-" if score is None else f"{score:.2f}", "bold" if best else "") for score, best in scores]
        if mean_ranks:
            cells.append(Text(f"{mean_ranks[place]:.1f}", "bold" if candidate is ranking.consensus else ""))
        if has_interval:
            cells.append(Text("" if candidate.interval is None else "{:.2f} to {:.2f}".format(*candidate.interval)))
        rows.append(cells)
    widths = [max(map(len, [*head.split("\n"), *map(str, column)])) for head, *column in zip(heads, *rows, strict=True)]
    full = [candidate.name for candidate in ranking.candidates]
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
    stdout.print(f"\n{report.verdict}", highlight=False, markup=False)
    for warning in report.warnings:
        say(f"warning: {warning}")
    say(f"Report: {paths[2]}")
    for number, command in enumerate(report.commands):
        say("or:" if number else "Next:")
        say(f"$ {command}", style="bold")
