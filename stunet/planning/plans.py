"""Plans files: reading, writing, planning with nnU-Net, presets, and plans that start from weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from stunet.environment import find_plans, nnunet_folder, require_plans
from stunet.errors import DatasetError, PlansError, reading
from stunet.files import write_json
from stunet.labels import Labels
from stunet.network import STUNetSize, find_size
from stunet.planning.model_folder import CONFIGURATION, configuration_for
from stunet.planning.rewrite import check_plans, has_own_architecture, resolve_configuration
from stunet.planning.v1_plans import Preparation
from stunet.settings import SETTINGS_KEY, HeadPolicy, StemPolicy, Strategy, check_settings
from stunet.weights.convert import SourceWeights
from stunet.weights.transfer import TransferReport, transfer_weights

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
    path = require_plans(Path(path))
    try:
        plans: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlansError(
            f"{path} is not JSON ({error}): plan with nnUNetv2_plan_experiment (v1 plans, *.pkl, cannot be used)"
        ) from error
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
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(plans))
        except ValueError:
            same = False
        if same:
            return False
        if not overwrite:
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
        raise PlansError(
            f"no file {find_plans(dataset_name, identifier)}: name one that exists, or one of {', '.join(_PLANNERS)}"
        )
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
class Preset:
    """A file of ``plans/``: what ``stunet plan --size`` or ``--preset`` puts into plans."""

    name: str
    settings: Mapping[str, Any]  # those given with --set have precedence
    size: STUNetSize | None  # of the network, for --size
    preparation: Mapping[str, Any] | None  # spacing in mm, patch, batch, strides, normalization, for --preset


def list_presets(kind: str = "size") -> list[str]:
    """List the presets with a ``size``, or with a ``preparation`` in the place of what nnU-Net plans from the data.

    >>> list_presets(), list_presets("preparation")
    (['small', 'base', 'large', 'huge'], ['totalsegmentator'])
    """
    names = [path.name.removesuffix(".json") for path in files("stunet.plans").iterdir() if path.name.endswith(".json")]
    presets = [preset for preset in map(load_preset, names) if getattr(preset, kind) is not None]
    return [p.name for p in sorted(presets, key=lambda p: (p.size.width if p.size else 0, p.name))]


def load_preset(name: str) -> Preset:
    """Read a preset."""
    file = files("stunet.plans") / f"{name}.json"
    if not name.isidentifier() or not file.is_file():
        raise PlansError(f"no preset {name}: choose one of {', '.join(list_presets() + list_presets('preparation'))}")
    content = json.loads(file.read_text(encoding="utf-8"))
    check_settings(content["settings"], source=f"preset {name}")
    size = find_size(content["size"]) if "size" in content else None
    return Preset(name, content["settings"], size, content.get("preparation"))


def apply_preset(plans: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Make nnU-Net's plans of a dataset into some with one configuration, ``3d_fullres``, as a preset prepares it.

    Images are prepared differently from what nnU-Net has planned, so the configuration has a data identifier of its
    own: all sizes of network share it, and nothing that is preprocessed already is touched.

    Returns:
        Plans whose architecture has strides only; :func:`stunet.planning.rewrite_plans` puts the network there.
    """
    wanted = preset.preparation
    if wanted is None:
        raise PlansError(f"--preset {preset.name} prepares nothing: choose one of {list_presets('preparation')}")
    check_plans(plans, source=str(plans.get("plans_name")))
    backward = plans["transpose_backward"]
    spacing = [plans["original_median_spacing_after_transp"][axis] for axis in backward]
    shape = [plans["original_median_shape_after_transp"][axis] for axis in backward]
    n_channels = len(plans["foreground_intensity_properties_per_channel"])
    preparation = Preparation(
        **{name: wanted[name] for name in ("spacing", "patch_size", "batch_size", "batch_dice", "strides")},
        median_shape=[float(n * s / t) for n, s, t in zip(shape, spacing, wanted["spacing"], strict=True)],
        median_spacing=spacing,
        normalization_schemes=[wanted["normalization_scheme"]] * n_channels,
        use_mask_for_norm=[wanted["use_mask_for_norm"]] * n_channels,
    )
    return {
        **plans,
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": shape,
        "transpose_forward": preparation.transpose_forward,
        "transpose_backward": preparation.transpose_backward,
        "configurations": {CONFIGURATION: configuration_for(preparation, f"STUNetPlans_{preset.name}_{CONFIGURATION}")},
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
        raise PlansError(
            f"no configuration for {n_axes}D weights {weights.path}, but {', '.join(own) or 'no network'}: "
            "give other weights, or other plans with --plans"
        )
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
        stem = cast("StemPolicy", settings.get("stem", "repeat-scaled"))
        head = cast("HeadPolicy", settings.get("head", "by-name"))
        reports.append(transfer_weights(weights, target, outputs, stem=stem, head=head))
    return reports[0]
