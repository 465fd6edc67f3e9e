"""``stunet rank``: which pre-trained checkpoint to fine-tune on a dataset; ``stunet rank-eval``: was it right?"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text
from typer import Option

from stunet.cli.console import print_json, print_line, print_table, progress_bar, say, stdout
from stunet.cli.options import Device, Json, Trust, check_disk, choose_device, complete_weights, preflight, split_names
from stunet.errors import UsageError

if TYPE_CHECKING:
    from stunet.ranking import CandidateScores, Ranking

_CHECKPOINTS_HELP = "Checkpoints, model folders or fetched names. Takes several."
_METRICS = "logme,ccfv,transrate,leep,gbc,zero-shot"


def rank(
    dataset: Annotated[str, Option("-d", "--dataset", help="Target dataset: id or name, preprocessed.")],
    checkpoints: Annotated[list[str] | None, Option(help=_CHECKPOINTS_HELP, autocompletion=complete_weights)] = None,
    zoo: Annotated[Path | None, Option(help="YAML file with the checkpoints and names for them.")] = None,
    configuration: Annotated[str, Option("-c", "--configuration", help="A configuration.")] = "3d_fullres",
    fold: Annotated[str, Option("-f", "--fold", help="Take only cases that this fold trains on.")] = "all",
    plans: Annotated[str, Option("--plans", "-p", help="Plans that the target is preprocessed with.")] = "nnUNetPlans",
    metrics: Annotated[str, Option(help="Names with commas between; the first one ranks.")] = _METRICS,
    n_cases: Annotated[int, Option("--cases", help="Cases to look at, drawn by seed.", min=2)] = 20,
    per_class: Annotated[int, Option("--points", help="Voxels of each structure in a case.", min=8)] = 100,
    n_whole: Annotated[int, Option("--whole", help="Voxels of the whole volume of a case.", min=8)] = 1000,
    normalize: Annotated[Literal["none", "variety", "both"], Option(help="What sees unit features.")] = "both",
    debias: Annotated[Literal["none", "null", "project"], Option(help="What is done about sampling noise.")] = "null",
    device: Device = "auto",
    batch_size: Annotated[int, Option(help="Windows at once.", min=1)] = 2,
    n_resamples: Annotated[int, Option("--resamples", help="Bootstrap resamples of the cases.", min=10)] = 1000,
    seed: Annotated[int, Option(help="Seed of cases, points and resamples.", min=0)] = 0,
    output: Annotated[Path, Option("-o", "--output", help="Folder for the results.")] = Path("ranking"),
    trust: Trust = None,
    as_json: Annotated[bool, Option("--json", help="Print ranking.json instead of a table.")] = False,
) -> None:
    """Rank checkpoints by how well they will transfer to a dataset, without fine-tuning any of them.

    Each is scored by its features of a few labelled cases: LogME (arXiv 2102.11005), CC-FV (arXiv 2307.11958) and
    others. Writes ranking.json, ranking.csv and ranking.html, and study.yaml, which measures the first three. Keeps
    results, so that an interrupted ranking can be resumed. Exit status 1 where a candidate could not be scored, 2 where
    none could.
    """
    preflight(dataset, plans, configuration)
    check_disk(output)
    from stunet import ranking
    from stunet.reports.figures import write_ranking

    if bool(checkpoints) == (zoo is not None):
        got = "neither --checkpoints nor --zoo" if zoo is None else "both --checkpoints and --zoo"
        raise UsageError(f"{got} given: name the checkpoints by one of them")
    with progress_bar("reading cases", 100) as update:  # per cent
        result = ranking.rank(
            zoo or checkpoints or [],
            dataset,
            configuration=configuration,
            plans=plans,
            fold=fold,
            metrics=split_names(metrics),
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
            on_progress=lambda doing, share: update(completed=100 * share, description=doing),
            on_candidate=_report,
        )
    output.mkdir(parents=True, exist_ok=True)
    paths = write_ranking(result, output)
    if as_json:
        typer.echo(paths[0].read_text(encoding="utf-8"), nl=False)
    else:
        _show(result, *paths[2:])
    if result.failures:
        raise typer.Exit(1 if result.rows else 2)


def _report(result: CandidateScores) -> None:
    took = f"{result.seconds:.1f} s" if result.seconds else "kept from an earlier run"
    say(f"{result.name} could not be scored: {result.error}" if result.error else f"{result.name}: {took}")


def _show(ranking: Ranking, page: Path, study: Path | None = None) -> None:
    from stunet.reports.figures import short_names

    columns: dict[str, list[Text]] = {}
    for metric in ranking.metrics:
        scores, best = [row.scores.get(metric) for row in ranking.rows], ranking.preferred.get(metric)
        bold = ["bold" if row is best else "" for row in ranking.rows]
        head = metric.replace("transrate", "trans-\nrate").replace("zero-shot", "zero-\nshot")
        columns[head] = [Text("-" if s is None else f"{s:.2f}", b) for s, b in zip(scores, bold, strict=True)]
    if mean_ranks := ranking.mean_ranks:
        bold = ["bold" if row is ranking.consensus else "" for row in ranking.rows]
        columns["mean\nrank"] = [Text(f"{rank:.1f}", b) for rank, b in zip(mean_ranks, bold, strict=True)]
    if "ccfv" in ranking.metrics:
        intervals = [row.interval for row in ranking.rows]
        columns["ccfv, 95 %\nof resamples"] = [Text("{:.2f} to {:.2f}".format(*i) if i else "") for i in intervals]
    widths = [max(map(len, [*head.split("\n"), *map(str, cells)])) for head, cells in columns.items()]
    full = [row.name for row in ranking.rows]
    names = short_names(full, max(12, stdout.width - sum(widths) - len(widths) - 6))
    rows = [(n, *row) for n, row in enumerate(zip(names, *columns.values(), strict=True), start=1)]
    title = f"Best first by {ranking.metric}"
    print_table(rows, "", "candidate", *columns, title=title, numbers=["", *columns], padding=0)
    for place, (name, whole) in enumerate(zip(names, full, strict=True), start=1):
        if name != whole:
            print_line(f"{place}: {whole}")
    stdout.print(f"\n{ranking.verdict}")
    for warning in ranking.warnings:
        print_line(f"warning: {warning}")
    print_line(f"Report: {page}")
    for number, command in enumerate(ranking.commands):
        print_line("or:" if number else "Next:")
        print_line(f"$ {command}", style="bold")
    if study is not None:
        print_line("Or measure what the first few are worth, by fine-tuning them:")
        line = shlex.join(["stunet", "study", "plan", str(study), "-o", str(study.with_suffix(""))])
        print_line(f"$ {line}", style="bold")


def rank_eval(
    scores: Annotated[Path, typer.Argument(help="ranking.json of stunet rank, or JSON of scores by name.")],
    dice: Annotated[Path | None, typer.Argument(help="JSON of Dice by name, or a folder, see above.")] = None,
    summary: Annotated[list[str] | None, Option(help="NAME=PATH of a summary.json or its folder; repeatable.")] = None,
    metric: Annotated[list[str] | None, Option(help="Metrics of ranking.json; all by default.")] = None,
    resamples: Annotated[int, Option(help="Bootstrap resamples of the checkpoints.", min=1)] = 2000,
    seed: Annotated[int, Option(help="Seed of the resamples.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Compare scores with Dice: weighted Kendall tau, Pearson, Spearman, and the Dice that trusting the score costs.

    Tau comes with scipy's weights, and with weights of pairs by their true ranks (arXiv 2602.23916).

    In brackets: 95% percentile intervals over resamples of the checkpoints. A folder of Dice has a folder for each name
    of a checkpoint, in which one summary.json of nnU-Net lies at any depth.
    """
    from stunet.ranking.agreement import agreement, read_dice, read_scores, read_summaries

    by_metric = read_scores(scores)
    paths = dict(text.partition("=")[::2] for text in summary or ())
    if len(paths) < len(summary or ()) or not all(name and path for name, path in paths.items()):
        raise UsageError(f"--summary {' '.join(summary or ())} is not NAME=PATH with each name once")
    if dice is None and not paths:
        raise UsageError("neither DICE nor --summary given: name a JSON file, a folder, or NAME=PATH of summary.json")
    truth = {} if dice is None else read_dice(dice)
    if twice := sorted(set(truth) & set(paths)):
        raise UsageError(f"two values of one Dice for {', '.join(twice)}: name each in DICE or in --summary")
    truth |= read_summaries(paths)
    if unknown := [name for name in metric or () if name not in by_metric]:
        raise UsageError(f"unknown metric {', '.join(unknown)}: {scores} has {', '.join(by_metric)}")
    useless = {name: _useless(row) for name, row in by_metric.items()}
    complete = [name for name, why in useless.items() if not why]
    missing = [f"{name}: {useless[name]}" for name in metric or by_metric if useless[name]]
    if missing and (metric or not complete):
        raise UsageError(f"{'; '.join(missing)}: choose other metrics, or leave these out of both files")
    for line in missing:
        say(line.replace(":", " is left out:", 1))
    results = {name: agreement(by_metric[name], truth, n_resamples=resamples, seed=seed) for name in metric or complete}
    if as_json:
        print_json({"metrics": {name: result.as_dict() for name, result in results.items()}})
        return
    first = next(iter(results.values()))
    degenerate = max(estimate.degenerate for result in results.values() for estimate in result.estimates.values())
    caption = f"{resamples} resamples of the checkpoints"
    caption += f"; up to {degenerate} without a value are left out" if degenerate else ""
    numbers = ("weighted Kendall", "by pairs", "Pearson", "Spearman", "regret")
    title = f"{first.n_checkpoints} checkpoints, best Dice: {first.best}"
    rows = []
    for name, result in results.items():
        rows.append([name, *(f"{e.value:.3f}\n[{e.low:.3f}, {e.high:.3f}]" for e in result.estimates.values())])
    print_table(rows, "metric", *numbers, title=title, caption=caption, numbers=numbers)
    for top in dict.fromkeys(result.top for result in results.values()):
        names = ", ".join(name for name, result in results.items() if result.top == top)
        print_line(f"First choice of {names}: {top}")


def _useless(scores: Mapping[str, float]) -> str:
    """Say why scores order nothing, or nothing."""
    without = [name for name, value in scores.items() if math.isnan(value)]
    alike = "the same score for all" if len({*scores.values()}) == 1 else ""
    return f"no score for {', '.join(without)}" if without else alike
