"""Read plans of nnU-Net v1 into what plans of v2 need. Pure functions; nothing is read or written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stunet.errors import PlansError, reading
from stunet.planning.rewrite import fit_strides

_UNUSABLE = "plans of nnU-Net v1 that cannot be used; the pickle published with the weights can, or none (the preset)"
_SCHEMES = {"nonCT": "ZScoreNormalization", "CT": "CTNormalization", "noNorm": "NoNormalization"}
_STATISTICS = {
    "mean": "mean", "median": "median", "std": "sd", "min": "mn", "max": "mx",
    "percentile_00_5": "percentile_00_5", "percentile_99_5": "percentile_99_5",
}  # fmt: skip


@dataclass(frozen=True)
class Preparation:
    """How images are prepared and cut for a network, and how it strides over them.

    Axes are those after the transposition, as in nnU-Net's plans.
    """

    spacing: list[float]  # target, mm
    patch_size: list[int]  # voxels
    batch_size: int
    batch_dice: bool
    median_shape: list[float]  # of the images at the target spacing, voxels
    median_spacing: list[float]  # of the training images, mm
    strides: list[list[int]]  # of each of six stages
    transpose_forward: list[int] = field(default_factory=lambda: [0, 1, 2])
    transpose_backward: list[int] = field(default_factory=lambda: [0, 1, 2])
    channel_names: list[str] = field(default_factory=lambda: ["nonCT"])
    normalization_schemes: list[str] = field(default_factory=lambda: ["ZScoreNormalization"])
    use_mask_for_norm: list[bool] = field(default_factory=lambda: [False])
    intensity_properties: list[dict[str, float]] = field(default_factory=lambda: [{}])


#: The preset of the published weights on TotalSegmentator (arXiv 2304.06716, section 4.1, and the published plans).
PRETRAINING = Preparation(
    spacing=[1.5, 1.5, 1.5],
    patch_size=[128, 128, 128],
    batch_size=2,
    batch_dice=False,
    median_shape=[228.0, 228.0, 240.0],
    median_spacing=[1.5, 1.5, 1.5],
    strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]],
)


def read_v1_plans(
    plans: Mapping[str, Any], init: Sequence[Any], *, input_channels: int, num_classes: int, source: str
) -> Preparation:
    """Read what plans of nnU-Net v1 say about preparation.

    Where they name no stage, which holds for the published ``plans.pkl``, spacing, patch and strides are those of
    :data:`PRETRAINING`.

    Raises:
        PlansError: Plans of other weights, a normalization that is unknown, or clipping without statistics.
    """
    with reading(source, _UNUSABLE, PlansError):
        # The others resample or normalize otherwise, which nnU-Net v2's default preprocessor would not repeat.
        if (preprocessor := plans.get("preprocessor_name")) not in (None, "GenericPreprocessor"):
            raise ValueError(
                f"preprocessor_name is {str(preprocessor)[:60]}; GenericPreprocessor alone can be converted"
            )
        # v1 does not count the background.
        for key, actual in (("num_modalities", input_channels), ("num_classes", num_classes - 1)):
            if plans.get(key, actual) != actual:
                raise ValueError(f"{key} is {str(plans[key])[:40]} instead of {actual}, as the weights have")
        channels = range(input_channels)
        names = [str(_channel(plans["normalization_schemes"], c, "normalization_schemes")) for c in channels]
        modalities = plans.get("modalities") or dict(enumerate(names))
        masks = plans.get("use_mask_for_norm") or {}
        forward, backward = (
            _numbers(plans.get(key, [0, 1, 2]), int, key, at_least=0)
            for key in ("transpose_forward", "transpose_backward")
        )
        if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward] != [0, 1, 2]:
            raise ValueError(f"transposes {forward} and {backward} instead of an order and its inverse")
        return Preparation(
            **_stage(plans, init),
            channel_names=[str(_channel(modalities, c, "modalities")) for c in channels],
            normalization_schemes=[_scheme(name) for name in names],
            use_mask_for_norm=[bool(_channel(masks, c, "use_mask_for_norm", default=False)) for c in channels],
            intensity_properties=[_statistics(plans, c, name) for c, name in enumerate(names)],
            transpose_forward=forward,
            transpose_backward=backward,
        )


def _stage(plans: Mapping[str, Any], init: Sequence[Any]) -> dict[str, Any]:
    stages = plans.get("plans_per_stage")
    dice = init[4] if len(init) > 4 and isinstance(init[4], bool) else PRETRAINING.batch_dice
    if not stages:
        names = ("spacing", "patch_size", "batch_size", "median_shape", "median_spacing", "strides")
        return {name: getattr(PRETRAINING, name) for name in names} | {"batch_dice": dice}
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
        "strides": fit_strides([[1, 1, 1], *pools]),
    }


def _channel(values: Any, channel: int, key: str, *, default: Any = None) -> Any:
    listed = values if isinstance(values, Mapping) else dict(enumerate(values))
    if (value := listed.get(channel, default)) is None:
        raise ValueError(f"{key} without a value for channel {channel}")
    return value


def _scheme(name: str) -> str:
    if name == "CT2":
        raise ValueError(
            f"normalization_schemes: CT2 instead of one of {', '.join(_SCHEMES)}, which nnU-Net v2 has too"
        )
    return _SCHEMES.get(name, "ZScoreNormalization")  # v1 treats every other modality so


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
