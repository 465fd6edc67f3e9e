"""``stunet rank-eval``: how well transferability scores predict the Dice after fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def rank_eval(
    scores: Annotated[Path, typer.Argument(help="ranking.json of stunet rank, or JSON of scores by name.")],
    dice: Annotated[
        Path | None, typer.Argument(help="JSON of Dice by name, or a folder of folders NAME, each with a summary.json.")
    ] = None,
    summary: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of nnU-Net's summary.json, or of a folder that holds one; repeatable."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metrics of ranking.json; all by default.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the checkpoints.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare scores with Dice: weighted Kendall tau, Pearson, Spearman, and the Dice that trusting the score costs.

    In brackets: 95% percentile intervals over resamples of the checkpoints.
    """
    from stunet.cli.console import PlainTable, stderr, stdout
    from stunet.errors import UsageError
    from stunet.ranking import agreement, read_dice, read_scores, read_summaries

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
    lacking = {name: [c for c, value in row.items() if math.isnan(value)] for name, row in by_metric.items()}
    complete = [name for name, without in lacking.items() if not without]
    missing = [f"{name}: no score for {', '.join(lacking[name])}" for name in metric or by_metric if lacking[name]]
    if missing and (metric or not complete):
        raise UsageError(f"{'; '.join(missing)}: choose other metrics, or leave these out of both files")
    for line in missing:
        stderr.print(line.replace(":", " is left out:", 1), highlight=False, soft_wrap=True)
    results = {name: agreement(by_metric[name], truth, n_resamples=resamples, seed=seed) for name in metric or complete}
    if as_json:
        typer.echo(json.dumps({"metrics": {name: result.as_dict() for name, result in results.items()}}, indent=4))
        return
    first = next(iter(results.values()))
    degenerate = max(estimate.degenerate for result in results.values() for estimate in result.estimates.values())
    caption = f"{resamples} resamples of the checkpoints"
    caption += f"; up to {degenerate} without a value are left out" if degenerate else ""
    numbers = ("weighted Kendall", "Pearson", "Spearman", "regret")
    title = f"{first.n_checkpoints} checkpoints, best Dice: {first.best}"
    table = PlainTable("metric", *numbers, title=title, caption=caption, numbers=numbers)
    for name, result in results.items():
        table.add_row(name, *(f"{e.value:.3f}\n[{e.low:.3f}, {e.high:.3f}]" for e in result.estimates.values()))
    stdout.print(table)
    for top in dict.fromkeys(result.top for result in results.values()):
        names = ", ".join(name for name, result in results.items() if result.top == top)
        stdout.print(f"First choice of {names}: {top}", highlight=False, markup=False, soft_wrap=True)
