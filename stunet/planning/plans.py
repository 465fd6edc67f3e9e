"""Plans files: reading, writing, planning with nnU-Net, presets, and plans that start from weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from stunet.environment import find_plans, nnunet_folder, require_plans
from stunet.errors import DatasetError, PlansError, reading
from stunet.files import write_json
from stunet.labels.labels import Labels
from stunet.planning.rewrite import check_plans, has_own_architecture, resolve_configuration
from stunet.settings import SETTINGS, SETTINGS_KEY, Strategy
from stunet.weights.convert import SourceWeights
from stunet.weights.transfer import TransferReport, transfer_weights

#: The one configuration of plans that nnU-Net has not made.
CONFIGURATION = "3d_fullres"
_RESAMPLING = "resample_data_or_seg_to_shape"
#: nnU-Net's planners by the plans identifier that they write.
_PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
#: The published learning rate for fine-tuning, all layers alike (arXiv 2304.06716).
_FINE_TUNING_LR = 1e-3


def load_plans(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a plans file of nnU-Net v2.

    Raises:
        PlansError: Missing, not JSON, of nnU-Net v1, or no plans.
    """
    with reading(require_plans(Path(path)), "not JSON", PlansError, "plan with nnUNetv2_plan_experiment, not with v1"):
        plans: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    check_plans(plans, source=str(path))
    return plans


def write_plans(plans: dict[str, Any], path: str | os.PathLike[str], *, overwrite: bool) -> bool:
    """Write a plans file atomically; a file with other content is replaced only with ``overwrite``.

    Returns:
        Whether a file was written; False where the same plans are there already.

    Raises:
        PlansError: A file with other content is there and ``overwrite`` is False.
    """
    path = Path(path)
    with suppress(FileNotFoundError, ValueError):  # none yet, or no JSON
        if json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(plans)):
            return False
    if path.exists() and not overwrite:
        raise PlansError(f"{path} has other plans: choose another --name, or replace the file with --overwrite")
    write_json(plans, path)
    return True


def plan_with_nnunet(dataset_name: str, identifier: str, *, num_processes: int) -> None:
    """Run nnU-Net's fingerprint extraction and planner, which write the plans with this identifier.

    Raises:
        PlansError: No planner of nnU-Net writes that identifier.
        DatasetError: No raw dataset to plan, or two of one id, which nnU-Net's planner cannot tell apart.
        NnUNetPathError: ``nnUNet_raw`` is not set.
    """
    if identifier not in _PLANNERS:
        path = find_plans(dataset_name, identifier)
        raise PlansError(f"no file {path}: name one that exists, or one of {', '.join(_PLANNERS)}")
    path = nnunet_folder("nnUNet_raw") / dataset_name / "dataset.json"
    with reading(path, "a dataset that cannot be planned", DatasetError, "correct it"):
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["channel_names"], content["labels"], content["file_ending"]
    dataset_id = convert_dataset_name_to_id(dataset_name)
    if len(candidates := find_candidate_datasets(dataset_id)) > 1:
        raise DatasetError(f"nnU-Net cannot tell {', '.join(candidates)} apart: give one of them another id")
    workers = os.environ.get("nnUNet_n_proc_DA")
    if workers == "0":  # good for training; but the planner takes it for its number of threads, which cannot be 0
        os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        extract_fingerprints([dataset_id], num_processes=num_processes, clean=False)
        plan_experiments([dataset_id], _PLANNERS[identifier])
    finally:
        if workers is not None:
            os.environ["nnUNet_n_proc_DA"] = workers


def missing_preprocessed_cases(dataset_name: str, plans: dict[str, Any], configuration: str) -> list[str]:
    """List training cases that are not preprocessed yet, or not completely.

    nnU-Net trains on whatever is in the folder: after an interrupted preprocessing silently on fewer cases.

    Raises:
        DatasetError: Nothing is preprocessed and there is no raw dataset to do it from.
        NnUNetPathError: ``nnUNet_preprocessed`` is not set.
    """
    data = nnunet_folder("nnUNet_preprocessed") / dataset_name
    data /= resolve_configuration(plans, configuration)["data_identifier"]
    done = {path.stem for path in data.glob("*.pkl")}  # the last file of a case that nnU-Net writes
    raw = Path(os.environ.get("nnUNet_raw", "")) / dataset_name
    if os.environ.get("nnUNet_raw") and (raw / "dataset.json").is_file():
        return sorted(set(get_filenames_of_train_images_and_targets(str(raw))) - done)
    if not done:
        raise DatasetError(f"no cases in {data}, and no dataset.json in {raw}: put the dataset into nnUNet_raw")
    return []


