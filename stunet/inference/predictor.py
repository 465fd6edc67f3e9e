"""Prediction of one image in bounded memory: logits plane by plane, and labels of them as they come."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from torch import Tensor, nn

from stunet.errors import CheckpointError, LabelError, UsageError
from stunet.inference import images
from stunet.inference.model import Model, load_model
from stunet.inference.outputs import restrict
from stunet.labels.labels import match_names

#: Elements that are added at a time on a CPU: PyTorch makes a copy in single precision of what it adds to.
_CHUNK_ELEMENTS = 2**18
_CPU = torch.device("cpu")
#: Elements that a tile of all classes has about where labels are resampled: as many as stay in a core's cache.
_TILE_ELEMENTS = 2**18

Labels = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
#: For output voxels: which ends of their cells they take values from, and with what weights.
AxisTaps = list[tuple[Any, Any]]
#: Values of the candidates at all corners of their cells, where those of the corner begin that each output voxel takes,
#: and its weights by row and by column.
Tap = tuple[Matrix, Indices, Matrix, Matrix]


@dataclass(frozen=True)
class MemoryPlan:
    """How a prediction uses memory.

    Attributes:
        axis: The axis along which logits are held a window's thickness at a time. Along the first, labels are nnU-Net's
            for the prepared image; along another, where two logits are equal to the last bit or so, either may win.
        average_folds: Whether the logits of several folds are averaged window by window, which takes as much memory as
            one fold and rounds in another order, instead of image by image as nnU-Net does.
        n_preparing: Processes that read and preprocess the next cases; 0 for none beside this one.
        n_writing: Processes that write the last cases.
    """

    axis: int = 0
    average_folds: bool = False
    n_preparing: int = 0
    n_writing: int = 0


@dataclass
class Predictor:
    """Predicts images with a model, as nnU-Net's ``nnUNetPredictor`` does."""

    model: Model
    device: torch.device = _CPU  # where the networks run
    step_size: float = 0.5  # distance between windows as a fraction of the patch
    mirroring: bool = True  # whether the axes that the checkpoint allows are mirrored
    results_on_device: bool = True  # whether logits are added up on the device too
    lowres: bool = False  # whether labels stay on the network's grid, which covers what preprocessing has not cropped
    plan: MemoryPlan = MemoryPlan()  # how memory is used

    @cached_property
    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """From a window to its logits, for each fold; all weights are read here, so that what is wrong shows."""
        axes, model = self.model.mirroring_axes if self.mirroring else None, self.model
        for fold in model.checkpoints:
            model.load_fold(fold).to(self.device)

        def predict(fold: str, window: Tensor) -> Tensor:
            return mirror_and_predict(model.load_fold(fold), axes, window.to(self.device))

        networks: list[Callable[[Tensor], Tensor]] = [partial(predict, fold) for fold in model.checkpoints]
        return [partial(average, networks)] if self.plan.average_folds else networks

    @cached_property
    def stock(self) -> nnUNetPredictor:
        """nnU-Net's own predictor, for models that cannot be predicted plane by plane."""
        model, weights = self.model, [self.model.weights(fold) for fold in self.model.checkpoints]
        predictor = nnUNetPredictor(self.step_size, True, self.mirroring, self.results_on_device, self.device)
        given = model.build_network(), model.plans_manager, model.configuration_manager, weights
        predictor.manual_initialization(*given, model.dataset_json, model.trainer_name, model.mirroring_axes or None)
        return predictor

    def predict_with_nnunet(
        self, case: images.Case, stem: str, *, save_probabilities: bool, previous_stage: str | None
    ) -> tuple[Labels, dict[str, Any]]:
        """Predict the files of a case with :attr:`stock`, which writes files that begin with ``stem``."""
        files: Any = [list(map(str, case.files))]
        self.stock.predict_from_files_sequential(
            files, [stem], save_probabilities, folder_with_segs_from_prev_stage=previous_stage
        )
        reader = self.model.plans_manager.image_reader_writer_class()
        labels, properties = reader.read_seg(stem + self.model.file_ending)
        return np.asarray(labels[0]).astype(self.label_type), properties

    @property
    def label_type(self) -> type[np.uint8 | np.uint16]:
        """The type that nnU-Net gives labels."""
        return np.uint8 if len(self.model.label_manager.foreground_labels) < 255 else np.uint16

    @property
    def why_stock(self) -> str | None:
        """Why the model's logits cannot be turned into labels plane by plane; None where they can."""
        configuration: Mapping[str, Any] = self.model.configuration_manager.configuration
        options = configuration["resampling_fn_probabilities_kwargs"]
        if self.model.label_manager.has_regions:
            return "it was trained on regions that overlap"
        if self.model.configuration_manager.previous_stage_name is not None:
            return "it is the second stage of a cascade"
        if not images.is_default_resampling(configuration, "probabilities"):
            return f"its plans resample probabilities with {configuration['resampling_fn_probabilities']}"
        if options.get("order", 3) != 1 or options.get("order_z", 0) not in (0, 1):
            return f"its plans resample probabilities with order {options.get('order', 3)}, not 1"
        return None if self.model.reads_volumes else "its images are no volumes"

    def predict(
        self, image: Floats, properties: Mapping[str, Any], on_window: Callable[[int], None] = lambda n_windows: None
    ) -> Labels:
        """Predict a prepared image ``(C, X, Y, Z)``, perhaps mapped from a file, and return labels on its own grid.

        The labels are those of nnU-Net's predictor, which holds all logits on both grids. With planes along the first
        axis even the order of its additions is kept; along another one the last bit of a logit may differ.
        ``on_window`` is called after each window with the number of all.
        """
        if self.results_on_device and self.device.type != "cpu":
            with suppress(torch.OutOfMemoryError):
                return self._predict(image, properties, on_window, self.device)
            torch.cuda.empty_cache()
        return self._predict(image, properties, on_window, _CPU)

    def _predict(
        self, image: Floats, properties: Mapping[str, Any], on_window: Callable[[int], None], device: torch.device
    ) -> Labels:
        plans, configuration, axis = self.model.plans_manager, self.model.configuration_manager, self.plan.axis
        patch, inner = tuple(configuration.patch_size), image.shape[1:]
        padded, (_, *kept) = pad_nd_image(image, patch, "constant", {"constant_values": 0}, return_slicer=True)
        planes = predict_planes(
            padded,
            self.networks,
            patch,
            num_classes=self.model.n_outputs,
            step_size=self.step_size,
            results_device=device,
            axis=axis,
            on_window=on_window,
        )
        spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        options = configuration.configuration["resampling_fn_probabilities_kwargs"]
        options = {key: value for key, value in options.items() if key not in ("is_seg", "order")}
        cropped = inner if self.lowres else properties["shape_after_cropping_and_before_resampling"]
        maps = axis_maps(inner, cropped, network_spacing(self.model, spacing), spacing, **options)
        labels: Labels = np.zeros(inner if self.lowres else properties["shape_before_cropping"], self.label_type)
        box = tuple(slice(*limits) for limits in properties["bbox_used_for_cropping"])
        inside = np.moveaxis(labels if self.lowres else labels[box], axis, 0)
        rows, columns = (i for i in range(3) if i != axis)
        resampler = LabelResampler((maps[axis], maps[rows], maps[columns]), labels.dtype)
        for index, plane in enumerate(planes):
            if kept[axis].start <= index < kept[axis].stop:
                for position, labelled in resampler.push(plane[:, kept[rows], kept[columns]].cpu().float().numpy()):
                    inside[position] = labelled
        restored: Labels = labels.transpose(plans.transpose_backward)
        return restored


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
        image: An array ``(Z, Y, X)`` or ``(C, Z, Y, X)``; a SimpleITK image, or of several channels a list of them or
            of files; or the path of an image, or the folder of a DICOM series.
        spacing: mm between the voxels of an array along ``(Z, Y, X)``.
        structures: Names of structures to keep; None for all.
        device: Where the network runs.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the model's mirroring axes are used.

    Returns:
        The label map: of an array another one ``(Z, Y, X)``, else a SimpleITK image.

    Raises:
        UsageError: An array without spacing.
        DatasetError: An image that cannot be read.
        LabelError: A structure that the model does not know.

    >>> labels = predict(model_folder, np.random.default_rng(0).normal(size=(20, 24, 18)), spacing=(3, 1.5, 1.5))
    >>> labels.shape, labels.dtype
    ((20, 24, 18), dtype('uint8'))
    """
    model = model if isinstance(model, Model) else load_model(model)
    kept, predictor = choose_structures(model, structures), Predictor(model, torch.device(device), step_size, mirroring)

    def label(voxels: npt.NDArray[Any], properties: dict[str, Any]) -> Labels:
        if predictor.why_stock:
            labels = predictor.stock.predict_single_npy_array(voxels.astype(np.float32), properties)
        else:
            labels = predictor.predict(*images.preprocess(model, [(voxels, properties)]))
        return labels if kept == model.structures else restrict(labels, kept)

    if isinstance(image, np.ndarray):
        if spacing is None or len(spacing) != 3:
            raise UsageError(f"spacing is {spacing}: give the mm between the voxels of the array along (Z, Y, X)")
        return label(image.reshape(-1, *image.shape[-3:]), {"spacing": [float(side) for side in spacing]})
    with TemporaryDirectory() as folder:
        if isinstance(image, str | os.PathLike):
            case, *others = images.find_cases(image, model)
            if others:
                raise UsageError(f"{os.fspath(image)} has {len(others) + 1} images: give one, or use predict_folder")
        else:
            files = []
            for channel, given in enumerate(image if isinstance(image, list | tuple) else [image]):
                files.append(Path(folder) / f"{channel}.nii" if isinstance(given, sitk.Image) else Path(given))
                if isinstance(given, sitk.Image):
                    sitk.WriteImage(given, str(files[-1]))
            case = images.Case("image", tuple(files))
        if model.reads_volumes:
            images.read_geometry(case, model.n_channels)
        case = images.as_nifti(case, model.file_ending, Path(folder))
        voxels, properties = images.read_images(case, model)
        written = str(Path(folder) / f"labels{model.file_ending}")
        model.plans_manager.image_reader_writer_class().write_seg(label(voxels, properties), written, properties)
        return sitk.ReadImage(written)


def choose_structures(model: Model, names: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Return label values of the model's structures, or of those with these names, in any usual spelling."""
    known = model.structures
    if names is None:
        return known
    matches = match_names(list(known), list(names))
    unknown = [name for name, match in matches.items() if match is None]
    if unknown or not names:
        said = ", ".join(unknown) or "nothing"
        raise LabelError(f"the model does not know {said}: give --structures some of {', '.join(known)}")
    return {name: values for name, values in known.items() if name in matches.values()}


