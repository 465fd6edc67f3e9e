"""``stunet evaluate``: a model's segmentations, scored on the labels of another dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stunet.cli.options import Device, complete_label_systems

if TYPE_CHECKING:
    from stunet.cli.evaluate_steps import ModelNames
    from stunet.datasets import RawDataset
    from stunet.errors import STUNetError
    from stunet.evaluation import CaseScores, EvaluationCase, EvaluationResults
    from stunet.labels import LabelRelation

__all__ = ["evaluate"]


def evaluate(
    dataset: Annotated[
        str, typer.Option("-d", "--dataset", help="Dataset to score on: id, name, or path of a raw dataset.")
    ],
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="Model folder; with --predictions a dataset.json will do, or nothing."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the results; evaluation_DATASET by default.")
    ] = None,
    label_map: Annotated[
        str | None,
        typer.Option(
            "--label-map",
            help="YAML file, or the name of a published label system, such as btcv.",
            autocompletion=complete_label_systems,
        ),
    ] = None,
    suggest_map: Annotated[
        bool, typer.Option("--suggest-map", help="Print a label map to edit, or write it to -o, and leave.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Score the segmentations in this folder, and predict nothing.")
    ] = None,
    cases: Annotated[str | None, typer.Option("--cases", help="Only these cases, names with commas between.")] = None,
    chill: Annotated[
        bool, typer.Option("--chill", help="With --predictions: only the cases that have one, as nnU-Net names it.")
    ] = False,
    split: Annotated[Literal["train", "test"], typer.Option(help="imagesTr or imagesTs.")] = "train",
    fold: Annotated[
        int | None, typer.Option(help="Only the validation cases of this fold of the dataset's splits_final.json.")
    ] = None,
    folds: Annotated[
        list[str] | None, typer.Option("--folds", help="Folds of the model to average; all by default. Takes several.")
    ] = None,
    device: Device = "auto",
    disable_tta: Annotated[
        bool, typer.Option("--disable-tta", help="Do not mirror images in prediction: faster, a little less exact.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Tolerance of the normalised surface Dice, in mm; TotalSegmentator's 3 by default.")
    ] = 3.0,
    trust: Annotated[
        list[str] | None, typer.Option("--trust", help="A network class of others' that may be imported. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    num_processes: Annotated[int, typer.Option("-np", help="Cases to score at a time.", min=1)] = 4,
) -> None:
    """Predict a dataset with a model that was trained on other labels, and score it on the dataset's own.

    Structures with the same meaning are compared; a label map says what else stands for what. Dice, normalised surface
    Dice and the 95th percentile Hausdorff distance go into summary.json (nnU-Net's form), scores.csv and scores.png.
    What a case does not annotate (annotated_labels.json) is not scored, and the ignore label counts for nothing.

    Exit status: 0; 2 where the command cannot be carried out, or where a case could not be scored (the results are
    those of the other cases).
    """
    from stunet.cli.evaluate_steps import (
        check_agreement,
        check_predictions,
        choose_cases,
        choose_label_map,
        find_target,
        make_jobs,
        read_model_names,
    )
    from stunet.files import refuse_existing
    from stunet.labels import relate_labels

    names = read_model_names(model, predictions)
    target = choose_cases(find_target(dataset, split, fold), cases, predictions if chill else None)
    if suggest_map:
        _suggest(names, target, output)
        return
    relation = relate_labels(names.labels, target.dataset_json["labels"], choose_label_map(label_map))
    _check_tolerance(tolerance)
    folder = output or Path(f"evaluation_{target.folder.name}")
    refuse_existing(folder)
    # All that can be wrong before hours of prediction.
    jobs = make_jobs(target, relation, names, predictions or folder / "predictions", tolerance=tolerance)
    if predictions is None:
        check_agreement(names, target)
    else:
        check_predictions(jobs, predictions)
    _print_relation(relation, names, target, error=as_json)
    if split == "train" and names.plans.get("dataset_name") == target.folder.name:
        _warn_of_training_cases(names.path, fold, folds, predicted=predictions is None)
    if predictions is None:
        _predict(names, target, folder / "predictions", folds=folds, device=device, mirroring=not disable_tta,
                 trust=trust or [])  # fmt: skip
    scores, failed = _score(jobs, num_processes)
    if scores:
        _report(scores, jobs, failed, folder, relation, names, target, as_json=as_json)
    _print_failures(failed)
    if failed:
        raise typer.Exit(2)


def _suggest(names: ModelNames, target: RawDataset, output: Path | None) -> None:
    from stunet.files import atomic_path, refuse_existing
    from stunet.labels import structure_values, suggest_label_map

    text = suggest_label_map(
        list(structure_values(names.labels)), list(structure_values(target.dataset_json["labels"]))
    )
    if output is None:
        typer.echo(text, nl=False)
        return
    refuse_existing(output)
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    _print(f"Wrote {output}. Next: stunet evaluate … --label-map {output}")


def _check_tolerance(tolerance: float) -> None:
    from stunet.errors import UsageError

    if not 0 <= tolerance < float("inf"):
        raise UsageError(
            "an impossible tolerance", got=f"{tolerance:g} mm", expected="0 mm or more", remedy="Correct --tolerance."
        )


def _predict(
    names: ModelNames,
    target: RawDataset,
    output: Path,
    *,
    folds: Sequence[str] | None,
    device: str,
    mirroring: bool,
    trust: Sequence[str],
) -> None:
    from stunet.cli.options import choose_device
    from stunet.cli.predict_step import predict_cases_of

    cases = {case: images for case, (images, _) in target.cases.items()}
    chosen = choose_device(device)
    predict_cases_of(names.path, cases, output, folds=folds, device=chosen, mirroring=mirroring, trust=trust)


def _score(jobs: Sequence[EvaluationCase], num_processes: int) -> tuple[dict[str, CaseScores], dict[str, STUNetError]]:
    from rich.progress import Progress

    from stunet.cli.console import stderr
    from stunet.cli.evaluate_steps import score_cases

    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        bar = progress.add_task("Scoring", total=len(jobs))
        return score_cases(jobs, num_processes=num_processes, on_case=lambda: progress.advance(bar))


def _print_relation(relation: LabelRelation, names: ModelNames, target: RawDataset, *, error: bool) -> None:
    n = len(relation.comparisons)
    _print(f"{n} structures are compared on {len(target.cases)} cases of {target.folder.name}.", error=error)
    for c in relation.comparisons:
        if c.source != (c.name,):
            _print(f"  {c.name}: {' + '.join(c.source)}", error=error)
    for configuration in names.plans.get("configurations", {}).values():
        if "spacing" in configuration and len(names.plans["configurations"]) == 1:
            spacing = " x ".join(f"{side:g}" for side in configuration["spacing"])
            _print(f"The model works at {spacing} mm; scores are those on the dataset's own grids.", error=error)
    for reason in dict.fromkeys(relation.left_out.values()):
        left = [name for name, why in relation.left_out.items() if why == reason]
        _print(f"Not compared, {reason}: {', '.join(left)}", error=error)
    for name, structure in relation.doubtful:
        _print(f"warning: {name} is taken for {structure}, by its label value", error=True)


def _warn_of_training_cases(model: Path, fold: int | None, folds: Sequence[str] | None, *, predicted: bool) -> None:
    """Say that a model has seen cases in training; only those of its own fold were kept from it."""
    if fold is None:
        _print("warning: the model was trained on this dataset; see --split and --fold for other cases.", error=True)
        return
    averaged = folds or [path.name.removeprefix("fold_") for path in sorted(model.glob("fold_*"))]
    if predicted and (others := [name for name in averaged if name != str(fold)]):
        line = f"warning: fold {', '.join(others)} of the model was trained on these cases; give --folds {fold}."
        _print(line, error=True)


def _report(
    scores: Mapping[str, CaseScores],
    jobs: Sequence[EvaluationCase],
    failed: Mapping[str, STUNetError],
    folder: Path,
    relation: LabelRelation,
    names: ModelNames,
    target: RawDataset,
    *,
    as_json: bool,
) -> None:
    from stunet.evaluation import collect_results
    from stunet.files import write_json
    from stunet.reports import draw_scores

    results = collect_results(scores, jobs)
    folder.mkdir(parents=True, exist_ok=True)
    summary = results.summary(
        model=str(names.path),
        dataset=target.folder.name,
        tolerance_mm=jobs[0].tolerance,
        left_out=dict(relation.left_out),
        failed={case: str(error) for case, error in failed.items()},
    )
    write_json(summary, folder / "summary.json")
    results.write_csv(folder / "scores.csv")
    draw_scores(results, folder / "scores.png", title=f"{names.path.name} on {target.folder.name}")
    if as_json:
        del summary["metric_per_case"]
        typer.echo(json.dumps({"output": str(folder), "cases": len(scores), **summary}, indent=4))
    else:
        _print_table(results, jobs[0].tolerance)
        written = [name for name in ("summary.json", "scores.csv", "scores.png") if (folder / name).is_file()]
        _print(f"Wrote {folder}: {', '.join(written)}")
    for warning in results.warnings:
        _print(f"warning: {warning}", error=True)


def _print_table(results: EvaluationResults, tolerance: float) -> None:
    from stunet.cli.console import PlainTable, stdout

    counts = {
        name: [getattr(structure, name.replace(" ", "_")) for structure in results.structures]
        for name in ("missed", "spurious", "absent", "not annotated")
    }
    counts = {name: values for name, values in counts.items() if any(values)}
    numbers = ("Dice", "NSD", "HD95", "cases", *counts)
    table = PlainTable(
        "structure",
        *numbers,
        title=f"Means over {len(results.cases)} cases",
        caption=f"NSD: surface Dice at {tolerance:g} mm. HD95: in mm, where finite.",
        numbers=numbers,
    )
    for n, structure in enumerate(results.structures):
        n_cases = structure.scored + structure.infinite
        table.add_row(
            structure.comparison.name,
            *_numbers(structure.mean),
            str(n_cases),
            *(str(values[n] or "") for values in counts.values()),
        )
    table.add_section()
    table.add_row("mean", *_numbers(results.mean))
    stdout.print(table)


def _numbers(mean: Mapping[str, Any]) -> list[str]:
    formats = {"Dice": ".3f", "NSD": ".3f", "HD95": ".1f"}
    return ["" if mean[metric] is None else format(mean[metric], digits) for metric, digits in formats.items()]


def _print_failures(failed: Mapping[str, STUNetError]) -> None:
    from stunet.cli.console import print_error

    for case, error in failed.items():
        _print(f"case {case}:", error=True)
        print_error(error)
    if failed:
        _print(f"{len(failed)} cases could not be scored; the results are without them.", error=True)


def _print(line: str, *, error: bool = False) -> None:
    from stunet.cli.console import stderr, stdout

    (stderr if error else stdout).print(line, soft_wrap=True, highlight=False, markup=False)
