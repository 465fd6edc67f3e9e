"""Model folders that nnU-Net v2 predicts with, made from weights that it did not train."""

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.errors import CheckpointError, PlansError, reading
from stunet.files import atomic_folder, file_sha256, refuse_existing, write_json
from stunet.labels.labels import Vocabulary
from stunet.network import STUNetSize
from stunet.planning import plans as planning
from stunet.weights.convert import SourceWeights
from stunet.weights.read import MODEL_CARD

_CHECKPOINT = "fold_0/checkpoint_final.pth"
_UNUSABLE = "plans of nnU-Net v1 that cannot be used; the pickle published with the weights can, or none (the preset)"
_SCHEMES = {"nonCT": "ZScoreNormalization", "CT": "CTNormalization", "noNorm": "NoNormalization"}
_STATISTICS = {
    "mean": "mean", "median": "median", "std": "sd", "min": "mn", "max": "mx",
    "percentile_00_5": "percentile_00_5", "percentile_99_5": "percentile_99_5",
}  # fmt: skip


def describe_model(weights: SourceWeights, labels: Vocabulary | None) -> tuple[dict[str, Any], str]:
    """Make plans and dataset description for weights: their own where they bring them, else the pre-training preset's.

    ``labels`` names the outputs; it must be given where the weights bring no names.

    Returns:
        ``init_args`` of nnU-Net's checkpoints, and where the plans come from, human-readable.

    Raises:
        CheckpointError: Nothing says how to prepare the images.
        PlansError: The plans do not belong to the weights, or cannot be used.
    """
    if weights.init_args.get("plans") and weights.init_args.get("configuration"):
        return _from_nnunet_v2(weights, labels), "the checkpoint"
    architecture = weights.architecture
    n_channels, n_classes = architecture.input_channels, architecture.num_classes
    if weights.v1_plans:
        # The published plans.pkl has no stages.
        preset = "" if "plans_per_stage" in weights.v1_plans else " and pre-training preset"
        source = ", ".join(path.name for path in weights.pickles) + preset
        preparation = read_v1_plans(
            weights.v1_plans, weights.v1_init, input_channels=n_channels, num_classes=n_classes, source=source
        )
    elif architecture.n_axes != 3 or n_channels != 1:
        got = f"{weights.path}: missing plans for a {architecture.n_axes}D network of {n_channels} channels"
        raise CheckpointError(f"{got}: give its pickle too, for example {weights.path.name}.pkl")
    else:
        source, preparation = "pre-training preset", planning.PRETRAINING
    assert labels is not None
    channel_names = {str(c): name for c, name in enumerate(preparation.channel_names)}
    dataset_json = {"channel_names": channel_names, "labels": labels.as_dataset_labels(), "file_ending": ".nii.gz"}
    plans = make_plans(preparation, architecture.size)
    return {"plans": plans, "configuration": planning.CONFIGURATION, "fold": 0, "dataset_json": dataset_json}, source


def make_plans(preparation: planning.Preparation, size: STUNetSize) -> dict[str, Any]:
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
        "configurations": preparation.as_configurations(name),
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": statistics,
    }
    name = planning.CONFIGURATION
    plans["configurations"] = {name: planning.rewrite_configuration(plans, name, size=size)}
    return deepcopy(plans)