def network_spacing(model: Model, spacing: Sequence[float]) -> list[float]:
    """Return the spacing of the network's grid; a 2D network keeps the image's along the first axis."""
    target = [float(side) for side in model.configuration_manager.spacing]
    return target if len(target) == len(spacing) else [float(spacing[0]), *target]


# Windows --------------------------------------------------------------------------------------------------------------
#
# Logits come plane by plane, of which no more are in memory than the sliding window is thick: windows are visited in
# the order of their position along one axis. Once all that reach a plane were seen, it is normalised and given away,
# and its memory serves the plane that is one window further on. Weights, positions and precision are nnU-Net's: with
# the first axis also the order of all additions is, and so is every bit of the result.


def predict_planes(
    image: Floats,
    networks: Sequence[Callable[[Tensor], Tensor]],
    patch_size: Sequence[int],
    *,
    num_classes: int,
    step_size: float = 0.5,
    results_device: torch.device = _CPU,
    axis: int = 0,
    on_window: Callable[[int], None] = lambda n_windows: None,
) -> Iterator[Tensor]:
    """Predict an image and yield its logits plane by plane.

    Args:
        image: ``(C, X, Y, Z)``, along no axis smaller than a window. May be mapped from a file.
        networks: One for each fold, from ``(1, C, X, Y, Z)`` to logits ``(1, K, X, Y, Z)``; their logits are averaged.
            All windows of one position along ``axis`` go through one before they go through the next.
        patch_size: Voxels of a window, ``(X, Y, Z)``; of a 2D network ``(Y, Z)``.
        num_classes: ``K``.
        step_size: Distance between windows as a fraction of the patch.
        results_device: Where their logits are added up.
        axis: The axis of the image along which planes come.
        on_window: Called after each window of each fold with the number of all.

    Yields:
        Logits of one plane, ``(K, Y, Z)`` of half precision where ``axis`` is the first. They are
        overwritten when the next plane is asked for.

    Raises:
        CheckpointError: A logit is too large for half precision, or no number at all.
    """
    flat = len(patch_size) == 2
    steps = compute_steps_for_sliding_window(image.shape[-len(patch_size) :], patch_size, step_size)
    gaussian = compute_gaussian(tuple(patch_size), sigma_scale=1 / 8, value_scaling_factor=10, device=results_device)
    if flat:  # a window is one plane
        steps, gaussian = [list(range(image.shape[1])), *steps], gaussian[None]
    n_windows = math.prod(map(len, steps)) * len(networks)
    steps.insert(0, steps.pop(axis))
    image, gaussian = np.moveaxis(image, axis + 1, 1), gaussian.movedim(axis, 0)
    (first, *others), thickness, shape = steps, len(gaussian), image.shape[2:]
    # One for each fold, since nnU-Net rounds each fold's logits to half precision.
    logits = [torch.zeros(num_classes, thickness, *shape, dtype=torch.half, device=results_device) for _ in networks]
    weights = torch.zeros(1, thickness, *shape, dtype=torch.half, device=results_device)
    for start, stop in zip(first, (*first[1:], image.shape[1]), strict=True):
        corners = product([start], *others)
        places = [tuple(slice(c, c + n) for c, n in zip(corner, gaussian.shape, strict=True)) for corner in corners]
        for network, sums in zip(networks, logits, strict=True):
            for place in places:
                window = np.moveaxis(image[:, place[0], place[1], place[2]], 1, axis + 1)
                tensor = torch.from_numpy(np.array(window, dtype=np.float32, order="C"))[None]
                prediction = network(tensor[:, :, 0] if flat else tensor)[0].to(results_device)
                prediction = (prediction[:, None] if flat else prediction).movedim(axis + 1, 1)
                _add(sums, prediction, gaussian, place)
                del prediction  # before there is the next one
                on_window(n_windows)
        for place in places:
            _add(weights, torch.ones_like(gaussian)[None], gaussian, place)
        for plane in range(start, stop):
            slot = plane % thickness
            yield _finish([sums[:, slot] for sums in logits], weights[0, slot])
            for sums in (*logits, weights):
                sums[:, slot].zero_()


