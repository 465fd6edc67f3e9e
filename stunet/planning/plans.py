"""Plans files: reading, writing, planning with nnU-Net, presets, and plans that start from weights."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from stunet.environment import find_plans, nnunet_folder, require_configuration, require_plans
from stunet.errors import DatasetError, PlansError, SettingsError, reading
from stunet.files import write_json
from stunet.labels.labels import Labels
from stunet.network import CONV_OPS, N_STAGES, STUNetSize, size_of, total_stride
from stunet.settings import SETTINGS, SETTINGS_KEY, Strategy, check_settings
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
        Plans whose architecture has strides only; :func:`rewrite_plans` puts the network there.
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


Plans = dict[str, Any]

NETWORK_CLASS_NAME = "stunet.network.STUNet"


def check_plans(plans: Any, *, source: str) -> None:
    """Check that something read from a file is a plans file of nnU-Net v2."""
    if isinstance(plans, dict) and "plans_per_stage" in plans:
        raise PlansError(f"{source} are plans of nnU-Net v1: plan the dataset again with nnUNetv2_plan_experiment")
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise PlansError(f"{source} is not a plans file with 'configurations': plan with nnUNetv2_plan_experiment")
    # What was meant as a setting but would be passed over silently.
    misplaced = [key for key in plans if key.lower() == SETTINGS_KEY]
    for name, configuration in plans["configurations"].items():
        for key in configuration:
            outside = key in SETTINGS and SETTINGS[key].place == "training"
            if outside or (key != SETTINGS_KEY and key.lower() == SETTINGS_KEY):
                misplaced.append(f"{name}: {key}")
    if misplaced:
        listed = ", ".join(misplaced)
        raise SettingsError(f'{source}: nothing reads {listed}: move it under "{SETTINGS_KEY}" of a configuration')


def check_configuration(plans: Mapping[str, Any], configuration: Mapping[str, Any], n_channels: int) -> None:
    """Check the numbers with which images are prepared for a model of others'.

    Raises:
        ValueError: One that would fail, or be endless; other content raises what it may. Callers wrap this in
            :func:`stunet.errors.reading`.
    """
    patch, spacing = configuration["patch_size"], configuration["spacing"]
    if len(patch) not in (2, 3) or any(type(n) is not int or n < 1 for n in patch) or math.prod(patch) > 2**28:
        raise ValueError(f"patch_size {str(patch)[:60]}")
    if len(spacing) not in (2, 3) or not all(0 < float(side) < math.inf for side in spacing):
        raise ValueError(f"spacing {str(spacing)[:60]}")
    forward, backward = plans["transpose_forward"], plans["transpose_backward"]
    if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward] != [0, 1, 2]:
        raise ValueError(f"transpose_forward {str(forward)[:60]}, transpose_backward {str(backward)[:60]}")
    schemes = configuration["normalization_schemes"]
    if min(len(schemes), len(configuration["use_mask_for_norm"])) < n_channels:
        raise ValueError(f"normalization_schemes {str(schemes)[:60]} for {n_channels} channels")
    for channel, scheme in enumerate(schemes):
        if scheme == "CTNormalization":
            statistics = plans["foreground_intensity_properties_per_channel"][str(channel)]
            for name in ("mean", "std", "percentile_00_5", "percentile_99_5"):
                if not math.isfinite(statistics[name]):
                    raise ValueError(f"intensity statistics of channel {channel}: {name} is {statistics[name]}")


def fit_strides(strides: Sequence[Sequence[int]]) -> list[list[int]]:
    """Fit strides to STU-Net's six stages: missing ones are 1, surplus ones are cut.

    >>> fit_strides([[1, 1], [2, 2], [2, 1]])
    [[1, 1], [2, 2], [2, 1], [1, 1], [1, 1], [1, 1]]
    """
    fitted = [list(stride) for stride in strides[:N_STAGES]]
    unit = [1] * len(fitted[0])
    return fitted + [list(unit) for _ in range(N_STAGES - len(fitted))]


def resolve_configuration(plans: Plans, name: str) -> dict[str, Any]:
    """Return a configuration with all that it inherits, in nnU-Net's current format.

    Raises:
        PlansError: There is no such configuration.
    """
    require_configuration(plans, name)
    source, problem = plans.get("plans_name", "the plans"), f"plans whose configuration {name} cannot be read"
    with reading(source, problem, PlansError, "plan with nnU-Net again"):
        resolved: dict[str, Any] = PlansManager(deepcopy(plans)).get_configuration(name).configuration
        _ = fit_strides(resolved["architecture"]["arch_kwargs"]["strides"]), resolved["patch_size"]
    return resolved


def has_own_architecture(configuration: Mapping[str, Any]) -> bool:
    """Say whether a configuration brings an architecture of its own (current or older format)."""
    return "architecture" in configuration or "UNet_class_name" in configuration


def is_stunet(configuration: Mapping[str, Any]) -> bool:
    """Say whether a configuration's own or inherited architecture is a STU-Net."""
    architecture = configuration.get("architecture", {})
    return bool(architecture.get("network_class_name") == NETWORK_CLASS_NAME)


def plans_size(configuration: Mapping[str, Any]) -> STUNetSize:
    """Return the size of the STU-Net in a configuration for which :func:`is_stunet` holds."""
    kwargs = configuration["architecture"]["arch_kwargs"]
    return size_of(kwargs["features_per_stage"], kwargs["n_blocks_per_stage"])


