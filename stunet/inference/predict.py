"""Prediction in bounded memory: of one image, and of folders of images with all that is written of them.

While the network works on one case, the next is prepared and the last is written, in processes of their own.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from stunet.errors import CommandError, DatasetError, LabelError, STUNetError, UsageError
from stunet.files import move_into_place, scratch_folder, temporary_path, write_json_files
from stunet.inference.images import (
    Case,
    CaseArray,
    Geometry,
    as_nifti,
    convert,
    find_cases,
    prepare,
    preprocess,
    read_geometry,
    read_images,
    save_array,
)
from stunet.inference.memory import MemoryPlan, available_bytes, network_spacing, plan_memory
from stunet.inference.model import Model, load_model
from stunet.inference.outputs import (
    MANIFEST_NAME,
    Manifest,
    Outputs,
    check_folder,
    collect_statistics,
    model_settings,
    remove_predictions,
    restrict,
    write_case,
)
from stunet.inference.resampling import LabelResampler, axis_maps, is_default_resampling
from stunet.inference.windows import average, mirror_and_predict, predict_planes, window_grid
from stunet.labels import match_names
from stunet.processes import in_order
from stunet.volumes import NIFTI_ENDINGS

#: Readers that give volumes, one channel a file.
_VOLUME_READERS = {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"}

Network = Callable[[Tensor], Tensor]
Labels = npt.NDArray[Any]
#: Makes labels of a prepared case, and says what is noted of their grid.
Label = Callable[[CaseArray], tuple[Labels, dict[str, Any]]]


class Progress:
    """What a prediction tells of itself; silent unless methods are replaced."""

    def note(self, text: str) -> None:
        """Say something worth knowing."""

    def planned(self, n_cases: int, n_finished: int) -> None:
        """So many cases will be predicted; so many were before."""

    def window(self, case: Case, n_windows: int) -> None:
        """One window of a case, of so many, was predicted."""

    def finished(self, case: Case, found: Mapping[str, Any]) -> None:
        """All files of a case are written; these structures were found in it."""

    def failed(self, case: Case, problem: str) -> None:
        """A case was given up."""


# One image ------------------------------------------------------------------------------------------------------------


def predict(
    model: Model | str | os.PathLike[str],
    image: Any,
    *,
    spacing: Sequence[float] | None = None,
    structures: Sequence[str] | None = None,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
) -> Any:
    """Predict one image, in memory that hardly grows with the number of structures.

    Args:
        model: A model, or what :func:`load_model` takes.
        image: An array ``(Z, Y, X)`` or ``(C, Z, Y, X)``; or a SimpleITK image or the path of an image, and of several
            channels a list of one for each.
        spacing: mm between the voxels of an array along ``(Z, Y, X)``.
        structures: Names of structures to keep; None for all.
        device: Where the network runs.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the model's mirroring axes are used.

    Returns:
        The label map: of an array another one ``(Z, Y, X)``, else a SimpleITK image.

    Raises:
        UsageError: An array without spacing, or the second stage of a cascade.
        DatasetError: An image that cannot be read.
        LabelError: A structure that the model does not know.

    >>> labels = predict(model_folder, np.random.default_rng(0).normal(size=(20, 24, 18)), spacing=(3, 1.5, 1.5))
    >>> labels.shape, labels.dtype
    ((20, 24, 18), dtype('uint8'))
    """
    model = model if isinstance(model, Model) else load_model(model)
    kept = choose_structures(model, structures)
    run = partial(_predict_one, model, kept, torch.device(device), step_size, mirroring)
    if isinstance(image, np.ndarray):
        if spacing is None or len(spacing) != 3:
            raise UsageError(f"spacing is {spacing}: give the mm between the voxels of the array along (Z, Y, X)")
        return run(image.reshape(-1, *image.shape[-3:]), {"spacing": [float(side) for side in spacing]})
    images = image if isinstance(image, list | tuple) else [image]
    with TemporaryDirectory() as folder:
        files = []
        for channel, given in enumerate(images):
            files.append(Path(folder) / f"{channel}.nii" if isinstance(given, sitk.Image) else Path(given))
            if isinstance(given, sitk.Image):
                sitk.WriteImage(given, str(files[-1]))
        case = as_nifti(Case("image", tuple(files)), model.file_ending, Path(folder))
        read_geometry(case, model.n_channels)
        voxels, properties = read_images(case, model)
        written = str(Path(folder) / f"labels{model.file_ending}")
        model.plans_manager.image_reader_writer_class().write_seg(run(voxels, properties), written, properties)
        return sitk.ReadImage(written)


def _predict_one(
    model: Model, structures: Mapping[str, tuple[int, ...]], device: torch.device, step_size: float, mirroring: bool,
    voxels: npt.NDArray[Any], properties: dict[str, Any],
) -> Labels:  # fmt: skip
    if why_not_streamed(model):
        predictor = _nnunets_predictor(model, device, step_size=step_size, mirroring=mirroring)
        labels = predictor.predict_single_npy_array(voxels.astype(np.float32), properties)
    else:
        image, properties = preprocess(model, [(voxels, properties)])
        networks = prepare_networks(model, device, mirroring=mirroring)
        labels = predict_labels(model, image, properties, networks, step_size=step_size, device=device)
    return restrict(labels, structures)


def choose_structures(model: Model, names: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Return label values of the model's structures, or of those with these names, in any usual spelling.

    Raises:
        LabelError: A name that the model does not know.
    """
    known = model.structures
    if names is None:
        return known
    matches = match_names(list(known), list(names))
    unknown = [name for name, match in matches.items() if match is None]
    if unknown or not names:
        said = ", ".join(unknown) or "nothing"
        raise LabelError(f"the model does not know {said}: give --structures some of {', '.join(known)}")
    return {name: values for name, values in known.items() if name in matches.values()}


