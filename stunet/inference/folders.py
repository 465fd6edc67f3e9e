"""Prediction of folders of images, with all that is written of them.

While the network works on one case, the next is prepared and the last is written, in processes of their own.
"""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from stunet.errors import CommandError, DatasetError, STUNetError, UsageError
from stunet.files import move_into_place, remove_leftovers, scratch_folder, temporary_path, write_json_files
from stunet.inference import outputs
from stunet.inference.images import Case, CaseArray, Geometry, find_cases, prepare, read_geometry
from stunet.inference.model import Model
from stunet.inference.predictor import MemoryPlan, Predictor, choose_structures, network_spacing
from stunet.memory import peak_forward_bytes
from stunet.processes import in_order
from stunet.volumes import NIFTI_ENDINGS, available_bytes

_HALF, _SINGLE = 2, 4
#: A process that has imported PyTorch and nnU-Net and done nothing; measured 400 MB of its own.
_PROCESS_BYTES = 450 * 2**20
#: Tiles of the resampling, blocks of the preprocessing, buffers of files.
_TEMPORARY_BYTES = 100 * 2**20
#: Convolutions on a CPU reorder their inputs and outputs, and the allocator keeps some of what was freed.
_CONVOLUTION_FACTOR = 1.5


def predict_folder(
    model: Model,
    images: str | Path | Sequence[Case],
    output: Path,
    *,
    structures: Sequence[str] | None = None,
    write: Collection[str] = (),
    lowres: bool = False,
    device: str = "cpu",
    budget: int | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
    results_on_device: bool = True,
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
    series: str | None = None,
    continue_prediction: bool = False,
    n_preparing: int = 1,
    n_writing: int = 1,
    part_id: int = 0,
    n_parts: int = 1,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
    on_window: Callable[[str, int], None] = lambda case, n_windows: None,
) -> None:
    """Predict the images of a folder, or a single one; ``nnUNetv2_predict``'s options mean the same here.

    Args:
        model: The model.
        images: What :func:`find_cases` takes; or the cases themselves, wherever they lie.
        output: Folder for the predictions; or of a single case the label map, a name in ``.nii.gz`` or ``.nii``.
        structures: Structures to keep; None for all.
        write: What is written beside labels: some of :data:`stunet.inference.outputs.EXTRAS`.
        lowres: Whether labels are written on the network's grid instead of the image's.
        device: Where the network runs.
        budget: Bytes that all processes may take together; None for no limit.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the axes that the checkpoint allows are mirrored.
        results_on_device: Whether logits are added up on the device too.
        save_probabilities: Whether nnU-Net's own predictor shall write its files with probabilities.
        previous_stage: Predictions of a cascade's first stage.
        series: SeriesInstanceUID, where the input is a folder with several DICOM series.
        continue_prediction: Whether cases that are predicted already are left as they are.
        n_preparing: Processes that read and preprocess.
        n_writing: Processes that write.
        part_id: Which part of the cases, where several commands share them.
        n_parts: Into how many parts they are split.
        say: Told what is worth knowing, and which cases are finished.
        warn: Told which cases have failed, and why.
        on_window: Told of each window the case's name, and how many windows it has.

    Raises:
        UsageError: An option that cannot be, too small a memory budget, or predictions with other settings in the way.
        OSError: No room or no permission to write.
        LabelError: A structure that the model does not know.
        CommandError: Cases failed; the others are predicted.
    """
    ending, kept = model.file_ending, choose_structures(model, structures)
    predictor = Predictor(model, torch.device(device), step_size, mirroring, results_on_device, lowres)
    folds = f"{len(model.checkpoints)} fold{'s' * (len(model.checkpoints) > 1)}"
    say(f"Model {model.folder}, {folds} ({', '.join(model.checkpoints)})")
    stock = "probabilities are asked for" if save_probabilities else predictor.why_stock
    output = Path(output)
    found = find_cases(images, model, series) if isinstance(images, str | os.PathLike) else list(images)
    is_file = output.name.endswith(NIFTI_ENDINGS) and not output.is_dir()
    beside = output.with_name(f"{output.name.removesuffix(ending)}.{outputs.MANIFEST_NAME}")
    first_stage = model.configuration_manager.previous_stage_name
    inputs = {file.resolve() for case in found for file in case.files}
    needs_folder = {*write} - {"names_in_header"} or save_probabilities or continue_prediction or n_parts > 1
    places = [output] if is_file else [output / f"{case.name}{ending}" for case in found]
    for wrong, said in (
        (not 0 < step_size <= 1, f"-step_size {step_size} is not above 0 and at most 1"),
        (not 0 <= part_id < n_parts, f"-part_id {part_id} is not one of 0 to {n_parts - 1}, below -num_parts"),
        (first_stage and not previous_stage, f"the model takes predictions of {first_stage}: -prev_stage_predictions"),
        ("masks" in write and not model.reads_volumes, f"--masks are NIfTI files, but the model's images {ending}"),
        ("names_in_header" in write and ending not in NIFTI_ENDINGS, f"--names-in-header is for NIfTI, not {ending}"),
        (lowres and stock, f"--lowres needs a model that is predicted plane by plane, but {stock}"),
        (not is_file and output.exists() and not output.is_dir(), f"-o {output} is no folder"),
        (any(place.resolve() in inputs for place in places), f"-o {output} would replace an image"),
        (is_file and len(found) != 1, f"-o {output} is no folder, as {len(found)} images need one"),
        (is_file and not output.name.endswith(ending), f"-o {output} is no folder, and the model writes {ending}"),
        (is_file and output.exists() and not beside.exists(), f"-o {output} is there, and no prediction to replace"),
        (is_file and needs_folder, f"-o {output} is no folder, which more than a label map and several commands need"),
    ):
        if wrong:
            raise UsageError(f"{said}: correct the option, or leave it out")
    own = found[part_id::n_parts]
    folder = temporary_path(output.parent / "scratch") / "output" if is_file else output
    before = None if previous_stage is None else str(previous_stage.resolve())
    settings = {"structures": list(kept), "mirroring": mirroring, "step_size": step_size, "lowres": lowres}
    settings |= {
        "previous_stage": before,
        **{extra: extra in write for extra in outputs.EXTRAS},
        **outputs.model_settings(model),
    }
    record, outdated = outputs.check_folder(folder, ending, settings, found, own, keep=continue_prediction)
    endings = (ending, ".npz") if save_probabilities else (ending,)
    done = [case for case in own if all((folder / f"{case.name}{each}").is_file() for each in endings)]
    done = done if continue_prediction else []
    waiting = [case for case in own if case not in done]
    say(f"Cases to predict: {len(waiting)}" + (f", {len(done)} are finished already" if done else ""))
    failures: dict[str, str] = {}
    geometries: dict[Case, Geometry] = {}

    def fail(case: Case, error: Exception) -> None:
        failures[case.name] = _describe(error)
        warn(f"Failed: {case.name}: {failures[case.name]}")

    for case in waiting if model.reads_volumes else ():
        try:
            geometries[case] = read_geometry(case, model.n_channels)
        except DatasetError as error:
            fail(case, error)
    if n := sum(not geometry.has_unit for geometry in geometries.values()):
        say(f"{n} case{'s' * (n > 1)} without a unit of spacing in the header; mm are assumed.")
    ready = [case for case in waiting if case.name not in failures]
    if stock is not None:
        say(f"Predicted by nnU-Net's own predictor, which holds all logits, since {stock}.")
    elif ready:
        n_processes = min(n_preparing, len(ready) - 1), min(n_writing, len(ready) - 1)
        predictor.plan, need = plan_memory(predictor, list(geometries.values()), budget, *n_processes)
        note, spare = f"Estimated memory: {need / 2**30:.1f} GB", available_bytes()
        if budget is None and spare is not None and need > spare:
            note += f", of which this machine has {spare / 2**30:.1f} GB to spare"
        if predictor.plan.axis or predictor.plan.average_folds:
            note += "; to fit, logits are added up in another order than nnU-Net's: of two equal ones either may win"
        say(note)
    with ExitStack() as stack:
        if is_file:
            stack.enter_context(scratch_folder(output.parent))
        for place in (folder, folder / "statistics", folder / "previews"):
            remove_leftovers(place, "*", of_the_dead=True)
        scratch = stack.enter_context(scratch_folder(folder))  # after them: it is of this process, too
        outputs.remove_predictions(folder, ending, outdated)
        part = None if n_parts == 1 else part_id
        manifest = outputs.Manifest(model, folder, record, device, {case.name for case in waiting}, part)
        listed = [list(map(os.fspath, case.files)) for case in found]
        arguments = {  # under the names of nnU-Net's own
            "list_of_lists_or_source_folder": os.fspath(images) if isinstance(images, str | os.PathLike) else listed,
            "output_folder_or_list_of_truncated_output_files": os.fspath(output),
            "save_probabilities": save_probabilities,
            "overwrite": not continue_prediction,
            "num_processes_preprocessing": n_preparing,
            "num_processes_segmentation_export": n_writing,
            "folder_with_segs_from_prev_stage": None if previous_stage is None else os.fspath(previous_stage),
            "num_parts": n_parts,
            "part_id": part_id,
        }
        by_values = sorted((values, name) for name, values in kept.items())
        names = {"0": "background"} | {",".join(map(str, values)): name for values, name in by_values}
        contents = {"predict_from_raw_data_args": arguments, "dataset": model.dataset_json, "plans": model.plans}
        contents |= {"labels": names}
        write_json_files({folder / f"{name}.json": content for name, content in contents.items()})
        reader = model.plans_manager.image_reader_writer_class()
        for case in done:
            if case.name not in manifest.content["cases"]:  # written by a part, or a killed one
                with suppress(Exception):
                    labels, properties = reader.read_seg(str(folder / f"{case.name}{ending}"))
                    measured = outputs.measure(labels[0].astype(np.uint16), kept, properties["spacing"])
                    manifest.add(case, outputs.find_structures(measured))

        def feed() -> Iterator[Case]:
            for case in ready:
                yield case
                _ = stock or predictor.networks  # are loaded while the first case is prepared

        def label_cases() -> Generator[CaseArray]:
            step = partial(prepare, model=model, scratch=scratch, preprocessed=stock is None)
            for case, prepared in in_order(step, feed(), num_processes=predictor.plan.n_preparing):
                _ = predictor.stock if stock else predictor.networks  # what is wrong with them ends all
                try:
                    if isinstance(prepared, Exception):
                        raise prepared
                    if stock:
                        stem = str(scratch / case.name / "stock")
                        labels, properties = predictor.predict_with_nnunet(
                            prepared.case, stem, save_probabilities=save_probabilities, previous_stage=before
                        )
                        for each in (".npz", ".pkl") if save_probabilities else ():
                            move_into_place(stem + each, folder / f"{case.name}{each}")
                    else:
                        image, properties = np.load(prepared.path, mmap_mode="r"), prepared.properties
                        labels = predictor.predict(image, properties, partial(on_window, case.name))
                    path = scratch / case.name / "labels.npy"
                    np.save(path, labels)
                except Exception as error:  # whatever it is, the other cases can do without this one
                    shutil.rmtree(scratch / case.name, ignore_errors=True)
                    fail(case, error)
                else:
                    yield CaseArray(prepared.case, path, properties)

        labelled = stack.enter_context(closing(label_cases()))  # before the scratch folder goes
        step = partial(
            outputs.write_case, model=model, folder=folder, structures=kept, write=frozenset(write), lowres=lowres
        )
        for job, result in in_order(step, labelled, num_processes=predictor.plan.n_writing):
            shutil.rmtree(job.path.parent, ignore_errors=True)
            if isinstance(result, Exception):
                fail(job.case, result)
                continue
            in_case, problem = result
            if problem:
                say(f"warning: {job.case.name}: {problem}")
            manifest.add(job.case, in_case)
            say(f"Predicted {job.case.name}: {len(in_case)} structure{'s' * (len(in_case) != 1)} found")
        manifest.close(failures)
        if "statistics" in write and (folder / "statistics").is_dir():
            outputs.collect_statistics(folder / "statistics", folder / "statistics.csv")
        if is_file and not failures:
            move_into_place(folder / outputs.MANIFEST_NAME, beside)
            move_into_place(folder / f"{own[0].name}{ending}", output)
    if failures:
        lines = "".join(f"\n    {name}: {problem.splitlines()[0]}" for name, problem in sorted(failures.items()))
        raise CommandError(f"{len(failures)} of {len(waiting)} failed: mend or remove them, then --continue{lines}")