@dataclass(frozen=True)
class Preparation:
    """How images are prepared and cut for a network, and how it strides over them; axes are the transposed ones."""

    spacing: list[float]  # target, mm
    patch_size: list[int]  # voxels
    batch_size: int
    batch_dice: bool
    median_shape: list[float]  # of the images at the target spacing, voxels
    median_spacing: list[float]  # of the training images, mm
    strides: list[list[int]]  # of each of six stages
    normalization_schemes: list[str]  # of each channel, as the next one
    use_mask_for_norm: list[bool]
    transpose_forward: list[int] = field(default_factory=lambda: [0, 1, 2])
    transpose_backward: list[int] = field(default_factory=lambda: [0, 1, 2])
    channel_names: list[str] = field(default_factory=lambda: ["nonCT"])
    intensity_properties: list[dict[str, float]] = field(default_factory=lambda: [{}])

    def as_configurations(self, plans_name: str) -> dict[str, Any]:
        """Return the only configuration of nnU-Net v2's plans of this name; its architecture has strides only."""
        resampling: dict[str, Any] = {}
        for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
            kwargs = {"is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None}
            resampling |= {f"resampling_fn_{kind}": _RESAMPLING, f"resampling_fn_{kind}_kwargs": kwargs}
        strides = {"strides": self.strides}  # the network's other arguments come from its size
        configuration = {
            "data_identifier": f"{plans_name}_{CONFIGURATION}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": self.batch_size,
            "patch_size": self.patch_size,
            "median_image_size_in_voxels": self.median_shape,
            "spacing": self.spacing,
            "normalization_schemes": self.normalization_schemes,
            "use_mask_for_norm": self.use_mask_for_norm,
            **resampling,
            "architecture": {"network_class_name": "", "arch_kwargs": strides, "_kw_requires_import": []},
            "batch_dice": self.batch_dice,
        }
        return {CONFIGURATION: configuration}


def load_preset(name: str) -> dict[str, Any]:
    """Read a file of ``plans/``, what ``stunet plan --size`` or ``--preset`` puts into plans: its settings, and its
    preparation for ``--preset``.

    >>> load_preset("totalsegmentator")["settings"]["num_epochs"]
    4000
    """
    content: dict[str, Any] = json.loads((files("stunet.plans") / f"{name}.json").read_text(encoding="utf-8"))
    return content


#: How images were prepared for the published weights (arXiv 2304.06716, section 4.1, and the published plans).
PRETRAINING = Preparation(**load_preset("totalsegmentator")["preparation"])


def apply_preset(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Make nnU-Net's plans of a dataset into some with one configuration, ``3d_fullres``, as a preset prepares it.

    Images are prepared differently from what nnU-Net has planned, so the configuration has a data identifier of its
    own: all sizes of network share it, and nothing that is preprocessed already is touched.

    Returns:
        Plans whose architecture has strides only; :func:`stunet.planning.rewrite_plans` puts the network there.
    """
    preset, backward = Preparation(**load_preset(name)["preparation"]), plans["transpose_backward"]
    spacing = [plans["original_median_spacing_after_transp"][axis] for axis in backward]
    shape = [plans["original_median_shape_after_transp"][axis] for axis in backward]
    n_channels = len(plans["foreground_intensity_properties_per_channel"])
    preparation = replace(
        preset,
        median_shape=[float(n * s / t) for n, s, t in zip(shape, spacing, preset.spacing, strict=True)],
        median_spacing=spacing,
        normalization_schemes=preset.normalization_schemes * n_channels,
        use_mask_for_norm=preset.use_mask_for_norm * n_channels,
    )
    return {
        **plans,
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": shape,
        "transpose_forward": preparation.transpose_forward,
        "transpose_backward": preparation.transpose_backward,
        "configurations": preparation.as_configurations(f"STUNetPlans_{name}"),
    }


def fine_tuning_settings(weights: SourceWeights, strategy: Strategy) -> dict[str, Any]:
    """Return the settings with which a trainer of this package starts from the weights' file."""
    path = str(weights.path.resolve())
    return {"pretrained_weights": path, "fine_tune": strategy, "initial_lr": _FINE_TUNING_LR}


def fine_tuning_configurations(plans: Mapping[str, Any], weights: SourceWeights) -> list[str]:
    """List the configurations that have an architecture of their own with as many axes as the weights."""
    n_axes = weights.architecture.n_axes
    own = [name for name, configuration in plans["configurations"].items() if has_own_architecture(configuration)]
    fitting = [name for name in own if len(resolve_configuration(dict(plans), name)["patch_size"]) == n_axes]
    if not fitting:
        listed = ", ".join(own) or "no network"
        raise PlansError(f"no configuration for {n_axes}D weights {weights.path}, but {listed}: give other --plans")
    return fitting


def preview_transfer(
    weights: SourceWeights, plans: Mapping[str, Any], configurations: Sequence[str], dataset_json: Mapping[str, Any]
) -> TransferReport:
    """Report what a training of the first of these configurations will take from the weights; check the others too.

    Raises:
        CheckpointError: The weights do not fit a configuration: other axes, or another size.
    """
    manager, outputs, reports = PlansManager(dict(plans)), Labels(dataset_json).outputs, []
    for name in configurations:
        configuration = resolve_configuration(dict(plans), name)
        settings = configuration.get(SETTINGS_KEY, {})
        target = replace(
            weights.architecture,
            input_channels=determine_num_input_channels(manager, manager.get_configuration(name), dict(dataset_json)),
            num_classes=len(outputs.names),
            n_axes=len(configuration["patch_size"]),
        ).build_on_meta()
        policies = {name: settings.get(name, SETTINGS[name].default) for name in ("stem", "head")}
        reports.append(transfer_weights(weights, target, outputs, **policies))
    return reports[0]