def prepare_networks(
    model: Model, device: torch.device, *, mirroring: bool = True, average_folds: bool = False
) -> list[Network]:
    """Return the model's networks on a device, one for each fold, as :func:`predict_labels` takes them."""
    axes = model.mirroring_axes if mirroring else None
    networks = [mirror_and_predict(network.to(device), axes) for network in model.networks]
    return [average(networks)] if average_folds else networks


def predict_labels(
    model: Model,
    image: npt.NDArray[np.float32],
    properties: Mapping[str, Any],
    networks: Sequence[Network],
    *,
    step_size: float = 0.5,
    axis: int = 0,
    device: torch.device,
    results_device: torch.device | None = None,
    lowres: bool = False,
    on_window: Callable[[int], None] = lambda n_windows: None,
) -> Labels:
    """Predict a prepared image.

    The labels are those of nnU-Net's predictor, which holds all logits on both grids. With planes along the first axis
    even the order of its additions is kept; along another one the last bit of a logit may differ.

    Args:
        model: The model.
        image: ``(C, X, Y, Z)`` on the network's grid. May be mapped from a file.
        properties: What nnU-Net's preprocessing noted of the original grid.
        networks: One for each fold.
        step_size: Distance between windows as a fraction of the patch.
        axis: The axis along which logits are held a window's thickness at a time.
        device: Where the networks are.
        results_device: Where logits are added up; by default there too.
        lowres: Whether the labels stay on the network's grid, which covers what preprocessing has not cropped.
        on_window: Called after each window with the number of all.

    Returns:
        Labels on the original grid, or the network's, axes in the order of the image's reader.
    """
    plans, configuration = model.plans_manager, model.configuration_manager
    padded, uncropped = pad_nd_image(
        image, tuple(configuration.patch_size), "constant", {"constant_values": 0}, return_slicer=True
    )
    kept = uncropped[1:]
    grid = window_grid(padded.shape[1:], configuration.patch_size, step_size)
    planes = predict_planes(
        padded, networks, grid, num_classes=model.n_outputs, device=device, results_device=results_device or device,
        axis=axis, on_window=lambda: on_window(grid.n_windows),
    )  # fmt: skip
    spacing = [properties["spacing"][i] for i in plans.transpose_forward]
    options = configuration.configuration["resampling_fn_probabilities_kwargs"]
    maps = axis_maps(
        image.shape[1:],
        image.shape[1:] if lowres else properties["shape_after_cropping_and_before_resampling"],
        network_spacing(model, spacing),
        spacing,
        **{key: value for key, value in options.items() if key not in ("is_seg", "order")},
    )
    shape = image.shape[1:] if lowres else properties["shape_before_cropping"]
    labels: Labels = np.zeros(shape, label_type(model))
    inside = labels if lowres else labels[tuple(slice(*limits) for limits in properties["bbox_used_for_cropping"])]
    rows, columns = (i for i in range(3) if i != axis)
    resampler = LabelResampler((maps[axis], maps[rows], maps[columns]), labels.dtype)
    in_order_of_planes = np.moveaxis(inside, axis, 0)
    for index, plane in enumerate(planes):
        if kept[axis].start <= index < kept[axis].stop:
            logits = plane[:, kept[rows], kept[columns]].cpu().numpy()
            for position, labelled in resampler.push(logits):
                in_order_of_planes[position] = labelled
    restored: Labels = labels.transpose(plans.transpose_backward)
    return restored