def _describe(error: Exception) -> str:
    if isinstance(error, STUNetError):
        return str(error)
    full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    # numpy says "13824 requested and 9968 written", and no number.
    if isinstance(error, OSError) and (error.errno in full or "requested and" in str(error)):
        return f"the disk is full: {error}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}"


# Memory ---------------------------------------------------------------------------------------------------------------


def plan_memory(
    predictor: Predictor, geometries: Sequence[Geometry], budget: int | None, n_preparing: int = 1, n_writing: int = 1
) -> tuple[MemoryPlan, int]:
    """Choose the first plan that fits: nnU-Net's order of additions before any other, and processes that overlap first.

    Without a budget, the plan must fit in what the machine has to spare, or is the least. Also return the bytes that it
    is estimated to take.

    Raises:
        UsageError: None fits; names the least that works.
    """
    on_device, model = predictor.device.type != "cpu" and predictor.results_on_device, predictor.model
    plans = []
    for average in (False, True)[: len(model.checkpoints)]:
        for n in ((n_preparing, n_writing), (min(1, n_preparing), min(1, n_writing)), (0, 0)):
            plans.append(MemoryPlan(0, average, *n))
        if len(model.configuration_manager.patch_size) == 3:
            plans += [MemoryPlan(axis, average) for axis in (1, 2)]
    network = 0 if on_device else _network_bytes(predictor)
    needs = {
        plan: network + max(_case_bytes(model, geometry, plan, on_device=on_device) for geometry in geometries)
        for plan in plans
    }
    limit, least = available_bytes() if budget is None else budget, min(plans, key=needs.__getitem__)
    plan = next((plan for plan in plans if limit is None or needs[plan] <= limit), least)
    if budget is None or needs[plan] <= budget:
        return plan, needs[plan]
    largest = max(geometries, key=lambda each: math.prod(each.shape))
    gigabytes = math.ceil(needs[least] / 2**30 * 10) / 10
    given = f"--memory {budget / 2**30:.2f}GB"
    raise UsageError(f"{given} is too little for {largest}: give {gigabytes:.1f}GB at least, or fewer folds with -f")


