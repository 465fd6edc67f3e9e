"""Put a STU-Net into nnU-Net's plans. Pure functions; nothing is read or written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.environment import require_configuration
from stunet.errors import PlansError, SettingsError, reading
from stunet.network import CONV_OPS, N_STAGES, STUNetSize, size_of, total_stride
from stunet.settings import SETTINGS, SETTINGS_KEY, check_settings

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