def label_type(model: Model) -> type[np.uint8 | np.uint16]:
    """Return the type that nnU-Net gives labels."""
    return np.uint8 if len(model.label_manager.foreground_labels) < 255 else np.uint16


def why_not_streamed(model: Model) -> str | None:
    """Say why a model's logits cannot be turned into labels plane by plane; None where they can."""
    configuration: Mapping[str, Any] = model.configuration_manager.configuration
    options = configuration["resampling_fn_probabilities_kwargs"]
    reader = model.plans_manager.image_reader_writer_class.__name__
    if model.label_manager.has_regions:
        return "it was trained on regions that overlap"
    if model.configuration_manager.previous_stage_name is not None:
        return "it is the second stage of a cascade"
    if not is_default_resampling(configuration, "probabilities"):
        return f"its plans resample probabilities with {configuration['resampling_fn_probabilities']}"
    if options.get("order", 3) != 1 or options.get("order_z", 0) not in (0, 1):
        return f"its plans resample probabilities with order {options.get('order', 3)}, not 1"
    return None if reader in _VOLUME_READERS else f"its images are read by {reader}"


def _nnunets_predictor(
    model: Model, device: torch.device, *, step_size: float, mirroring: bool, on_device: bool = True
) -> nnUNetPredictor:
    """nnU-Net's own predictor, for models that cannot be predicted plane by plane."""
    predictor = nnUNetPredictor(
        tile_step_size=step_size, use_mirroring=mirroring, perform_everything_on_device=on_device, device=device
    )
    weights = [model.weights(fold) for fold in model.checkpoints]
    predictor.manual_initialization(
        model.build_network(), model.plans_manager, model.configuration_manager, weights, model.dataset_json,
        model.trainer_name, model.mirroring_axes or None,
    )  # fmt: skip
    return predictor


# Folders --------------------------------------------------------------------------------------------------------------


