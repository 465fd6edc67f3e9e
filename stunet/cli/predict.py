"""``stunet predict``: nnU-Net's predictions, for many structures and in bounded memory."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from stunet.cli.console import print_line, progress_bar, say, warn
from stunet.cli.options import Device, Trust, choose_device, split_names
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import UsageError
from stunet.weights.published import find_entry, load_registry

_model = partial(Option, rich_help_panel="Model")
_result = partial(Option, rich_help_panel="Result")
_resources = partial(Option, rich_help_panel="Speed and memory")
_MODEL_HELP = "Folder, or a published name."
_FIRST_STAGE_HELP = "For cascades: the first stage's results."
_PROBABILITIES_HELP = "Also nnU-Net's .npz, by its own predictor."
_CONTINUE = ("--continue", "--c", "--continue_prediction")


def _complete_model(incomplete: str) -> list[str]:
    parent, _, start = incomplete.rpartition(os.sep)
    folders = [path for path in Path(parent or ".").glob(f"{start}*") if path.is_dir()]
    return [name for name in load_registry() if name.startswith(incomplete)] + [f"{path}{os.sep}" for path in folders]


def predict(
    images: Annotated[Path, Option("-i", "--input", help="An image, a folder of images, or a DICOM folder.")],
    output: Annotated[Path, Option("-o", "--output", help="Folder; for one image also a .nii.gz file.")],
    series: Annotated[str | None, Option(help="UID of the DICOM series to take, where there are several.")] = None,
    model: Annotated[str | None, _model("-m", "--model", autocompletion=_complete_model, help=_MODEL_HELP)] = None,
    dataset: Annotated[str | None, _model("-d", "--dataset", help="Or a dataset's id or name.")] = None,
    trainer: Annotated[str, _model("-tr", "--trainer", help="Trainer.")] = "nnUNetTrainer",
    plans: Annotated[str, _model("-p", "--plans", help="Plans.")] = "nnUNetPlans",
    configuration: Annotated[str, _model("-c", "--configuration", help="Configuration.")] = "3d_fullres",
    folds: Annotated[list[str] | None, _model("-f", "--folds", help="Folds to average; all by default.")] = None,
    checkpoint: Annotated[str, _model("-chk", "--checkpoint", help="File in each fold.")] = "checkpoint_final.pth",
    previous_stage: Annotated[Path | None, Option("-prev_stage_predictions", help=_FIRST_STAGE_HELP)] = None,
    structures: Annotated[str | None, _result(help="Only these: liver,spleen. Label values stay.")] = None,
    lowres: Annotated[bool, _result(help="Write at the model's spacing, not the image's.")] = False,
    masks: Annotated[bool, _result(help="Also a mask of each structure.")] = False,
    statistics: Annotated[bool, _result(help="Also volumes and mean intensities.")] = False,
    preview: Annotated[bool, _result(help="Also a picture of each case.")] = False,
    names_in_header: Annotated[bool, _result(help="Write names into the NIfTI header.")] = False,
    save_probabilities: Annotated[bool, _result("--save_probabilities", help=_PROBABILITIES_HELP)] = False,
    continue_prediction: Annotated[bool, _result(*_CONTINUE, help="Keep cases that are predicted already.")] = False,
    trust: Trust = None,
    device: Device = "auto",
    memory: Annotated[str | None, _resources(help="Limit for all processes, such as 8GB.")] = None,
    step_size: Annotated[float, _resources("-step_size", "--step_size", help="Window distance, in patches.")] = 0.5,
    disable_tta: Annotated[bool, _resources("--disable_tta", help="No mirroring.")] = False,
    n_preparing: Annotated[int, _resources("-npp", metavar="N", help="Processes that preprocess.", min=0)] = 1,
    n_writing: Annotated[int, _resources("-nps", metavar="N", help="Processes that write.", min=0)] = 1,
    n_parts: Annotated[int, _resources("-num_parts", metavar="N", help="Commands that share the cases.", min=1)] = 1,
    part_id: Annotated[int, _resources("-part_id", metavar="N", help="Which one this is, from 0.", min=0)] = 0,
    not_on_device: Annotated[bool, _resources("--not_on_device", help="Add up logits in main memory.")] = False,
    disable_progress_bar: Annotated[bool, _resources("--disable_progress_bar", help="For logs.")] = False,
) -> None:
    """Predict as nnUNetv2_predict does, with the same labels, in memory that hardly grows with structures or image.

    OUT/CASE.nii.gz holds the labels, OUT/labels.json their names, and OUT/manifest.json the model, the versions and the
    structures that were found. The options are nnUNetv2_predict's where it has them. Models with regions, cascades and
    --save_probabilities go to nnU-Net's own predictor.
    """
    if not images.exists():  # before PyTorch is imported, which takes seconds
        raise UsageError(f"the input {images} is missing: correct -i")
    if (model is None) == (dataset is None):
        given = "neither -m nor -d is" if model is None else f"-m {model} and -d {dataset} are both"
        raise UsageError(f"{given} given: give -m MODEL, or -d with -tr, -p and -c; see `stunet list` for models")
    if dataset is not None:
        model = str(nnunet_folder("nnUNet_results") / find_dataset(dataset) / f"{trainer}__{plans}__{configuration}")
    elif not Path(str(model)).exists() and os.sep not in str(model):
        entry = find_entry(str(model))
        licence = entry.licence or "not stated; ask those who published them"
        page = f" ({entry.page})" if entry.page else ""
        print_line(f"Weights {model}, licence: {licence}{page}")

    import torch

    from stunet.inference import load_model, parse_memory, predict_folder

    budget = None if memory is None else parse_memory(memory)
    chosen = choose_device(device)
    torch.backends.cudnn.benchmark = True  # windows are all of one size
    extras = {"masks": masks, "statistics": statistics, "preview": preview, "names_in_header": names_in_header}
    trained = load_model(str(model), folds, checkpoint, trust=trust or [], say=say)
    with window_bar(shown=not disable_progress_bar) as on_window:
        predict_folder(
            trained,
            images,
            output,
            structures=None if structures is None else split_names(structures),
            device=chosen,
            budget=budget,
            step_size=step_size,
            mirroring=not disable_tta,
            results_on_device=not not_on_device,
            lowres=lowres,
            write=[name for name, wanted in extras.items() if wanted],
            save_probabilities=save_probabilities,
            previous_stage=previous_stage,
            series=series,
            continue_prediction=continue_prediction,
            n_preparing=n_preparing,
            n_writing=n_writing,
            part_id=part_id,
            n_parts=n_parts,
            say=print_line,
            warn=warn,
            on_window=on_window,
        )


@contextmanager
def window_bar(*, shown: bool = True) -> Iterator[Callable[[str, int], None]]:
    """Show how many windows of a case are predicted; yield what is called after each, with case and number of all."""
    done: Counter[str] = Counter()
    with progress_bar("reading and preprocessing", shown=shown) as update:

        def on_window(case: str, n_windows: int) -> None:
            done[case] += 1
            update(description=case, total=n_windows, completed=done[case])

        yield on_window