def mirror_and_predict(network: nn.Module, axes: Sequence[int] | None, image: Tensor) -> Tensor:
    """Return the mean of a network's logits over all mirror images of its input, as nnU-Net's predictor has it."""
    subsets = [[a + 2 for a in subset] for n in range(len(axes or ())) for subset in combinations(axes or (), n + 1)]
    with torch.inference_mode(), torch.autocast("cuda") if image.device.type == "cuda" else nullcontext():
        prediction: Tensor = network(image)
        for flipped in subsets:
            other = network(image.flip(flipped))
            # Flipping all classes at once would be one more copy of all logits.
            at_once = 1 if image.device.type == "cpu" else other.shape[1]
            for i in range(0, other.shape[1], at_once):
                prediction[:, i : i + at_once] += other[:, i : i + at_once].flip(flipped)
            del other
        if subsets:
            prediction /= len(subsets) + 1
        return prediction


@torch.inference_mode()
def average(networks: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> Tensor:
    """Return the mean of the logits of several networks."""
    total = networks[0](image)
    for network in networks[1:]:
        total += network(image)
    return total.div_(len(networks))


@torch.inference_mode()
def _add(sums: Tensor, prediction: Tensor, gaussian: Tensor, place: tuple[slice, ...]) -> None:
    """Add a window's weighted logits to the slab, in which plane ``p`` lies at ``p`` modulo the slab's thickness."""
    (first, rows, columns), thickness, n_classes = place, len(gaussian), len(prediction)
    offset = first.start % thickness
    at_once = max(1, _CHUNK_ELEMENTS // gaussian.numel()) if sums.device.type == "cpu" else n_classes
    for i in range(0, n_classes, at_once):
        group = prediction[i : i + at_once]
        group *= gaussian
        sums[i : i + at_once, offset:, rows, columns] += group[:, : thickness - offset]
        sums[i : i + at_once, :offset, rows, columns] += group[:, thickness - offset :]


@torch.inference_mode()
def _finish(of_folds: Sequence[Tensor], weights: Tensor) -> Tensor:
    for logits in of_folds:
        torch.div(logits, weights, out=logits)
        if not torch.isfinite(logits).all():
            raise CheckpointError("logits beyond 65504, which half precision cannot hold: the training has diverged")
    mean, *more = of_folds
    for logits in more:
        mean += logits
    if more:
        mean /= len(of_folds)
    return mean


# Labels ---------------------------------------------------------------------------------------------------------------
#
# nnU-Net interpolates the logits of all classes linearly to the original grid, rounds them to half precision and takes
# the largest. The same labels are found here from planes as they come. Between neighbouring planes, rows and columns of
# the network's grid lies a cell of eight logits for each class. Interpolated values lie between the smallest and the
# largest of these, and rounding keeps their order, so a class can win somewhere in a cell only if its largest logit
# reaches the largest over all classes of the smallest logit. Nearly everywhere one class alone does, and nothing need
# be interpolated; where several do, they are interpolated and no others.


@dataclass(frozen=True)
class AxisMap:
    """Where the voxels of an output axis lie on an input axis.

    Attributes:
        lower: Index of the input voxel at or below each output voxel, ascending, of shape ``(n_out,)``. With the next
            voxel it bounds the cell, so before the first voxel it is the first, and behind the last the last but one.
        weight: How far each lies towards the next input voxel, from 0 to 1; None where each lies on an input voxel or
            takes the nearest one's value.
        ends: For each output voxel which ends of its cell the weights ``1 - weight`` and ``weight`` belong to,
            ``(2, n_out)``: 0 and 1, but the same end twice outside of the first and the last voxel.
    """

    lower: Indices
    weight: Matrix | None
    ends: Indices | None = None

    @property
    def linear(self) -> bool:
        """Whether values between two input voxels are interpolated."""
        return self.weight is not None


def axis_maps(
    shape: Sequence[int],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    order_z: int = 0,
    force_separate_z: bool | None = None,
    **threshold: float,
) -> tuple[AxisMap, AxisMap, AxisMap]:
    """Place voxels as ``resample_data_or_seg_to_shape`` of nnU-Net does when its order is 1.

    With ``order_z`` 0 an axis that is resampled separately takes the nearest plane, with 1 it is linear there too.
    """
    separate, axis = determine_do_sep_z_and_axis(force_separate_z, spacing, new_spacing, **threshold)
    nearest = [separate and order_z == 0 and axis == i for i in range(3)]
    x, y, z = (_axis_map(*each) for each in zip(shape, new_shape, nearest, strict=True))
    return x, y, z


def _axis_map(n_in: int, n_out: int, nearest: bool) -> AxisMap:
    if n_in == n_out:
        return AxisMap(np.arange(n_out), None)
    # The borders of the first and last voxel fall together, not their centres.
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    if nearest or n_in == 1:
        return AxisMap(np.floor(position + 0.5).astype(np.intp).clip(0, n_in - 1), None)
    below = np.floor(position).astype(np.intp)
    lower = below.clip(0, n_in - 2)
    ends = np.stack([below, below + 1]).clip(0, n_in - 1) - lower
    return AxisMap(lower, 1 - (1 - (position - below)), ends)  # to the last bit as SciPy's splines have it


class LabelResampler:
    """Takes planes of logits in their order and gives planes of labels as soon as they are certain.

    Args:
        maps: How output lies on input, for the axis along which planes come and the two axes of a plane.
        dtype: Type of the labels.
    """

    def __init__(self, maps: tuple[AxisMap, AxisMap, AxisMap], dtype: npt.DTypeLike = np.uint8) -> None:
        self._planes, self._rows, self._columns = maps
        self._dtype, self._next_plane = np.dtype(dtype), 0
        self._kept: list[Floats] = []  # the plane before, where values between two are interpolated

    def push(self, logits: npt.NDArray[np.float16 | np.float32]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Take the next plane.

        Args:
            logits: Of shape ``(K, Y, Z)`` for ``K`` classes, of numbers that half precision holds; if they are float32
                already, not to be changed before the next plane is given.

        Yields:
            Index of an output plane and its labels ``(Y, Z)`` on the output grid, in order.
        """
        plane = np.ascontiguousarray(logits, np.float32)  # which processors compare many times faster than halves
        inputs, self._kept = [*self._kept, plane], [plane] if self._planes.linear else []
        index, self._next_plane = self._next_plane - self._planes.linear, self._next_plane + 1
        wanted = _span(self._planes.lower, index, index + 1)  # between two input planes, or on one
        of_outputs = [_taps(self._planes, i) for i in wanted]
        labels = np.empty((len(wanted), len(self._rows.lower), len(self._columns.lower)), self._dtype)
        n_classes, height, width = plane.shape
        n_rows, at_once = height - self._rows.linear, max(1, _TILE_ELEMENTS // (n_classes * width))
        for first in range(0, n_rows if wanted else 0, at_once):
            self._label_rows(inputs, first, min(first + at_once, n_rows), of_outputs, labels)
        yield from zip(wanted, labels, strict=True)

    def _label_rows(
        self, inputs: Sequence[Floats], first: int, last: int, of_outputs: Sequence[AxisTaps], labels: npt.NDArray[Any]
    ) -> None:
        """Fill the output rows of the cells from row ``first`` to before ``last``."""
        rows, columns = self._rows, self._columns
        if not (wanted := _span(rows.lower, first, last)):
            return
        parts = [plane[:, first : last + rows.linear] for plane in inputs]
        smallest, largest = reduce(np.minimum, parts), reduce(np.maximum, parts)
        if rows.linear:
            smallest = np.minimum(smallest[:, :-1], smallest[:, 1:])
            largest = np.maximum(largest[:, :-1], largest[:, 1:])
        if columns.linear:
            smallest = np.minimum(smallest[:, :, :-1], smallest[:, :, 1:])
            largest = np.maximum(largest[:, :, :-1], largest[:, :, 1:])
        possible = largest >= smallest.max(axis=0)
        _, n_rows, n_columns = possible.shape
        classes, cells = np.divmod(np.flatnonzero(possible), n_rows * n_columns)
        winner = np.zeros(n_rows * n_columns, np.intp)
        winner[cells] = classes  # the only class that is possible, where there is but one
        count = np.bincount(cells, minlength=n_rows * n_columns)
        here = slice(wanted.start, wanted.stop)
        cells_here = (rows.lower[here, None] - first) * n_columns + columns.lower
        labels[:, here] = winner[cells_here]
        open_rows, open_columns = np.nonzero(count[cells_here] > 1)
        if not len(open_rows):
            return
        several = count[cells] > 1
        by_cell = np.argsort(cells[several], kind="stable")  # ascending classes in each cell
        classes, cells = classes[several][by_cell], cells[several][by_cell]
        # Logits (corners, candidates) of each candidate at the corners of its cell.
        _, height, width = inputs[0].shape
        row, column = np.divmod(cells, n_columns)
        index = (classes * height + first + row) * width + column
        steps = [y * width + x for y in range(1 + rows.linear) for x in range(1 + columns.linear)]
        corners = np.stack([index + step for step in steps])
        planes = [plane.reshape(-1)[corners].astype(np.float64) for plane in inputs]
        in_plane = list(product(_taps(rows, open_rows + here.start), _taps(columns, open_columns)))
        open_cells = cells_here[open_rows, open_columns]
        starts, counts = np.searchsorted(cells, open_cells), count[open_cells]
        for out, in_depth in zip(labels[:, here], of_outputs, strict=True):
            taps: list[Tap] = []
            for plane, weight in in_depth:
                values = (planes[plane] * weight).reshape(-1)
                for (lower, by_row), (left, by_column) in in_plane:
                    corner = lower * (1 + columns.linear) + left
                    taps.append((values, corner * len(cells), by_row, by_column))
            out[open_rows, open_columns] = classes[_largest(starts, counts, taps)]


def _largest(starts: Indices, counts: Indices, taps: Sequence[Tap]) -> Indices:
    """The candidate with the largest value at each output voxel, the first of several that are equal."""
    best, open_voxels = _interpolate(starts, taps), np.arange(len(starts))
    winner: Indices = starts.copy()
    for i in range(1, int(counts.max())):
        open_voxels = open_voxels[counts[open_voxels] > i]
        candidate = starts[open_voxels] + i
        value = _interpolate(candidate, taps, open_voxels)
        better = value > best[open_voxels]
        winners = open_voxels[better]
        best[winners], winner[winners] = value[better], candidate[better]
    return winner


def _interpolate(
    candidates: Indices, taps: Sequence[Tap], voxels: Indices | slice = slice(None)
) -> npt.NDArray[np.float16]:
    """Values of candidates at output voxels, multiplied and added in SciPy's order and rounded to half precision.

    Often the exact value lies in the middle between two numbers of half precision, and the last bit decides.
    """
    total = np.zeros(len(candidates))
    for values, offset, by_row, by_column in taps:
        value = values[candidates + offset[voxels]]
        value *= by_row[voxels]
        value *= by_column[voxels]
        total += value
    return total.astype(np.float16)


def _taps(axis: AxisMap, index: Any) -> AxisTaps:
    if axis.weight is None or axis.ends is None:
        return [(np.zeros_like(index), np.ones(np.shape(index)))]
    weight = axis.weight[index]
    return [(axis.ends[0][index], 1 - weight), (axis.ends[1][index], weight)]


def _span(ascending: Indices, first: int, stop: int) -> range:
    """Indices of the entries from ``first`` to before ``stop``."""
    return range(*(int(i) for i in np.searchsorted(ascending, (first, stop))))