def predict_folder(
    model: Model,
    images: Path | Sequence[Case],
    output: Path,
    *,
    structures: Sequence[str] | None = None,
    device: str = "cpu",
    budget: int | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
    results_on_device: bool = True,
    lowres: bool = False,
    masks: bool = False,
    statistics: bool = False,
    preview: bool = False,
    names_in_header: bool = False,
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
    series: str | None = None,
    continue_prediction: bool = False,
    n_preparing: int = 1,
    n_writing: int = 1,
    part_id: int = 0,
    n_parts: int = 1,
    progress: Progress | None = None,
) -> None:
    """Predict the images of a folder, or a single one; ``nnUNetv2_predict``'s options mean the same here.

    Args:
        model: The model.
        images: What :func:`find_cases` takes; or the cases themselves, wherever they lie.
        output: Folder for the predictions, made where it is missing; or of a single case the label map, a name that
            ends in ``.nii.gz`` or ``.nii``.
        structures: Structures to keep; None for all.
        device: Where the network runs.
        budget: Bytes that all processes may take together; None for no limit.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the axes that the checkpoint allows are mirrored.
        results_on_device: Whether logits are added up on the device too.
        lowres: Whether labels are written on the network's grid instead of the image's.
        masks: Whether a mask of each structure is written, see :class:`Outputs`.
        statistics: Whether volumes and mean intensities are written.
        preview: Whether a picture is drawn.
        names_in_header: Whether the structures' names are written into the label map's header.
        save_probabilities: Whether nnU-Net's files with probabilities are written; its own predictor does it.
        previous_stage: Predictions of a cascade's first stage.
        series: SeriesInstanceUID, where the input is a folder with several DICOM series.
        continue_prediction: Whether cases that are predicted already are left as they are.
        n_preparing: Processes that read and preprocess.
        n_writing: Processes that write.
        part_id: Which part of the cases, where several commands share them.
        n_parts: Into how many parts they are split.
        progress: Told of the progress.

    Raises:
        UsageError: An argument that cannot be, a memory budget that is too small, or an output folder with files that
            were made with other settings and would stay.
        OSError: No room or no permission to write.
        LabelError: A structure that the model does not know.
        CommandError: Cases failed; the others are predicted.
    """
    progress, ending, chosen = progress or Progress(), model.file_ending, torch.device(device)
    kept, n_folds = choose_structures(model, structures), len(model.checkpoints)
    folds = f"{n_folds} fold{'s' * (n_folds > 1)} ({', '.join(model.checkpoints)})"
    progress.note(f"Model {model.folder}, {folds}")
    volumes = model.plans_manager.image_reader_writer_class.__name__ in _VOLUME_READERS
    reason = "probabilities are asked for" if save_probabilities else why_not_streamed(model)
    found = (
        find_cases(images, ending, model.n_channels if volumes else 1, series) if isinstance(images, Path) else images
    )
    own, several = found[part_id::n_parts], masks or statistics or preview or save_probabilities
    is_file = output.name.endswith(NIFTI_ENDINGS) and not output.is_dir()
    beside = output.with_name(f"{output.name.removesuffix(ending)}.{MANIFEST_NAME}")
    first_stage = model.configuration_manager.previous_stage_name
    inputs = {file.resolve() for case in found for file in case.files}
    places = [output] if is_file else [output / f"{case.name}{ending}" for case in found]
    for wrong, said in (
        (not 0 < step_size <= 1, f"-step_size {step_size} is not above 0 and at most 1"),
        (part_id >= n_parts, f"-part_id {part_id} is not one of 0 to {n_parts - 1}, below -num_parts"),
        (first_stage and not previous_stage, f"the model takes predictions of {first_stage}: -prev_stage_predictions"),
        (masks and not volumes, f"--masks are NIfTI files, but the model's images {ending}"),
        (names_in_header and not ending.startswith(".nii"), f"--names-in-header needs NIfTI files, not {ending}"),
        (lowres and reason, f"--lowres needs a model that is predicted plane by plane, but {reason}"),
        (not is_file and output.exists() and not output.is_dir(), f"-o {output} is no folder"),
        (any(place.resolve() in inputs for place in places), f"-o {output} would replace an image"),
        (is_file and len(found) != 1, f"-o {output} is no folder, as {len(found)} images need one"),
        (is_file and not output.name.endswith(ending), f"-o {output} is no folder, and the model writes {ending}"),
        (is_file and output.exists() and not beside.exists(), f"-o {output} is there, and no prediction to replace"),
        (is_file and several, f"-o {output} is no folder, as options that write more than a label map need one"),
        (is_file and continue_prediction, f"-o {output} is no folder, which --continue needs"),
    ):
        if wrong:
            raise UsageError(f"{said}: correct the option, or leave it out")
    folder = temporary_path(output.parent / "scratch") / "output" if is_file else output
    settings = {
        "structures": list(kept), "mirroring": mirroring, "step_size": step_size, "lowres": lowres,
        "previous_stage": None if previous_stage is None else str(previous_stage.resolve()),
        "masks": masks, "statistics": statistics, "names_in_header": names_in_header, "preview": preview,
    }  # fmt: skip
    settings = model_settings(model) | settings
    record, outdated = check_folder(folder, ending, settings, found, own, keep=continue_prediction)
    endings = (ending, ".npz") if save_probabilities else (ending,)
    done = [case for case in own if all((folder / f"{case.name}{each}").is_file() for each in endings)]
    waiting = [case for case in own if not continue_prediction or case not in done]
    progress.planned(len(waiting), len(own) - len(waiting))
    failures: dict[str, str] = {}
    geometries = _read_geometries(waiting, model, failures, progress) if volumes else {}
    ready = [case for case in waiting if case.name not in failures]
    plan = MemoryPlan(n_preparing=0, n_writing=0)
    if reason is not None:
        progress.note(f"Predicted by nnU-Net's own predictor, which holds all logits, since {reason}.")
    elif ready:
        plan, need = plan_memory(
            model, list(geometries.values()), budget=budget, n_preparing=min(n_preparing, len(ready) - 1),
            n_writing=min(n_writing, len(ready) - 1), mirroring=mirroring,
            on_device=chosen.type != "cpu" and results_on_device,
        )  # fmt: skip
        note, spare = f"Estimated memory: {need / 2**30:.1f} GB", available_bytes()
        if budget is None and spare is not None and need > spare:
            note += f", of which this machine has {spare / 2**30:.1f} GB to spare"
        if not plan.exact:
            note += (
                "; to fit, logits are added up in another order than nnU-Net's, so where two are equal either may win"
            )
        progress.note(note)
    with ExitStack() as stack:
        if is_file:
            stack.enter_context(scratch_folder(output.parent))
        scratch = stack.enter_context(scratch_folder(folder))
        remove_predictions(folder, ending, outdated)
        manifest = Manifest(model, folder, record, device, waiting, None if n_parts == 1 else part_id)
        listed = os.fspath(images) if isinstance(images, Path) else [list(map(os.fspath, c.files)) for c in images]
        arguments = {  # under the names of nnU-Net's own
            "list_of_lists_or_source_folder": listed,
            "output_folder_or_list_of_truncated_output_files": os.fspath(output),
            "save_probabilities": save_probabilities,
            "overwrite": not continue_prediction,
            "num_processes_preprocessing": n_preparing,
            "num_processes_segmentation_export": n_writing,
            "folder_with_segs_from_prev_stage": None if previous_stage is None else os.fspath(previous_stage),
            "num_parts": n_parts,
            "part_id": part_id,
        }
        contents = {"predict_from_raw_data_args": arguments, "dataset": model.dataset_json, "plans": model.plans}
        contents["labels"] = {"0": "background"} | {
            ",".join(map(str, values)): name for name, values in sorted(kept.items(), key=lambda item: item[1])
        }
        write_json_files({folder / f"{name}.json": content for name, content in contents.items()})
        outputs = Outputs(folder, kept, lowres, masks, statistics, names_in_header, preview)
        for case in own:
            if case not in waiting:
                manifest.keep(case, model, outputs)

        def fail(case: Case, error: Exception) -> None:
            shutil.rmtree(scratch / case.name, ignore_errors=True)
            failures[case.name] = _describe(error)
            progress.failed(case, failures[case.name])

        build = partial(
            _streamed, model, plan, chosen, step_size=step_size, mirroring=mirroring, lowres=lowres, progress=progress,
            results_device=chosen if results_on_device else torch.device("cpu"),
        )  # fmt: skip
        if reason is not None:
            build = partial(
                _by_nnunet, model, chosen, step_size=step_size, mirroring=mirroring, on_device=results_on_device,
                previous_stage=previous_stage, probabilities=folder if save_probabilities else None,
            )  # fmt: skip
        step = partial(prepare if reason is None else convert, model=model, scratch=scratch)
        labelled = _labelled(ready, step, build, fail, plan.n_preparing)
        writing = partial(write_case, model=model, outputs=outputs)
        for job, result in in_order(writing, labelled, num_processes=plan.n_writing):
            if isinstance(result, Exception):
                fail(job.case, result)
                continue
            shutil.rmtree(job.path.parent, ignore_errors=True)
            structures_found, problem = result
            if problem:
                progress.note(f"warning: {job.case.name}: {problem}")
            manifest.add(job.case, structures_found)
            progress.finished(job.case, structures_found)
        manifest.close(failures)
        if statistics and (folder / "statistics").is_dir():
            collect_statistics(folder / "statistics", folder / "statistics.csv")
        if is_file and not failures:
            move_into_place(folder / MANIFEST_NAME, beside)
            move_into_place(folder / f"{own[0].name}{ending}", output)
    if failures:
        lines = "".join(f"\n    {name}: {problem.splitlines()[0]}" for name, problem in sorted(failures.items()))
        raise CommandError(
            f"{len(failures)} of {len(waiting)} failed: mend or remove them, and run the command again with --continue, "
            f"which keeps what is finished:{lines}"
        )


