"""Prediction of one image in bounded memory: logits plane by plane, and labels of them as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
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

from stunet.errors import LabelError, UsageError
from stunet.inference.images import Case, as_nifti, preprocess, read_geometry, read_images
from stunet.inference.model import Model, load_model
from stunet.inference.outputs import restrict
from stunet.inference.resampling import LabelResampler, axis_maps, is_default_resampling
from stunet.inference.windows import average, mirror_and_predict, predict_planes, window_grid
from stunet.labels import match_names

#: Readers that give volumes, one channel a file.
VOLUME_READERS = {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"}
_CPU = torch.device("cpu")

Labels = npt.NDArray[Any]


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
    """Predicts images with a model, as nnU-Net's ``nnUNetPredictor`` does.

    Attributes:
        model: The model.
        device: Where the networks run.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the axes that the checkpoint allows are mirrored.
        results_on_device: Whether logits are added up on the device too.
        lowres: Whether labels stay on the network's grid, which covers what preprocessing has not cropped.
        plan: How memory is used.
    """

    model: Model
    device: torch.device = _CPU
    step_size: float = 0.5
    mirroring: bool = True
    results_on_device: bool = True
    lowres: bool = False
    plan: MemoryPlan = MemoryPlan()

    @cached_property
    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """From a window to its logits, for each fold."""
        axes = self.model.mirroring_axes if self.mirroring else None
        networks = [mirror_and_predict(network.to(self.device), axes) for network in self.model.networks]
        return [average(networks)] if self.plan.average_folds else networks

    @cached_property
    def stock(self) -> nnUNetPredictor:
        """nnU-Net's own predictor, for models that cannot be predicted plane by plane."""
        model, weights = self.model, [self.model.weights(fold) for fold in self.model.checkpoints]
        predictor = nnUNetPredictor(
            tile_step_size=self.step_size,
            use_mirroring=self.mirroring,
            perform_everything_on_device=self.results_on_device,
            device=self.device,
        )
        managers, axes = (model.plans_manager, model.configuration_manager), model.mirroring_axes or None
        predictor.manual_initialization(
            model.build_network(), *managers, weights, model.dataset_json, model.trainer_name, axes
        )
        return predictor

    @property
    def label_type(self) -> type[np.uint8 | np.uint16]:
        """The type that nnU-Net gives labels."""
        return np.uint8 if len(self.model.label_manager.foreground_labels) < 255 else np.uint16

    @property
    def why_stock(self) -> str | None:
        """Why the model's logits cannot be turned into labels plane by plane; None where they can."""
        configuration: Mapping[str, Any] = self.model.configuration_manager.configuration
        options = configuration["resampling_fn_probabilities_kwargs"]
        reader = self.model.plans_manager.image_reader_writer_class.__name__
        if self.model.label_manager.has_regions:
            return "it was trained on regions that overlap"
        if self.model.configuration_manager.previous_stage_name is not None:
            return "it is the second stage of a cascade"
        if not is_default_resampling(configuration, "probabilities"):
            return f"its plans resample probabilities with {configuration['resampling_fn_probabilities']}"
        if options.get("order", 3) != 1 or options.get("order_z", 0) not in (0, 1):
            return f"its plans resample probabilities with order {options.get('order', 3)}, not 1"
        return None if reader in VOLUME_READERS else f"its images are read by {reader}"

    def predict(
        self,
        image: npt.NDArray[np.float32],
        properties: Mapping[str, Any],
        on_window: Callable[[int], None] = lambda n_windows: None,
    ) -> Labels:
        """Predict a prepared image ``(C, X, Y, Z)``, which may be mapped from a file; return labels on the original grid.

        The labels are those of nnU-Net's predictor, which holds all logits on both grids. With planes along the first axis
        even the order of its additions is kept; along another one the last bit of a logit may differ. ``on_window`` is
        called after each window with the number of all.
        """
        run = partial(self._predict, image, properties, on_window)
        if self.results_on_device and self.device.type != "cpu":
            with suppress(torch.OutOfMemoryError):
                return run(self.device)
            torch.cuda.empty_cache()
        return run(_CPU)

    def _predict(
        self,
        image: npt.NDArray[np.float32],
        properties: Mapping[str, Any],
        on_window: Callable[[int], None],
        results_device: torch.device,
    ) -> Labels:
        plans, configuration, axis = self.model.plans_manager, self.model.configuration_manager, self.plan.axis
        patch, inner = tuple(configuration.patch_size), image.shape[1:]
        padded, (_, *kept) = pad_nd_image(image, patch, "constant", {"constant_values": 0}, return_slicer=True)
        grid = window_grid(padded.shape[1:], patch, self.step_size)
        planes = predict_planes(
            padded,
            self.networks,
            grid,
            num_classes=self.model.n_outputs,
            device=self.device,
            results_device=results_device,
            axis=axis,
            on_window=lambda: on_window(grid.n_windows),
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
                for position, labelled in resampler.push(plane[:, kept[rows], kept[columns]].cpu().numpy()):
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
            labels = predictor.predict(*preprocess(model, [(voxels, properties)]))
        return restrict(labels, kept)

    if isinstance(image, np.ndarray):
        if spacing is None or len(spacing) != 3:
            raise UsageError(f"spacing is {spacing}: give the mm between the voxels of the array along (Z, Y, X)")
        return label(image.reshape(-1, *image.shape[-3:]), {"spacing": [float(side) for side in spacing]})
    with TemporaryDirectory() as folder:
        files = []
        for channel, given in enumerate(image if isinstance(image, list | tuple) else [image]):
            files.append(Path(folder) / f"{channel}.nii" if isinstance(given, sitk.Image) else Path(given))
            if isinstance(given, sitk.Image):
                sitk.WriteImage(given, str(files[-1]))
        case = as_nifti(Case("image", tuple(files)), model.file_ending, Path(folder))
        read_geometry(case, model.n_channels)
        voxels, properties = read_images(case, model)
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