def _from_nnunet_v2(weights: SourceWeights, labels: Vocabulary | None) -> dict[str, Any]:
    plans, name = deepcopy(weights.init_args["plans"]), str(weights.init_args["configuration"])
    source, architecture = str(weights.path), weights.architecture
    dataset_json = deepcopy(weights.init_args.get("dataset_json"))
    if not isinstance(dataset_json, dict) or not {"channel_names", "labels"} <= set(dataset_json):
        raise PlansError(f"{source} has no dataset description in its init_args: take it as nnUNetv2_train wrote it")
    if labels is not None:
        dataset_json["labels"] = labels.as_dataset_labels()
        dataset_json.pop("regions_class_order", None)
    problem = "a checkpoint whose plans or dataset description nnU-Net cannot use"
    with reading(source, problem, PlansError, "take the one that nnUNetv2_train wrote"):
        planning.check_plans(plans, source=source)
        plans.pop("continue_training", None)  # nnU-Net passes it through the plans while it trains
        # Of foreign plans only what the weights need: others may name networks that are not installed, or worse.
        configuration = planning.resolve_configuration(plans, name)
        configuration.pop("inherits_from", None)
        planning.check_configuration(plans, configuration, len(dataset_json["channel_names"]))
        plans["configurations"] = {name: configuration}
        plans["configurations"][name] = planning.rewrite_configuration(plans, name, size=architecture.size)
        manager = PlansManager(plans)
        channels = determine_num_input_channels(manager, manager.get_configuration(name), dataset_json)
        outputs = manager.get_label_manager(dataset_json).num_segmentation_heads
        if (channels, outputs) != (architecture.input_channels, architecture.num_classes):
            theirs = f"{architecture.input_channels} channels and {architecture.num_classes} outputs"
            got = f"{source} describes {channels} channels and {outputs} outputs, and its weights have {theirs}"
            raise PlansError(f"{got}: take it as nnU-Net wrote it")
    return {"plans": plans, "configuration": name, "fold": 0, "dataset_json": dataset_json}


def write_model_folder(
    weights: SourceWeights, labels: Vocabulary | None, folder: str | os.PathLike[str], *, licence: str | None = None
) -> dict[str, Any]:
    """Write a model folder for ``nnUNetv2_predict_from_modelfolder`` atomically; labels as in :func:`describe_model`.

    Tensors go from the source file to the checkpoint without a copy of all of them in memory, unless their precision
    changes.

    Returns:
        Content of ``model_card.json``.

    Raises:
        CheckpointError: The folder cannot be written, or as in :func:`describe_model`.
        PlansError: As there.
        UsageError: It exists.
    """
    folder = Path(folder)
    refuse_existing(folder)
    architecture, (init_args, plans_from) = weights.architecture, describe_model(weights, labels)
    dataset_json = init_args["dataset_json"]
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
        "plans_from": plans_from,
        "labels_from": "the checkpoint" if labels is None else labels.name,
        "labels": {str(value): name for name, value in dataset_json["labels"].items()},
    }
    try:
        with atomic_folder(folder) as temporary:
            write_json(init_args["plans"], temporary / "plans.json")
            write_json(dataset_json, temporary / "dataset.json")
            (temporary / "fold_0").mkdir()
            torch.save(_checkpoint(weights, init_args), temporary / _CHECKPOINT)
            card["files"] = {_CHECKPOINT: file_sha256(temporary / _CHECKPOINT)}  # compared whenever it is read
            write_json(card, temporary / MODEL_CARD)
    except (OSError, RuntimeError) as error:
        size = sum(tensor.nbytes for tensor in weights.tensors.values()) / 2**30
        got = f"{folder} cannot be written ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})"
        raise CheckpointError(f"{got}: make room for {size:.1f} GB, or choose another place with -o") from error
    return card


def _checkpoint(weights: SourceWeights, init_args: dict[str, Any]) -> dict[str, Any]:
    return {
        "network_weights": weights.tensors,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": weights.epoch or 0,
        "init_args": init_args,
        "trainer_name": "nnUNetTrainer",  # its network comes from the plans, so prediction finds all it needs
        "inference_allowed_mirroring_axes": weights.mirroring_axes,  # none of the published ones, as their results
    }


