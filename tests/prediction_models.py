"""Model folders and images for prediction: narrow networks with random weights whose labels form regions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch

from plans import configuration
from stunet.network import STUNetSize
from stunet.planning.plans import rewrite_configuration

NARROW = STUNetSize("d111111w4", (1,) * 6, 4)


def write_model(
    folder: Path,
    *,
    num_classes: int,
    patch: Sequence[int] = (16, 16, 16),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    n_channels: int = 1,
    folds: Sequence[str] = ("0",),
    mirroring: Sequence[int] | None = None,
    size: STUNetSize = NARROW,
    n_strides: int = 2,
    change: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
    **plans_changes: Any,
) -> Path:
    """Write a model folder as nnU-Net's training does.

    Args:
        folder: The new folder.
        num_classes: Outputs, background included.
        patch: Voxels of the patch, three or two.
        spacing: mm, of the network's grid.
        n_channels: Channels of the images.
        folds: Names of the folds, each with weights of its own.
        mirroring: What the checkpoint allows.
        size: Size of the network.
        n_strides: How many of its stages halve the grid.
        change: Changes of the configuration.
        labels: In the place of ``structure_1``, ``structure_2``, …
        **plans_changes: Changes of the plans.
    """
    name = "3d_fullres" if len(patch) == 3 else "2d"
    strides = [[1] * len(patch)] + [[2] * len(patch)] * n_strides + [[1] * len(patch)] * (5 - n_strides)
    plans: dict[str, Any] = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {name: configuration(name, list(patch), strides, spacing=list(spacing))},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(c): {"max": 3000.0, "mean": 0.0, "median": 0.0, "min": -1000.0, "percentile_00_5": -1000.0,
                     "percentile_99_5": 1000.0, "std": 300.0}
            for c in range(n_channels)
        },
        **plans_changes,
    }  # fmt: skip
    content = plans["configurations"][name]
    content["normalization_schemes"] = ["CTNormalization"] * n_channels
    content["use_mask_for_norm"] = [False] * n_channels
    plans["configurations"][name] = rewrite_configuration(plans, name, size=size)
    plans["configurations"][name].update(change or {})
    dataset_json = {
        "channel_names": {str(c): f"channel {c}" for c in range(n_channels)},
        "labels": labels or {"background": 0, **{f"structure_{i}": i for i in range(1, num_classes)}},
        "numTraining": 10,
        "file_ending": ".nii.gz",
    }
    if labels and any(isinstance(values, list) for values in labels.values()):
        dataset_json["regions_class_order"] = list(range(1, num_classes + 1))
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    for i, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": weights(plans["configurations"][name], n_channels, num_classes, seed=i),
            "optimizer_state": None, "grad_scaler_state": None, "logging": {}, "_best_ema": None, "current_epoch": 1,
            "init_args": {"plans": plans, "configuration": name, "fold": i, "dataset_json": dataset_json},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": None if mirroring is None else tuple(mirroring),
        }  # fmt: skip
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def weights(content: dict[str, Any], n_channels: int, num_classes: int, seed: int) -> dict[str, torch.Tensor]:
    """Random weights, the same for the same seed, with which every structure wins somewhere."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(seed)
    architecture = content["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        n_channels, num_classes, deep_supervision=False,
    )  # fmt: skip
    network.eval()
    shape = content["patch_size"]
    patch = torch.from_numpy(smooth_image([1] * (3 - len(shape)) + list(shape), seed) / 300.0).float()
    patch = (patch if len(shape) == 3 else patch[0]).expand(1, n_channels, *shape)
    with torch.no_grad():
        head = network.decoder.seg_layers[-1]
        head.weight.mul_(3 / head.weight.std())
        logits = network(patch)[0].flatten(1)
        head.bias -= logits.mean(dim=1)  # else the class whose mean is largest wins nearly everywhere
    return deepcopy(network.state_dict())


def smooth_image(shape: Sequence[int], seed: int = 0, blobs: int = 6) -> npt.NDArray[np.int16]:
    """An image ``(Z, Y, X)`` in Hounsfield units: waves of several lengths, with noise."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    image = np.zeros(shape)
    for _ in range(blobs):
        frequency, phase = rng.uniform(-12, 12, 3), rng.uniform(0, 6.3)
        image += 150 * np.sin(sum(f * g for f, g in zip(frequency, grid, strict=True)) + phase)
    return (image + rng.normal(0, 5, shape)).astype(np.int16)


def write_image(
    path: Path, array: npt.NDArray[Any], spacing: Sequence[float] = (1.0, 1.0, 1.0), origin: Sequence[float] = (0, 0, 0)
) -> Path:
    """Write an array ``(Z, Y, X)``; spacing in the same order."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetOrigin([float(o) for o in origin])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path
