"""Model folders that nnU-Net v2 predicts with, made from weights that it did not train."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.errors import CheckpointError, PlansError, reading
from stunet.files import atomic_folder, file_sha256, refuse_existing, write_json
from stunet.labels import Vocabulary
from stunet.network import STUNetSize
from stunet.planning.rewrite import check_configuration, check_plans, resolve_configuration, rewrite_configuration
from stunet.planning.v1_plans import PRETRAINING, Preparation, read_v1_plans
from stunet.weights.convert import SourceWeights
from stunet.weights.read import MODEL_CARD

CONFIGURATION = "3d_fullres"
_CHECKPOINT = "fold_0/checkpoint_final.pth"
_RESAMPLING = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class ModelDescription:
    """What a model folder says beside the weights."""

    plans: dict[str, Any]
    configuration: str  # the one in the plans that the weights belong to
    dataset_json: dict[str, Any]
    mirroring_axes: tuple[int, ...] | None  # that prediction may mirror; None for no mirroring
    plans_source: str  # where they come from, human-readable
    label_source: str  # vocabulary or file that the names of the outputs come from


def describe_model(weights: SourceWeights, labels: Vocabulary | None) -> ModelDescription:
    """Make plans and dataset description for weights: their own where they bring them, else the pre-training preset's.

    ``labels`` names the outputs; it must be given where the weights bring no names.

    Raises:
        CheckpointError: Nothing says how to prepare the images.
        PlansError: The plans do not belong to the weights, or cannot be used.
    """
    if weights.init_args.get("plans") and weights.init_args.get("configuration"):
        return _from_nnunet_v2(weights, labels)
    architecture = weights.architecture
    n_channels = architecture.input_channels
    if weights.v1_plans:
        source = ", ".join(path.name for path in weights.pickles)
        if "plans_per_stage" not in weights.v1_plans:  # the published plans.pkl has none
            source += " and pre-training preset"
        n_classes = architecture.num_classes
        preparation = read_v1_plans(
            weights.v1_plans, weights.v1_init, input_channels=n_channels, num_classes=n_classes, source=source
        )
    elif architecture.n_axes != 3 or n_channels != 1:
        raise CheckpointError(
            f"{weights.path}: missing plans for a {architecture.n_axes}D network of {n_channels} channels, which the "
            f"pre-training preset does not fit: give the pickle too, for example {weights.path.name}.pkl"
        )
    else:
        source, preparation = "pre-training preset", PRETRAINING
    assert labels is not None
    return ModelDescription(
        plans=make_plans(preparation, architecture.size),
        configuration=CONFIGURATION,
        dataset_json={
            "channel_names": {str(c): name for c, name in enumerate(preparation.channel_names)},
            "labels": labels.as_dataset_labels(),
            "file_ending": ".nii.gz",
        },
        mirroring_axes=None,  # the published results of direct inference are without
        plans_source=source,
        label_source=labels.name,
    )


def make_plans(preparation: Preparation, size: STUNetSize) -> dict[str, Any]:
    """Make plans of nnU-Net v2 with one configuration, ``3d_fullres``."""
    name = f"STUNetPlans_{size.name}"
    statistics = {str(c): properties for c, properties in enumerate(preparation.intensity_properties)}
    plans = {
        "dataset_name": "Dataset000_STUNet",
        "plans_name": name,
        "original_median_spacing_after_transp": preparation.median_spacing,
        "original_median_shape_after_transp": [round(n) for n in preparation.median_shape],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": preparation.transpose_forward,
        "transpose_backward": preparation.transpose_backward,
        "configurations": {CONFIGURATION: configuration_for(preparation, f"{name}_{CONFIGURATION}")},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": statistics,
    }
    plans["configurations"] = {CONFIGURATION: rewrite_configuration(plans, CONFIGURATION, size=size)}
    return deepcopy(plans)


def configuration_for(preparation: Preparation, data_identifier: str) -> dict[str, Any]:
    """Make a configuration of nnU-Net v2's plans whose architecture has strides only."""
    resampling: dict[str, Any] = {}
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        kwargs = {"is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        resampling |= {f"resampling_fn_{kind}": _RESAMPLING, f"resampling_fn_{kind}_kwargs": kwargs}
    strides = {"strides": preparation.strides}  # the network's other arguments come from its size
    return {
        "data_identifier": data_identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": preparation.batch_size,
        "patch_size": preparation.patch_size,
        "median_image_size_in_voxels": preparation.median_shape,
        "spacing": preparation.spacing,
        "normalization_schemes": preparation.normalization_schemes,
        "use_mask_for_norm": preparation.use_mask_for_norm,
        **resampling,
        "architecture": {"network_class_name": "", "arch_kwargs": strides, "_kw_requires_import": []},
        "batch_dice": preparation.batch_dice,
    }


def _from_nnunet_v2(weights: SourceWeights, labels: Vocabulary | None) -> ModelDescription:
    plans, name = deepcopy(weights.init_args["plans"]), str(weights.init_args["configuration"])
    source, architecture = str(weights.path), weights.architecture
    with reading(source, "a checkpoint whose plans cannot be used", PlansError):
        check_plans(plans, source=source)
    dataset_json = deepcopy(weights.init_args.get("dataset_json"))
    if not isinstance(dataset_json, dict) or not {"channel_names", "labels"} <= set(dataset_json):
        raise PlansError(f"{source} has no dataset description in its init_args: take it as nnUNetv2_train wrote it")
    if labels is not None:
        dataset_json["labels"] = labels.as_dataset_labels()
        dataset_json.pop("regions_class_order", None)
    plans.pop("continue_training", None)  # nnU-Net passes it through the plans while it trains
    with reading(
        source,
        "a checkpoint whose plans or dataset description nnU-Net cannot use",
        PlansError,
        "take the one that nnUNetv2_train wrote",
    ):
        # Of foreign plans only what the weights need: others may name networks that are not installed, or worse.
        configuration = resolve_configuration(plans, name)
        configuration.pop("inherits_from", None)
        check_configuration(plans, configuration, len(dataset_json["channel_names"]))
        plans["configurations"] = {name: configuration}
        plans["configurations"][name] = rewrite_configuration(plans, name, size=architecture.size)
        manager = PlansManager(plans)
        channels = determine_num_input_channels(manager, manager.get_configuration(name), dataset_json)
        outputs = manager.get_label_manager(dataset_json).num_segmentation_heads
        if (channels, outputs) != (architecture.input_channels, architecture.num_classes):
            raise PlansError(
                f"{source} describes {channels} channels and {outputs} outputs, and its weights have "
                f"{architecture.input_channels} and {architecture.num_classes} outputs: take it as nnU-Net wrote it"
            )
    return ModelDescription(
        plans=plans,
        configuration=name,
        dataset_json=dataset_json,
        mirroring_axes=weights.mirroring_axes,
        plans_source="the checkpoint",
        label_source="the checkpoint" if labels is None else labels.name,
    )


def write_model_folder(
    weights: SourceWeights, description: ModelDescription, folder: str | os.PathLike[str], *, licence: str | None = None
) -> dict[str, Any]:
    """Write a model folder for ``nnUNetv2_predict_from_modelfolder`` atomically.

    Tensors go from the source file to the checkpoint without a copy of all of them in memory, unless their precision
    changes.

    Returns:
        Content of ``model_card.json``.

    Raises:
        CheckpointError: The folder cannot be written.
        UsageError: It exists.
    """
    folder = Path(folder)
    refuse_existing(folder)
    architecture = weights.architecture
    card: dict[str, Any] = {
        "sources": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in (weights.path, *weights.pickles)
        ],
        "format": weights.kind,
        "precision_in_source": weights.precision,
        "epochs": weights.epoch,
        "licence": licence,
        "size": architecture.size.name,
        "depth": list(architecture.size.depth),
        "width": architecture.size.width,
        "parameters": sum(tensor.numel() for tensor in weights.tensors.values()),
        "input_channels": architecture.input_channels,
        "outputs": architecture.num_classes,
        "plans_from": description.plans_source,
        "labels_from": description.label_source,
        "labels": {str(value): name for name, value in description.dataset_json["labels"].items()},
    }
    try:
        with atomic_folder(folder) as temporary:
            write_json(description.plans, temporary / "plans.json")
            write_json(description.dataset_json, temporary / "dataset.json")
            (temporary / "fold_0").mkdir()
            torch.save(_checkpoint(weights, description), temporary / _CHECKPOINT)
            card["files"] = {_CHECKPOINT: file_sha256(temporary / _CHECKPOINT)}  # compared whenever it is read
            write_json(card, temporary / MODEL_CARD)
    except (OSError, RuntimeError) as error:
        n_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
        raise CheckpointError(
            f"{folder} cannot be written ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]}): make "
            f"room for {n_bytes / 2**30:.1f} GB, or choose another place with -o; no unfinished folder was left"
        ) from error
    return card


def _checkpoint(weights: SourceWeights, description: ModelDescription) -> dict[str, Any]:
    return {
        "network_weights": weights.tensors,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": weights.epoch or 0,
        "init_args": {
            "plans": description.plans,
            "configuration": description.configuration,
            "fold": 0,
            "dataset_json": description.dataset_json,
        },
        "trainer_name": "nnUNetTrainer",  # its network comes from the plans, so prediction finds all it needs
        "inference_allowed_mirroring_axes": description.mirroring_axes,
    }
