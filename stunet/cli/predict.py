"""``stunet predict``: nnU-Net's predictions, for many structures and in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stunet.cli.options import Device, choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["predict"]


def predict(
    images: Annotated[Path, typer.Option("-i", "--input", help="Folder with images CASE_0000.nii.gz, …")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the predictions.")],
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Model folder; or -d, -tr, -p and -c.")] = None,
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset id or name.")] = None,
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="Trainer of the model.")] = "nnUNetTrainer",
    plans: Annotated[str, typer.Option("-p", "--plans", help="Plans of the model.")] = "nnUNetPlans",
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="Configuration.")] = "3d_fullres",
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--folds", help="Folds to average; those that are there. Takes several.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("-chk", "--checkpoint", help="File name.")] = "checkpoint_final.pth",
    step_size: Annotated[
        float, typer.Option("-step_size", "--step-size", help="Distance of windows, as a fraction of the patch.")
    ] = 0.5,
    disable_tta: Annotated[
        bool, typer.Option("--disable_tta", "--disable-tta", help="No mirroring, even where the model allows it.")
    ] = False,
    structures: Annotated[
        str | None, typer.Option(help="Keep these alone, liver,spleen for example; labels are as in the full result.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What all processes may take together, for example 8GB.")] = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Also one mask for each structure, CASE/segmentations/NAME.nii.gz.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Also volume and mean intensity of each structure.")
    ] = False,
    names_in_header: Annotated[
        bool, typer.Option("--names-in-header", help="Also write the names into the NIfTI header.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also a picture of each case.")] = False,
    continue_prediction: Annotated[
        bool, typer.Option("--c", "--continue", "--continue_prediction", help="Keep cases that are predicted already.")
    ] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save_probabilities", "--save-probabilities", help="nnU-Net's .npz, by its own predictor.")
    ] = False,
    previous_stage: Annotated[
        Path | None, typer.Option("-prev_stage_predictions", help="Of a cascade's first stage.")
    ] = None,
    n_preparing: Annotated[int, typer.Option("-npp", help="Processes that read and preprocess.", min=0)] = 1,
    n_writing: Annotated[int, typer.Option("-nps", help="Processes that write.", min=0)] = 1,
    n_parts: Annotated[int, typer.Option("-num_parts", help="Commands that share the cases.", min=1)] = 1,
    part_id: Annotated[int, typer.Option("-part_id", help="Which of them this is, from 0.", min=0)] = 0,
    device: Device = "auto",
    not_on_device: Annotated[
        bool, typer.Option("--not_on_device", help="Add up logits in the machine's memory, not the device's.")
    ] = False,
    trust: Annotated[
        list[str] | None, typer.Option("--trust", help="A network class of others' that may be imported. Repeatable.")
    ] = None,
    disable_progress_bar: Annotated[
        bool, typer.Option("--disable_progress_bar", "--disable-progress-bar", help="For logs.")
    ] = False,
) -> None:
    """Predict as nnUNetv2_predict does, with the same labels, in memory that hardly grows with classes or image.

    Logits exist only for as many planes as the sliding window is thick. The options are nnUNetv2_predict's where it has
    them. Models with regions, cascades and --save_probabilities go to nnU-Net's own predictor.
    """
    from stunet.cli.prediction_progress import PredictionProgress
    from stunet.inference import FolderRequest, OutputOptions, parse_memory, predict_folder

    budget = None if memory is None else parse_memory(memory)
    request = FolderRequest(
        images=images,
        output=output,
        model=_model_folder(model, dataset, trainer, plans, configuration),
        folds=folds,
        checkpoint_name=checkpoint,
        step_size=step_size,
        mirroring=not disable_tta,
        device=_device(device),
        results_on_device=not not_on_device,
        structures=None if structures is None else [name.strip() for name in structures.split(",") if name.strip()],
        budget=budget,
        options=OutputOptions(masks=masks, statistics=statistics, names_in_header=names_in_header, preview=preview),
        continue_prediction=continue_prediction,
        n_preparing=n_preparing,
        n_writing=n_writing,
        part_id=part_id,
        n_parts=n_parts,
        save_probabilities=save_probabilities,
        previous_stage=previous_stage,
        trust=trust or [],
    )
    with PredictionProgress(bar=not disable_progress_bar) as progress:
        predict_folder(request, progress)


def _model_folder(model: Path | None, dataset: str | None, trainer: str, plans: str, configuration: str) -> Path:
    from stunet.errors import UsageError
    from stunet.planning import find_dataset, nnunet_folder

    if (model is None) == (dataset is None):
        raise UsageError(
            "no model" if model is None else "two models",
            got="neither -m nor -d" if model is None else f"-m {model} and -d {dataset}",
            expected="-m MODEL_FOLDER, or -d with -tr, -p and -c",
            remedy="Give one of them.",
        )
    if model is not None:
        return model
    assert dataset is not None
    return nnunet_folder("nnUNet_results") / find_dataset(dataset) / f"{trainer}__{plans}__{configuration}"


def _device(name: str) -> torch.device:
    import torch

    chosen = choose_device(name)
    if chosen == "cuda":
        torch.backends.cudnn.benchmark = True  # windows are all of one size
    return torch.device(chosen)
