"""``stunet evaluate``: a model's segmentations, scored on the labels of another dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stunet.cli.console import PlainTable, print_error, stderr, stdout
from stunet.cli.options import Device, choose_device, complete_label_systems
from stunet.errors import DatasetError, UsageError
from stunet.files import atomic_path, refuse_existing, write_json

if TYPE_CHECKING:
    from stunet.datasets import RawDataset
    from stunet.evaluation import EvaluationResults
    from stunet.evaluation.evaluate import ModelDescription
    from stunet.labels import LabelRelation


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
    from rich.progress import Progress

    from stunet.evaluation import score_cases
    from stunet.evaluation.evaluate import check_predictions, choose_cases, compare_labels, read_description

    place = model or predictions
    if place is None:
        raise UsageError("neither -m nor --predictions is given: give a model folder, or a folder of segmentations")
    described = read_description(place, "-m" if model else "--predictions")
    names = None if cases is None else [name.strip() for name in cases.split(",") if name.strip()]
    target = choose_cases(dataset, split, fold, names, predictions if chill else None)
    if suggest_map:
        _suggest(described, target, output)
        return
    folder = output or Path(f"evaluation_{target.folder.name}")
    given = predictions or folder / "predictions"
    relation, jobs = compare_labels(described, target, label_map, given, tolerance=tolerance)
    refuse_existing(folder)
    # All that can be wrong before hours of prediction.
    if predictions is None:
        _check_agreement(described, target)
    else:
        check_predictions(jobs, predictions)
    _print_relation(relation, described, target, error=as_json)
    if split == "train" and described.plans.get("dataset_name") == target.folder.name:
        _warn_of_training_cases(described.path, fold, folds, predicted=predictions is None)
    if predictions is None:
        from stunet.cli.predict import show_progress
        from stunet.inference import Case, load_model, predict_folder

        images = [Case(case, tuple(files)) for case, (files, _) in target.cases.items()]
        trained = load_model(place, folds, trust=trust or [])
        with show_progress(bar=stderr.is_terminal, notes=stderr) as progress:
            mirroring, chosen = not disable_tta, choose_device(device)
            predict_folder(trained, images, given, device=chosen, mirroring=mirroring, **progress)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bars:
        bar = bars.add_task("Scoring", total=len(jobs))
        results = score_cases(jobs, num_processes=num_processes, on_case=lambda: bars.advance(bar))
    if results.cases:
        _report(results, tolerance, folder, relation, described, target, as_json=as_json)
    for case, error in results.failed.items():
        _print(f"case {case}:", error=True)
        print_error(error)
    if results.failed:
        _print(f"{len(results.failed)} cases could not be scored; the results are without them.", error=True)
        raise typer.Exit(2)


def _suggest(model: ModelDescription, target: RawDataset, output: Path | None) -> None:
    from stunet.labels import structure_values, suggest_label_map

    names = (list(structure_values(of.dataset_json["labels"])) for of in (model, target))
    text = suggest_label_map(*names)
    if output is None:
        typer.echo(text, nl=False)
        return
    refuse_existing(output)
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    _print(f"Wrote {output}. Next: stunet evaluate … --label-map {output}")


def _check_agreement(model: ModelDescription, target: RawDataset) -> None:
    """Check that the model takes images such as the dataset has."""
    of = [
        (len(names), f"{len(names)} ({', '.join(map(str, names.values()))})", content.get("file_ending"))
        for content in (target.dataset_json, model.dataset_json)
        for names in [content.get("channel_names", {})]
    ]
    (n, channels, ending), (n_taken, taken, ending_taken) = of
    if n != n_taken:
        raise DatasetError(f"{target.folder} has other channels, {channels}, than {taken}, as {model.path} has")
    if ending != ending_taken:
        raise DatasetError(f"{target.folder} has {ending} files: convert them to {ending_taken}, as {model.path} has")


def _print_relation(relation: LabelRelation, model: ModelDescription, target: RawDataset, *, error: bool) -> None:
    n = len(relation.comparisons)
    _print(f"{n} structures are compared on {len(target.cases)} cases of {target.folder.name}.", error=error)
    for c in relation.comparisons:
        if c.source != (c.name,):
            _print(f"  {c.name}: {' + '.join(c.source)}", error=error)
    configurations = list(model.plans.get("configurations", {}).values())
    if len(configurations) == 1 and "spacing" in configurations[0]:
        spacing = " x ".join(f"{side:g}" for side in configurations[0]["spacing"])
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
    results: EvaluationResults, tolerance: float, folder: Path, relation: LabelRelation, model: ModelDescription,
    target: RawDataset, *, as_json: bool,
) -> None:  # fmt: skip
    from stunet.reports import draw_scores

    folder.mkdir(parents=True, exist_ok=True)
    summary = results.summary(
        model=str(model.path),
        dataset=target.folder.name,
        tolerance_mm=tolerance,
        left_out=dict(relation.left_out),
        failed={case: str(error) for case, error in results.failed.items()},
    )
    write_json(summary, folder / "summary.json")
    results.write_csv(folder / "scores.csv")
    draw_scores(results, folder / "scores.png", title=f"{model.path.name} on {target.folder.name}")
    if as_json:
        del summary["metric_per_case"]
        typer.echo(json.dumps({"output": str(folder), "cases": len(results.cases), **summary}, indent=4))
    else:
        stdout.print(_table(results, tolerance))
        written = [name for name in ("summary.json", "scores.csv", "scores.png") if (folder / name).is_file()]
        _print(f"Wrote {folder}: {', '.join(written)}")
    for warning in results.warnings:
        _print(f"warning: {warning}", error=True)


def _table(results: EvaluationResults, tolerance: float) -> PlainTable:
    states = ("missed", "spurious", "absent", "not_annotated")
    shown = [state for state in states if any(structure.counts[state] for structure in results.structures)]
    numbers = ("Dice", "NSD", "HD95", "cases", *(state.replace("_", " ") for state in shown))
    title = f"Means over {len(results.cases)} cases"
    caption = f"NSD: surface Dice at {tolerance:g} mm. HD95: in mm, where finite."
    table = PlainTable("structure", *numbers, title=title, caption=caption, numbers=numbers)
    for structure in results.structures:
        counts = [structure.counts["scored"] + structure.infinite, *(structure.counts[state] or "" for state in shown)]
        table.add_row(structure.comparison.name, *_numbers(structure.mean), *map(str, counts))
    table.add_section()
    table.add_row("mean", *_numbers(results.mean))
    return table


def _numbers(mean: Mapping[str, Any]) -> list[str]:
    formats = {"Dice": ".3f", "NSD": ".3f", "HD95": ".1f"}
    return ["" if mean[metric] is None else format(mean[metric], digits) for metric, digits in formats.items()]


def _print(line: str, *, error: bool = False) -> None:
    (stderr if error else stdout).print(line, soft_wrap=True, highlight=False)