def read_v1_plans(
    plans: Mapping[str, Any], init: Sequence[Any], *, input_channels: int, num_classes: int, source: str
) -> planning.Preparation:
    """Read what plans of nnU-Net v1 say about preparation.

    Where they name no stage, which holds for the published ``plans.pkl``, spacing, patch and strides are those of
    :data:`PRETRAINING`.

    Raises:
        PlansError: Plans of other weights, a normalization that is unknown, or clipping without statistics.
    """
    with reading(source, _UNUSABLE, PlansError):
        # The others resample or normalize otherwise, which nnU-Net v2's default preprocessor would not repeat.
        if (preprocessor := plans.get("preprocessor_name")) not in (None, "GenericPreprocessor"):
            raise ValueError(f"preprocessor_name is {str(preprocessor)[:60]}; GenericPreprocessor can be converted")
        # v1 does not count the background.
        for key, actual in (("num_modalities", input_channels), ("num_classes", num_classes - 1)):
            if plans.get(key, actual) != actual:
                raise ValueError(f"{key} is {str(plans[key])[:40]} instead of {actual}, as the weights have")
        channels = range(input_channels)
        names = [str(_channel(plans["normalization_schemes"], c, "normalization_schemes")) for c in channels]
        if "CT2" in names:
            raise ValueError(f"normalization_schemes: CT2, which nnU-Net v2 has not, instead of {', '.join(_SCHEMES)}")
        modalities = plans.get("modalities") or dict(enumerate(names))
        masks = plans.get("use_mask_for_norm") or {}
        forward, backward = (
            _numbers(plans.get(key, [0, 1, 2]), int, key, at_least=0)
            for key in ("transpose_forward", "transpose_backward")
        )
        if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward] != [0, 1, 2]:
            raise ValueError(f"transposes {forward} and {backward} instead of an order and its inverse")
        return replace(
            planning.PRETRAINING,
            **_stage(plans, init),
            channel_names=[str(_channel(modalities, c, "modalities")) for c in channels],
            # v1 treats every other modality as it does MR.
            normalization_schemes=[_SCHEMES.get(name, "ZScoreNormalization") for name in names],
            use_mask_for_norm=[bool(_channel(masks, c, "use_mask_for_norm", default=False)) for c in channels],
            intensity_properties=[_statistics(plans, c, name) for c, name in enumerate(names)],
            transpose_forward=forward,
            transpose_backward=backward,
        )


def _stage(plans: Mapping[str, Any], init: Sequence[Any]) -> dict[str, Any]:
    stages = plans.get("plans_per_stage")
    dice = init[4] if len(init) > 4 and isinstance(init[4], bool) else planning.PRETRAINING.batch_dice
    if not stages:
        return {"batch_dice": dice}
    stage = stages[init[5] if len(init) > 5 and isinstance(init[5], int) and init[5] in stages else max(stages)]
    spacing = _numbers(stage["current_spacing"], float, "current_spacing")
    patch = _numbers(stage["patch_size"], int, "patch_size")
    pools = [_numbers(pool, int, "pool_op_kernel_sizes") for pool in stage["pool_op_kernel_sizes"]]
    return {
        "spacing": spacing,
        "patch_size": patch,
        "batch_size": _numbers([stage["batch_size"]] * 3, int, "batch_size")[0],
        "batch_dice": dice,
        "median_shape": _numbers(stage.get("median_patient_size_in_voxels", patch), float, "median size"),
        "median_spacing": _numbers(stage.get("original_spacing", spacing), float, "original_spacing"),
        "strides": planning.fit_strides([[1, 1, 1], *pools]),
    }


def _channel(values: Any, channel: int, key: str, *, default: Any = None) -> Any:
    listed = values if isinstance(values, Mapping) else dict(enumerate(values))
    if (value := listed.get(channel, default)) is None:
        raise ValueError(f"{key} without a value for channel {channel}")
    return value


def _statistics(plans: Mapping[str, Any], channel: int, scheme: str) -> dict[str, float]:
    properties = (plans.get("dataset_properties") or {}).get("intensityproperties")
    found = _channel(properties, channel, "intensityproperties") if properties else {}
    statistics = {ours: float(found[theirs]) for ours, theirs in _STATISTICS.items() if theirs in found}
    needed = ("mean", "std", "percentile_00_5", "percentile_99_5")
    if scheme == "CT" and (missing := [_STATISTICS[name] for name in needed if name not in statistics]):
        raise ValueError(f"intensityproperties: no {', '.join(missing)}, which CT clipping needs")
    if not all(map(math.isfinite, statistics.values())):
        raise ValueError(f"intensityproperties {statistics} instead of finite numbers")
    return statistics


def _numbers(values: Any, kind: type, key: str, *, at_least: float = 1e-6) -> list[Any]:
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if len(listed) != 3 or not all(at_least <= float(value) < math.inf for value in listed):
        raise ValueError(f"{key} {str(values)[:100]} instead of three numbers{' above 0' if at_least else ''}")
    return [kind(value) for value in listed]