def _case_bytes(model: Model, geometry: Geometry, plan: MemoryPlan, *, on_device: bool) -> int:
    """Peak of all processes while an image like this one is predicted, without the network."""
    n_processes, channels, n = 1 + plan.n_preparing + plan.n_writing, model.n_channels, math.prod(geometry.shape)
    order = model.plans_manager.transpose_forward
    shape, spacing = ([values[i] for i in order] for values in (geometry.shape, geometry.spacing))
    grid = [int(side) for side in compute_new_shape(shape, spacing, network_spacing(model, spacing))]
    # The slab of logits, planes that are being resampled, the image and its labels.
    patch = model.configuration_manager.patch_size
    window: list[int] = [1] * (3 - len(patch)) + list(patch)
    padded = [max(sides) for sides in zip(grid, window, strict=True)]
    plane = math.prod(padded) // padded[plan.axis]
    n_slabs = 1 if plan.average_folds else len(model.checkpoints)
    slab = 0 if on_device else _HALF * window[plan.axis] * plane * (n_slabs * model.n_outputs + 1)
    predicting = slab + 4 * _HALF * plane * model.n_outputs + _SINGLE * math.prod(padded) * channels + 2 * n
    # The image as read, in single precision, its mask of non-zero voxels with what fills its holes, the result.
    reading = (2 * geometry.bytes_per_voxel + _SINGLE * (channels + 1)) * n
    cropping = (2 * _SINGLE * channels + 5) * n
    resampling = (_SINGLE * channels + 1) * n + 2 * _SINGLE * channels * math.prod(grid)
    preparing, writing = max(reading, cropping, resampling), 5 * n
    fixed = n_processes * _PROCESS_BYTES + _TEMPORARY_BYTES
    overlapping = predicting + plan.n_preparing * preparing + plan.n_writing * writing
    return fixed + (max(predicting, preparing, writing) if n_processes == 1 else overlapping)


def _network_bytes(predictor: Predictor) -> int:
    """Weights of the network, those of several folds in their files' memory, and a forward pass."""
    model, patch = predictor.model, predictor.model.configuration_manager.patch_size
    with torch.device("meta"):
        network = model.build_network()
    n_folds = len(model.checkpoints)
    n_logits = int(predictor.mirroring and bool(model.mirroring_axes)) + int(n_folds > 1)
    weights = sum(parameter.numel() for parameter in network.parameters()) * (1 if n_folds == 1 else 1 + n_folds)
    forward = _CONVOLUTION_FACTOR * peak_forward_bytes(network, (1, model.n_channels, *patch))
    return int(_SINGLE * (weights + n_logits * model.n_outputs * math.prod(patch)) + forward)


def parse_memory(text: str, option: str = "--memory") -> int:
    """Read a size such as ``8GB``, ``700M`` or ``0.5TB`` as bytes; 1 GB is 1024^3 bytes.

    Raises:
        UsageError: No such size; names the option that it was given with.

    >>> parse_memory("1.5GB") / 2**30
    1.5
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{option} {text} is no size: give a number with a unit, for example 8GB or 700MB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
