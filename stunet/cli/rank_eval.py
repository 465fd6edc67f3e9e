"""``stunet rank-eval``: how well transferability scores predict the Dice after fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stunet.ranking import Agreement, Estimate

__all__ = ["rank_eval"]


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
    from stunet.ranking import agreement, read_scores

    by_metric = read_scores(scores)
    truth = _gather_dice(dice, summary or [])
    chosen = _choose(metric or [], by_metric, scores)
    _check_complete({name: by_metric[name] for name in chosen})
    results = {name: agreement(by_metric[name], truth, n_resamples=resamples, seed=seed) for name in chosen}
    if as_json:
        typer.echo(json.dumps({"metrics": {name: result.as_dict() for name, result in results.items()}}, indent=4))
    else:
        _print_table(results)


def _gather_dice(dice: Path | None, summaries: list[str]) -> dict[str, float]:
    from stunet.errors import UsageError
    from stunet.ranking import read_dice, read_summaries

    paths: dict[str, str] = {}
    for text in summaries:
        name, separator, path = text.partition("=")
        if not (separator and name and path) or name in paths:
            raise UsageError(
                "a summary without a name of its own",
                got=text,
                expected="NAME=PATH, each name once",
                remedy="Correct --summary, for example --summary base=results/base/fold_0/validation/summary.json.",
            )
        paths[name] = path
    if dice is None and not paths:
        raise UsageError(
            "no Dice to compare with",
            got="neither DICE nor --summary",
            expected="a JSON file of Dice by name, a folder, or NAME=PATH of summary.json files",
            remedy="Give one of them.",
        )
    found = read_dice(dice) if dice is not None else {}
    twice = sorted(set(found) & set(paths))
    if twice:
        raise UsageError(
            "two values of one Dice",
            got=", ".join(twice),
            expected="each name in DICE or in --summary",
            remedy="Leave one of them out.",
        )
    return {**found, **read_summaries(paths)}


def _choose(wanted: list[str], metrics: Mapping[str, Mapping[str, float]], path: Path) -> list[str]:
    """The metrics asked for; by default all that have a score for every candidate."""
    from stunet.cli.console import stderr
    from stunet.errors import UsageError

    unknown = [name for name in wanted if name not in metrics]
    if unknown:
        raise UsageError(
            "unknown metric",
            got=", ".join(unknown),
            expected=f"one of {', '.join(metrics)}, which {path} has",
            remedy="Correct --metric.",
        )
    if wanted:
        return wanted
    lacking = {name: [c for c, value in scores.items() if math.isnan(value)] for name, scores in metrics.items()}
    whole = [name for name, without in lacking.items() if not without]
    if not whole:
        return list(metrics)  # which says what is missing
    for name, without in lacking.items():
        if without:
            stderr.print(f"{name} is left out: no score for {', '.join(without)}", highlight=False, soft_wrap=True)
    return whole


def _check_complete(by_metric: dict[str, dict[str, float]]) -> None:
    from stunet.errors import UsageError

    missing = {metric: [name for name, score in row.items() if math.isnan(score)] for metric, row in by_metric.items()}
    if any(missing.values()):
        raise UsageError(
            "candidates without a score",
            got="; ".join(f"{metric}: {', '.join(names)}" for metric, names in missing.items() if names),
            expected="a score of each candidate for each metric",
            remedy="Choose metrics that all have by --metric, or leave these candidates out of both files.",
        )


def _print_table(results: dict[str, Agreement]) -> None:
    from stunet.cli.console import PlainTable, stdout

    first = next(iter(results.values()))
    degenerate = {e.degenerate for result in results.values() for e in result.estimates.values()} - {0}
    caption = f"{first.n_resamples} resamples of the checkpoints"
    if degenerate:
        caption += f"; up to {max(degenerate)} without a value are left out"
    numbers = ("weighted Kendall", "Pearson", "Spearman", "regret")
    title = f"{first.n_checkpoints} checkpoints, best Dice: {first.best}"
    table = PlainTable("metric", *numbers, title=title, caption=caption, numbers=numbers)
    for name, result in results.items():
        table.add_row(name, *(_cell(estimate) for estimate in result.estimates.values()))
    stdout.print(table)
    for top in dict.fromkeys(result.top for result in results.values()):
        metrics = ", ".join(name for name, result in results.items() if result.top == top)
        stdout.print(f"First choice of {metrics}: {top}", highlight=False, markup=False, soft_wrap=True)


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f}\n[{estimate.low:.3f}, {estimate.high:.3f}]"
