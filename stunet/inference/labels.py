"""From a prepared image to labels on the grid of the original one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from stunet.inference.preparation import spacing_of_network
from stunet.inference.resampling import LabelResampler, axis_maps
from stunet.inference.windows import predict_planes, window_grid

__all__ = ["VOLUME_READERS", "label_type", "predict_labels", "resampling_options", "why_not_streamed"]

_DEFAULT_RESAMPLING = "resample_data_or_seg_to_shape"
_KNOWN_OPTIONS = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
#: Readers that give volumes, one channel a file.
VOLUME_READERS = {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"}


def why_not_streamed(plans: Any, configuration: Any, label_manager: Any) -> str | None:
    """Why a model's logits cannot be turned into labels plane by plane, in words; None where they can."""
    name = configuration.configuration["resampling_fn_probabilities"]
    options: Mapping[str, Any] = configuration.configuration["resampling_fn_probabilities_kwargs"]
    if label_manager.has_regions:
        return "it was trained on regions that overlap"
    if configuration.previous_stage_name is not None:
        return "it is the second stage of a cascade"
    if name != _DEFAULT_RESAMPLING or not set(options) <= _KNOWN_OPTIONS or options.get("is_seg", False):
        return f"its plans resample probabilities with {name}({', '.join(options)})"
    if options.get("order", 3) != 1 or options.get("order_z", 0) not in (0, 1):
        return f"its plans resample probabilities with order {options.get('order', 3)}, not 1"
    if plans.image_reader_writer_class.__name__ not in VOLUME_READERS:
        return f"its images are read by {plans.image_reader_writer_class.__name__}"
    return None


def resampling_options(configuration: Any) -> dict[str, Any]:
    """The options of the plans' resampling of probabilities that :func:`axis_maps` takes."""
    options = configuration.configuration["resampling_fn_probabilities_kwargs"]
    return {key: value for key, value in options.items() if key not in ("is_seg", "order")}


def label_type(label_manager: Any) -> np.dtype[Any]:
    """The type that nnU-Net gives labels."""
    return np.dtype(np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16)


def predict_labels(
    image: npt.NDArray[np.float32],
    properties: Mapping[str, Any],
    networks: Sequence[Callable[[Tensor], Tensor]],
    *,
    plans: Any,
    configuration: Any,
    label_manager: Any,
    step_size: float = 0.5,
    axis: int = 0,
    device: torch.device,
    results_device: torch.device | None = None,
    lowres: bool = False,
    on_window: Callable[[int], None] = lambda n_windows: None,
) -> npt.NDArray[Any]:
    """Predict a prepared image.

    The labels are those of nnU-Net's predictor, which holds all logits on both grids. With planes along the first axis
    even the order of its additions is kept; along another one the last bit of a logit may differ.

    Args:
        image: ``(C, X, Y, Z)`` on the network's grid. May be mapped from a file.
        properties: What nnU-Net's preprocessing noted of the original grid.
        networks: One for each fold.
        plans: nnU-Net's ``PlansManager``.
        configuration: nnU-Net's ``ConfigurationManager``.
        label_manager: nnU-Net's ``LabelManager``.
        step_size: Distance between windows as a fraction of the patch.
        axis: The axis along which logits are held a window's thickness at a time.
        device: Where the networks are.
        results_device: Where logits are added up; by default there too.
        lowres: Whether the labels stay on the network's grid, which covers what preprocessing has not cropped.
        on_window: Called after each window with the number of all.

    Returns:
        Labels on the original grid, or the network's, axes in the order of the image's reader.
    """
    padded, uncropped = pad_nd_image(
        image, tuple(configuration.patch_size), "constant", {"constant_values": 0}, return_slicer=True
    )
    kept = uncropped[1:]
    grid = window_grid(padded.shape[1:], configuration.patch_size, step_size)
    planes = predict_planes(
        padded,
        networks,
        grid,
        num_classes=label_manager.num_segmentation_heads,
        device=device,
        results_device=results_device or device,
        axis=axis,
        on_window=lambda: on_window(grid.n_windows),
    )
    spacing = [properties["spacing"][i] for i in plans.transpose_forward]
    maps = axis_maps(
        image.shape[1:],
        image.shape[1:] if lowres else properties["shape_after_cropping_and_before_resampling"],
        spacing_of_network(configuration, spacing),
        spacing,
        **resampling_options(configuration),
    )
    shape = image.shape[1:] if lowres else properties["shape_before_cropping"]
    labels: npt.NDArray[Any] = np.zeros(shape, label_type(label_manager))
    inside = labels if lowres else labels[tuple(slice(*limits) for limits in properties["bbox_used_for_cropping"])]
    others = [i for i in range(3) if i != axis]
    resampler = LabelResampler((maps[axis], maps[others[0]], maps[others[1]]), labels.dtype)
    in_order = np.moveaxis(inside, axis, 0)
    in_plane = (slice(None), kept[others[0]], kept[others[1]])
    for index, plane in enumerate(planes):
        if kept[axis].start <= index < kept[axis].stop:
            logits = plane[in_plane].cpu().numpy()
            for position, labelled in resampler.push(logits):
                in_order[position] = labelled
    restored: npt.NDArray[Any] = labels.transpose(plans.transpose_backward)
    return restored