def _read_geometries(
    cases: Sequence[Case], model: Model, failures: dict[str, str], progress: Progress
) -> dict[str, Geometry]:
    geometries = {}
    for case in cases:
        try:
            geometries[case.name] = read_geometry(case, model.n_channels)
        except DatasetError as error:
            failures[case.name] = str(error)
            progress.failed(case, str(error))
    if n := sum(not geometry.has_unit for geometry in geometries.values()):
        progress.note(f"{n} case{'s' * (n > 1)} without a unit of spacing in the header; mm are assumed.")
    return geometries


def _labelled(
    cases: Sequence[Case],
    prepare_case: Callable[[Case], CaseArray],
    build: Callable[[], Label],
    fail: Callable[[Case, Exception], None],
    num_processes: int,
) -> Iterator[CaseArray]:
    """Yield the labels of cases as arrays in files; the networks are loaded while the first case is prepared."""
    build = cache(build)

    def feed() -> Iterator[Case]:
        for case in cases:
            yield case
            build()

    for case, prepared in in_order(prepare_case, feed(), num_processes=num_processes):
        label = build()
        try:
            if isinstance(prepared, Exception):
                raise prepared
            labels, properties = label(prepared)
            path = prepared.path.with_name("labels.npy")
            save_array(path, labels)
        except Exception as error:  # whatever it is, the other cases can do without this one
            fail(case, error)
        else:
            yield CaseArray(prepared.case, path, properties)


