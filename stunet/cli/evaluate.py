"""``stunet evaluate``: a model's segmentations, scored on the labels of another dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from stunet.cli.console import case_bar, exit_with_failures, print_json, print_line, print_table, say, warn
from stunet.cli.options import Device, Json, Trust, choose_device, complete_label_systems, split_names
from stunet.cli.predict import window_bar
from stunet.errors import DatasetError, UsageError
from stunet.files import atomic_path, refuse_existing, write_json

if TYPE_CHECKING:
    from stunet.datasets.raw import RawDataset
    from stunet.evaluation import EvaluationResults, SegmentationModel
    from stunet.labels.mappings import LabelRelation

_MODEL_HELP = "Model folder; with --predictions a dataset.json will do, or nothing."
_MAP_HELP = "YAML file, or the name of a published label system, such as btcv."


def evaluate(
    dataset: Annotated[str, Option("-d", "--dataset", help="Dataset to score on: id, name, or path of a raw dataset.")],
    model: Annotated[Path | None, Option("-m", "--model", help=_MODEL_HELP)] = None,
    output: Annotated[Path | None, Option("-o", "--output", help="Folder; evaluation_DATASET by default.")] = None,
    label_map: Annotated[str | None, Option(help=_MAP_HELP, autocompletion=complete_label_systems)] = None,
    suggest_map: Annotated[bool, Option(help="Print a label map to edit, or write it to -o, and leave.")] = False,
    predictions: Annotated[Path | None, Option(help="Score the segmentations here, and predict nothing.")] = None,
    cases: Annotated[str | None, Option(help="Only these cases, names with commas between.")] = None,
    chill: Annotated[bool, Option(help="With --predictions: only cases that have one, as nnU-Net names it.")] = False,
    split: Annotated[Literal["train", "test"], Option(help="imagesTr or imagesTs.")] = "train",
    fold: Annotated[int | None, Option(help="Only the cases that this fold of splits_final.json validates on.")] = None,
    folds: Annotated[list[str] | None, Option(help="Folds of the model to average; all by default.")] = None,
    device: Device = "auto",
    disable_tta: Annotated[bool, Option(help="Do not mirror images in prediction: faster, less exact.")] = False,
    tolerance: Annotated[float, Option(help="Of the surface Dice, in mm; by default TotalSegmentator's.")] = 3.0,
    trust: Trust = None,
    as_json: Json = False,
    num_processes: Annotated[int, Option("-np", help="Cases to score at a time.", min=1)] = 4,
) -> None:
    """Predict a dataset with a model that was trained on other labels, and score it on the dataset's own.

    Structures with the same meaning are compared; a label map says what else stands for what. Dice, normalised surface
    Dice and the 95th percentile Hausdorff distance go into summary.json (nnU-Net's form), scores.csv and scores.png.
    What a case does not annotate (annotated_labels.json) is not scored, and the ignore label counts for nothing.

    Exit status: 0; 2 where the command cannot be carried out, or where a case could not be scored (the results are
    those of the other cases).
    """
    from stunet.evaluation import check_predictions, choose_cases, compare_labels, read_description, score_cases

    place = model or predictions
    if place is None:
        raise UsageError("neither -m nor --predictions is given: give a model folder, or a folder of segmentations")
    described = read_description(place, "-m" if model else "--predictions")
    names = None if cases is None else split_names(cases)
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
    _print_relation(relation, described, target, say if as_json else print_line)
    if split == "train" and described.plans.get("dataset_name") == target.folder.name:
        _warn_of_training_cases(described.path, fold, folds, predicted=predictions is None)
    if predictions is None:
        from stunet.inference import Case, load_model, predict_folder

        images = [Case(case, tuple(files)) for case, (files, _) in target.cases.items()]
        trained = load_model(place, folds, trust=trust or [])
        with window_bar() as on_window:
            predict_folder(
                trained,
                images,
                given,
                device=choose_device(device),
                mirroring=not disable_tta,
                say=say,
                warn=warn,
                on_window=on_window,
            )
    with case_bar("Scoring", len(jobs)) as on_case:
        results = score_cases(jobs, num_processes=num_processes, on_case=on_case)
    if results.cases:
        from stunet.reports.figures import draw_scores

        folder.mkdir(parents=True, exist_ok=True)
        summary = results.summary(
            model=str(described.path),
            dataset=target.folder.name,
            tolerance_mm=tolerance,
            left_out=dict(relation.left_out),
            failed={case: str(error) for case, error in results.failed.items()},
        )
        write_json(summary, folder / "summary.json")
        results.write_csv(folder / "scores.csv")
        draw_scores(results, folder / "scores.png", title=f"{described.path.name} on {target.folder.name}")
        if as_json:
            del summary["metric_per_case"]
            print_json({"output": str(folder), "cases": len(results.cases), **summary})
        else:
            _print_scores(results, tolerance)
            written = [name for name in ("summary.json", "scores.csv", "scores.png") if (folder / name).is_file()]
            print_line(f"Wrote {folder}: {', '.join(written)}")
        for warning in results.warnings:
            say(f"warning: {warning}")
    exit_with_failures(results.failed, "could not be scored; the results are without them.")


def _suggest(model: SegmentationModel, target: RawDataset, output: Path | None) -> None:
    from stunet.labels.labels import Labels
    from stunet.labels.mappings import suggest_label_map

    names = (list(Labels(of.dataset_json).structures) for of in (model, target))
    text = suggest_label_map(*names)
    if output is None:
        typer.echo(text, nl=False)
        return
    refuse_existing(output)
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print_line(f"Wrote {output}. Next: stunet evaluate … --label-map {output}")


def _check_agreement(model: SegmentationModel, target: RawDataset) -> None:
    """Check that the model takes images such as the dataset has."""
    own, taken = ([*map(str, of.dataset_json.get("channel_names", {}).values())] for of in (target, model))
    if len(own) != len(taken):
        got, others = (f"{len(names)} ({', '.join(names)})" for names in (own, taken))
        raise DatasetError(f"{target.folder} has other channels, {got}, than {others}, as {model.path} has")
    ending, wanted = (of.dataset_json.get("file_ending") for of in (target, model))
    if ending != wanted:
        raise DatasetError(f"{target.folder} has {ending} files: convert them to {wanted}, as {model.path} has")


def _print_relation(
    relation: LabelRelation, model: SegmentationModel, target: RawDataset, show: Callable[[str], None]
) -> None:
    n = len(relation.comparisons)
    show(f"{n} structures are compared on {len(target.cases)} cases of {target.folder.name}.")
    for c in relation.comparisons:
        if c.source != (c.name,):
            show(f"  {c.name}: {' + '.join(c.source)}")
    configurations = list(model.plans.get("configurations", {}).values())
    if len(configurations) == 1 and "spacing" in configurations[0]:
        spacing = " x ".join(f"{side:g}" for side in configurations[0]["spacing"])
        show(f"The model works at {spacing} mm; scores are those on the dataset's own grids.")
    for reason in dict.fromkeys(relation.left_out.values()):
        left = [name for name, why in relation.left_out.items() if why == reason]
        show(f"Not compared, {reason}: {', '.join(left)}")
    for name, structure in relation.doubtful:
        say(f"warning: {name} is taken for {structure}, by its label value")


def _warn_of_training_cases(model: Path, fold: int | None, folds: Sequence[str] | None, *, predicted: bool) -> None:
    """Say that a model has seen cases in training; only those of its own fold were kept from it."""
    if fold is None:
        say("warning: the model was trained on this dataset; see --split and --fold for other cases.")
        return
    averaged = folds or [path.name.removeprefix("fold_") for path in sorted(model.glob("fold_*"))]
    if predicted and (others := [name for name in averaged if name != str(fold)]):
        say(f"warning: fold {', '.join(others)} of the model was trained on these cases; give --folds {fold}.")


def _print_scores(results: EvaluationResults, tolerance: float) -> None:
    states = ("missed", "spurious", "absent", "not_annotated")
    shown = [state for state in states if any(structure.counts[state] for structure in results.structures)]
    metrics = {"Dice": ".3f", "NSD": ".3f", "HD95": ".1f"}

    def means(of: Mapping[str, Any]) -> list[str]:
        return ["" if of[metric] is None else format(of[metric], digits) for metric, digits in metrics.items()]

    rows: list[Sequence[object]] = []
    for each in results.structures:
        counts = [each.counts["scored"] + each.infinite, *(each.counts[state] or "" for state in shown)]
        rows.append([each.comparison.name, *means(each.mean), *counts])
    rows += [], ["mean", *means(results.mean), *[""] * (1 + len(shown))]
    numbers = (*metrics, "cases", *(state.replace("_", " ") for state in shown))
    title = f"Means over {len(results.cases)} cases"
    caption = f"NSD: surface Dice at {tolerance:g} mm. HD95: in mm, where finite."
    print_table(rows, "structure", *numbers, title=title, caption=caption, numbers=numbers)