def rewrite_configuration(
    plans: Plans, name: str, *, size: STUNetSize, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put a STU-Net into one configuration; everything else stays as it is.

    Args:
        plans: Plans of nnU-Net v2; not changed.
        name: The configuration.
        size: Size of the STU-Net.
        settings: Settings to add; see :data:`stunet.settings.SETTINGS`. Those that the configuration already has stay
            unless given here.

    Returns:
        The new configuration, with ``inherits_from`` and all keys that it had.

    Raises:
        PlansError: No such configuration, or a patch that the strides do not divide.
        SettingsError: An unknown setting or an impossible value.
    """
    resolved = resolve_configuration(plans, name)
    own: dict[str, Any] = deepcopy(plans["configurations"][name])
    if "UNet_class_name" in own:  # plans of nnU-Net < 2.2: nnU-Net has translated the resolved ones
        own = deepcopy(resolved)
    inherited, given = resolved.get(SETTINGS_KEY, {}), dict(settings or {})
    check_settings(inherited, source=f"configuration {name}, key '{SETTINGS_KEY}'")
    check_settings(given, source="the settings")
    # What the configuration itself says goes before what it inherits, whether in its own keys or in its settings.
    for key, value in {**inherited, **given}.items():
        if SETTINGS[key].place == "configuration" and (key in given or key in own.get(SETTINGS_KEY, {})):
            own[key] = value
        elif SETTINGS[key].place == "configuration":
            own.setdefault(key, value)
    strides = fit_strides(resolved["architecture"]["arch_kwargs"]["strides"])
    _check_patch(name, own.get("patch_size", resolved["patch_size"]), strides)
    merged = {**inherited, **given}
    kept = resolved["architecture"]["arch_kwargs"] if is_stunet(resolved) else {}
    own["architecture"] = {
        "network_class_name": NETWORK_CLASS_NAME,
        "arch_kwargs": {
            "n_stages": N_STAGES,
            "features_per_stage": list(size.features),
            "conv_op": f"torch.nn.modules.conv.{CONV_OPS[len(strides[0])].__name__}",
            "strides": strides,
            "n_blocks_per_stage": list(size.depth),
            "activation_checkpointing": kept.get("activation_checkpointing", "none"),
            **{key: value for key, value in merged.items() if SETTINGS[key].place == "architecture"},
        },
        "_kw_requires_import": ["conv_op"],
    }
    training = {key: value for key, value in merged.items() if SETTINGS[key].place == "training"}
    if training or SETTINGS_KEY in own:
        own[SETTINGS_KEY] = training
    return own


def rewrite_plans(
    plans: Plans,
    *,
    size: STUNetSize,
    plans_name: str,
    configurations: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plans:
    """Put a STU-Net into configurations of plans.

    Preprocessing, patch and batch stay as they are, and so does ``data_identifier``: data that is preprocessed already
    is used again.

    Args:
        plans: Plans of nnU-Net v2; not changed.
        size: Size of the STU-Net.
        plans_name: Name of the new plans, nnU-Net's plans identifier.
        configurations: Which to rewrite; all that have an architecture of their own by default. Those that inherit
            from one of these follow it; those with a settings block of their own get the new settings in it, too.
        settings: Settings to add to each of them.

    Raises:
        PlansError: No such configuration, or a patch that the strides do not divide.
        SettingsError: An unknown setting or an impossible value.
    """
    check_plans(plans, source=str(plans_name))
    rewritten = deepcopy(plans)
    rewritten["plans_name"] = plans_name
    if configurations is None:
        configurations = [name for name, own in plans["configurations"].items() if has_own_architecture(own)]
    if not configurations:
        raise PlansError(f"{plans_name}: no configuration has a network: plan again with nnUNetv2_plan_experiment")
    followers = [name for name in _followers(plans, configurations) if SETTINGS_KEY in plans["configurations"][name]]
    for name in (*configurations, *followers):
        rewritten["configurations"][name] = rewrite_configuration(plans, name, size=size, settings=settings)
    for name in _followers(plans, configurations):
        resolved = resolve_configuration(rewritten, name)
        _check_patch(name, resolved["patch_size"], resolved["architecture"]["arch_kwargs"]["strides"])
    return rewritten


def _followers(plans: Plans, configurations: Sequence[str]) -> list[str]:
    """List the configurations whose architecture is inherited, directly or not, from one of these."""

    def source(name: str) -> str:
        own = plans["configurations"][name]
        return name if has_own_architecture(own) or name in configurations else source(own["inherits_from"])

    inheriting = [n for n, own in plans["configurations"].items() if "inherits_from" in own and n not in configurations]
    for name in inheriting:
        resolve_configuration(plans, name)  # refuses circles and parents that do not exist
    return [name for name in inheriting if source(name) in configurations]


def _check_patch(name: str, patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    got, total = f"{name}: patch_size {list(patch_size)}", list(total_stride(strides))
    if len(patch_size) != len(total):
        raise PlansError(f"{got} for strides of {len(total)} axes: correct it, or choose another configuration with -c")
    if list(patch_size) == total:
        raise PlansError(f"{got} leaves one voxel at the coarsest stage: add multiples of {total}")
    if any(n % t for n, t in zip(patch_size, total, strict=True)):
        nearest = [max(t, round(n / t) * t) for n, t in zip(patch_size, total, strict=True)]
        raise PlansError(f"{got} instead of multiples of {total}: set patch_size to {nearest}")
