"""Prediction of a folder of images with a model folder, from the checks to the table of statistics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from stunet.errors import DatasetError, STUNetError, UsageError
from stunet.files import move_into_place, scratch_folder
from stunet.inference.images import Case, Geometry, find_cases, read_geometry
from stunet.inference.label_names import label_names
from stunet.inference.labels import VOLUME_READERS, why_not_streamed
from stunet.inference.manifest import MANIFEST_NAME, Manifest, check_output, remove_predictions
from stunet.inference.memory import available_bytes, choose_strategy
from stunet.inference.model import CHECKPOINT, Model, load_model
from stunet.inference.outputs import OutputOptions
from stunet.inference.pipeline import Listener, Prediction, describe_outputs, predict_cases, raise_failures
from stunet.inference.statistics import collect_statistics
from stunet.inference.stock import predict_with_nnunet

__all__ = ["FolderListener", "FolderRequest", "predict_folder"]


@dataclass(frozen=True)
class FolderRequest:
    """What is asked of :func:`predict_folder`; where ``nnUNetv2_predict`` has the option too, it means the same.

    Attributes:
        images: What :func:`stunet.inference.find_cases` takes; or the cases themselves, wherever they lie.
        output: Folder for the predictions, made where it is missing; or of a single case the label map, a name that
            ends in ``.nii.gz`` or ``.nii``.
        model: Model folder.
        folds: Names of folds; None for those that are there.
        checkpoint_name: File in each fold's folder.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the axes that the checkpoint allows are mirrored.
        device: Where the network runs.
        results_on_device: Whether logits are added up there too.
        structures: Structures to keep; None for all.
        budget: Bytes that all processes may take together; None for no limit.
        options: What is written beside the labels.
        continue_prediction: Whether cases that are predicted already are left as they are.
        n_preparing: Processes that read and preprocess.
        n_writing: Processes that write.
        part_id: Which part of the cases, where several commands share them.
        n_parts: Into how many parts they are divided.
        save_probabilities: Whether nnU-Net's files with probabilities are written; its own predictor does it.
        previous_stage: Predictions of a cascade's first stage.
        trust: Classes that the model's plans may name beyond the known ones.
        series: SeriesInstanceUID, where the input is a folder with several DICOM series.
        lowres: Whether labels are written on the network's grid instead of the image's.
    """

    images: Path | Sequence[Case]
    output: Path
    model: Path
    folds: Sequence[str] | None = None
    checkpoint_name: str = CHECKPOINT
    step_size: float = 0.5
    mirroring: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    results_on_device: bool = True
    structures: Sequence[str] | None = None
    budget: int | None = None
    options: OutputOptions = field(default_factory=OutputOptions)
    continue_prediction: bool = False
    n_preparing: int = 1
    n_writing: int = 1
    part_id: int = 0
    n_parts: int = 1
    save_probabilities: bool = False
    previous_stage: Path | None = None
    trust: Sequence[str] = ()
    series: str | None = None
    lowres: bool = False


class FolderListener(Listener, Protocol):
    """What is told of the progress, and of what was decided."""

    def planned(self, n_cases: int, n_finished: int) -> None:
        """So many cases will be predicted; so many were before."""


def predict_folder(request: FolderRequest, listener: FolderListener) -> None:
    """Predict the images of a folder, or a single one.

    Args:
        request: What is asked.
        listener: Told of the progress.

    Raises:
        UsageError: An argument that cannot be, a memory budget that is too small, or an output folder with files that
            were made with other settings and would stay.
        OSError: No room or no permission to write.
        PlansError: A model folder that cannot be used.
        CheckpointError: Weights that are missing, or do not fit.
        LabelError: A structure that the model does not know.
        CommandError: Cases failed; the others are predicted.
    """
    output = request.output
    if not output.name.endswith((".nii.gz", ".nii")) or output.is_dir():
        _predict_folder(request, listener)
        return
    with scratch_folder(output.parent) as scratch:
        _predict_folder(replace(request, output=scratch / "output"), listener, label_map=output)


def _predict_folder(request: FolderRequest, listener: FolderListener, label_map: Path | None = None) -> None:
    model = load_model(request.model, request.folds, request.checkpoint_name, trust=request.trust)
    names = label_names(model.dataset_json, request.structures)
    listener.note(f"Model {model.folder}, {_plural(len(model.checkpoints), 'fold')} ({', '.join(model.checkpoints)})")
    volumes = model.plans_manager.image_reader_writer_class.__name__ in VOLUME_READERS
    _check(request, model, volumes=volumes)
    found = request.images
    if isinstance(found, Path):
        found = find_cases(found, model.file_ending, model.n_channels if volumes else 1, request.series)
    places = [request.output / f"{case.name}{model.file_ending}" for case in found]
    _check_images_stay(found, places if label_map is None else [label_map])
    if label_map is not None:
        _check_label_map(label_map, found, request, model)
    prediction = Prediction(
        model,
        names,
        request.output,
        device=request.device,
        results_on_device=request.results_on_device,
        step_size=request.step_size,
        mirroring=request.mirroring,
        lowres=request.lowres,
        options=request.options,
    )
    reason = _why_nnunets_predictor(request, model)
    if reason is not None and request.lowres:
        raise _impossible("--lowres", model.folder, f"a model that is predicted plane by plane, but {reason}")
    cases = found[request.part_id :: request.n_parts]
    record, outdated = check_output(
        prediction, found, cases, previous_stage=request.previous_stage, keep=request.continue_prediction
    )
    waiting = [case for case in cases if not _is_done(case, request, model)]
    listener.planned(len(waiting), len(cases) - len(waiting))
    failures: dict[str, str] = {}
    geometries = _read_geometries(waiting, model, failures, listener) if volumes else {}
    ready = [case for case in waiting if case.name not in failures]
    if reason is not None:
        listener.note(f"Predicted by nnU-Net's own predictor, which holds all logits, since {reason}.")
    elif ready:
        prediction = _with_strategy(prediction, request, [geometries[case.name] for case in ready], listener)
    with scratch_folder(request.output) as scratch:
        remove_predictions(prediction, outdated)
        part = None if request.n_parts == 1 else request.part_id
        manifest = Manifest(prediction, record, waiting, listener, part)
        describe_outputs(prediction, scratch, _arguments(request))
        for case in cases:
            if case not in waiting:
                manifest.keep(case)
        if ready:
            failures |= _predict(ready, prediction, scratch, request, manifest, streamed=reason is None)
        manifest.close(failures)
        if request.options.statistics and (request.output / "statistics").is_dir():
            collect_statistics(request.output / "statistics", scratch / "statistics.csv")
            move_into_place(scratch / "statistics.csv", request.output / "statistics.csv")
    raise_failures(failures, len(waiting))
    if label_map is not None:
        move_into_place(request.output / MANIFEST_NAME, _manifest_beside(label_map, model))
        move_into_place(request.output / f"{cases[0].name}{model.file_ending}", label_map)


def _manifest_beside(label_map: Path, model: Model) -> Path:
    return label_map.with_name(f"{label_map.name.removesuffix(model.file_ending)}.{MANIFEST_NAME}")


def _check_images_stay(cases: Sequence[Case], outputs: Sequence[Path]) -> None:
    images = {file.resolve() for case in cases for file in case.files}
    for output in outputs:
        if output.resolve() in images:
            raise _impossible("-o", f"{output}, an image", "a place where no image is replaced")


def _check_label_map(path: Path, cases: Sequence[Case], request: FolderRequest, model: Model) -> None:
    others = [name for name, wanted in vars(request.options).items() if wanted and name != "names_in_header"]
    problem = None
    if len(cases) != 1:
        problem = f"{len(cases)} images"
    elif not path.name.endswith(model.file_ending):
        problem = f"a model that writes {model.file_ending}"
    elif path.exists() and not _manifest_beside(path, model).exists():
        raise _impossible("-o", f"{path}, which is there and no prediction", "another name, or a prediction to replace")
    elif others or request.save_probabilities or request.continue_prediction or request.n_parts > 1:
        problem = "options that write more than a label map, or share or continue a prediction"
    if problem is not None:
        raise _impossible("-o", path, f"a folder, as there are {problem}")


def _predict(
    cases: Sequence[Case],
    prediction: Prediction,
    scratch: Path,
    request: FolderRequest,
    listener: Listener,
    *,
    streamed: bool,
) -> dict[str, str]:
    if streamed:
        return predict_cases(cases, prediction, scratch, listener)
    return predict_with_nnunet(
        cases,
        prediction,
        scratch,
        listener,
        save_probabilities=request.save_probabilities,
        previous_stage=request.previous_stage,
    )


def _why_nnunets_predictor(request: FolderRequest, model: Model) -> str | None:
    if request.save_probabilities:
        return "probabilities are asked for"
    return why_not_streamed(model.plans_manager, model.configuration_manager, model.label_manager)


def _with_strategy(
    prediction: Prediction, request: FolderRequest, geometries: Sequence[Geometry], listener: FolderListener
) -> Prediction:
    several = len(geometries) > 1
    strategy, need = choose_strategy(
        prediction.model,
        geometries,
        budget=request.budget,
        n_preparing=request.n_preparing if several else 0,
        n_writing=request.n_writing if several else 0,
        mirroring=request.mirroring,
        on_device=request.device.type != "cpu" and request.results_on_device,
    )
    note = f"Estimated memory: {need / 2**30:.1f} GB"
    spare = available_bytes()
    if request.budget is None and spare is not None and need > spare:
        note += f", of which this machine has {spare / 2**30:.1f} GB to spare"
    if not strategy.exact:
        note += "; to fit, logits are added up in another order than nnU-Net's, so where two are equal either may win"
    listener.note(note)
    return replace(prediction, strategy=strategy)


def _read_geometries(
    cases: Sequence[Case], model: Model, failures: dict[str, str], listener: FolderListener
) -> dict[str, Geometry]:
    geometries = {}
    for case in cases:
        try:
            geometries[case.name] = read_geometry(case, model.n_channels)
        except DatasetError as error:
            failures[case.name] = str(error)
            listener.failed(case, str(error))
    n_unknown = sum(not geometry.has_unit for geometry in geometries.values())
    if n_unknown:
        listener.note(f"{_plural(n_unknown, 'case')} without a unit of spacing in the header; mm are assumed.")
    return geometries


def _is_done(case: Case, request: FolderRequest, model: Model) -> bool:
    endings = [model.file_ending, *([".npz"] if request.save_probabilities else [])]
    done = all((request.output / f"{case.name}{ending}").is_file() for ending in endings)
    return request.continue_prediction and done


def _check(request: FolderRequest, model: Model, *, volumes: bool) -> None:
    problem: STUNetError | None = None
    if not 0 < request.step_size <= 1:
        problem = _impossible("-step_size", request.step_size, "more than 0 and at most 1")
    elif not 0 <= request.part_id < request.n_parts:
        problem = _impossible("-part_id", request.part_id, f"0 to {request.n_parts - 1}, below -num_parts")
    elif model.configuration_manager.previous_stage_name is not None and request.previous_stage is None:
        problem = UsageError(
            "a cascade without its first stage",
            got=f"{model.configuration}, which takes predictions of {model.configuration_manager.previous_stage_name}",
            expected="-prev_stage_predictions FOLDER",
            remedy="Predict the first stage, and give the folder.",
        )
    elif request.options.masks and not volumes:
        problem = _impossible("--masks", model.file_ending, "a model of NIfTI images, which masks are written as")
    elif request.options.names_in_header and not model.file_ending.startswith(".nii"):
        problem = _impossible("--names-in-header", model.file_ending, "a model of NIfTI images")
    elif request.output.exists() and not request.output.is_dir():
        problem = _impossible("-o", request.output, "a folder")
    if problem is not None:
        raise problem


def _impossible(option: str, value: object, expected: str) -> UsageError:
    return UsageError(
        f"impossible value of {option}", got=value, expected=expected, remedy=f"Correct {option}, or leave it out."
    )


def _arguments(request: FolderRequest) -> dict[str, Any]:
    """What nnU-Net notes of a prediction, under the names of its own arguments."""
    previous = request.previous_stage
    if isinstance(request.images, Path):
        images: Any = os.fspath(request.images)
    else:
        images = [list(map(os.fspath, case.files)) for case in request.images]
    return {
        "list_of_lists_or_source_folder": images,
        "output_folder_or_list_of_truncated_output_files": os.fspath(request.output),
        "save_probabilities": request.save_probabilities,
        "overwrite": not request.continue_prediction,
        "num_processes_preprocessing": request.n_preparing,
        "num_processes_segmentation_export": request.n_writing,
        "folder_with_segs_from_prev_stage": None if previous is None else os.fspath(previous),
        "num_parts": request.n_parts,
        "part_id": request.part_id,
    }


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