def _streamed(
    model: Model, plan: MemoryPlan, device: torch.device, *, step_size: float, mirroring: bool, lowres: bool,
    results_device: torch.device, progress: Progress,
) -> Label:  # fmt: skip
    """Load the networks, and return what makes labels of a prepared case plane by plane."""
    networks = prepare_networks(model, device, mirroring=mirroring, average_folds=plan.average_folds)

    def label(prepared: CaseArray) -> tuple[Labels, dict[str, Any]]:
        image = np.load(prepared.path, mmap_mode="r")
        run = partial(
            predict_labels, model, image, prepared.properties, networks, step_size=step_size, axis=plan.axis,
            device=device, lowres=lowres, on_window=partial(progress.window, prepared.case),
        )  # fmt: skip
        with suppress(torch.OutOfMemoryError):
            return run(results_device=results_device), prepared.properties
        torch.cuda.empty_cache()
        return run(results_device=torch.device("cpu")), prepared.properties

    return label


def _by_nnunet(
    model: Model, device: torch.device, *, step_size: float, mirroring: bool, on_device: bool,
    previous_stage: Path | None, probabilities: Path | None,
) -> Label:  # fmt: skip
    """Load nnU-Net's own predictor, and return what makes labels of a case with it."""
    predictor = _nnunets_predictor(model, device, step_size=step_size, mirroring=mirroring, on_device=on_device)

    def label(converted: CaseArray) -> tuple[Labels, dict[str, Any]]:
        case, stem = converted.case, converted.path.with_name("stock")
        predictor.predict_from_files_sequential(
            [[str(path) for path in case.files]], [str(stem)], save_probabilities=probabilities is not None,
            folder_with_segs_from_prev_stage=None if previous_stage is None else str(previous_stage),
        )  # fmt: skip
        labels, properties = model.plans_manager.image_reader_writer_class().read_seg(f"{stem}{model.file_ending}")
        for ending in (".npz", ".pkl") if probabilities is not None else ():
            move_into_place(f"{stem}{ending}", probabilities / f"{case.name}{ending}")
        return np.asarray(labels[0]).astype(label_type(model)), properties

    return label


def _describe(error: Exception) -> str:
    if isinstance(error, STUNetError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"the disk is full: {error}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}"
