"""Plans of nnU-Net v1 read into what plans of v2 need. Pure functions; nothing is read or written here."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from stunet.errors import PlansError, reading
from stunet.planning.rewrite import fit_strides

__all__ = ["PRETRAINING", "Preparation", "read_v1_plans"]

_SCHEMES = {"nonCT": "ZScoreNormalization", "CT": "CTNormalization", "noNorm": "NoNormalization"}
_STATISTICS = {
    "mean": "mean", "median": "median", "std": "sd", "min": "mn", "max": "mx",
    "percentile_00_5": "percentile_00_5", "percentile_99_5": "percentile_99_5",
}  # fmt: skip


@dataclass(frozen=True)
class Preparation:
    """How images are prepared and cut for a network, and how it strides over them.

    Axes are those after the transposition, as in nnU-Net's plans.

    Attributes:
        spacing: Target spacing in mm.
        patch_size: Voxels of a patch.
        batch_size: Patches in a training batch.
        batch_dice: Dice over the whole batch.
        median_shape: Median image size in voxels at the target spacing.
        median_spacing: Median spacing of the training images in mm.
        strides: Stride of each of six stages.
        transpose_forward: Order of the axes for the network.
        transpose_backward: The inverse order.
        channel_names: One for each channel of the image.
        normalization_schemes: nnU-Net v2's name for each channel.
        use_mask_for_norm: For each channel, whether only voxels inside the mask count.
        intensity_properties: Statistics of the foreground for each channel; empty where unknown.
    """

    spacing: list[float]
    patch_size: list[int]
    batch_size: int
    batch_dice: bool
    median_shape: list[float]
    median_spacing: list[float]
    strides: list[list[int]]
    transpose_forward: list[int] = field(default_factory=lambda: [0, 1, 2])
    transpose_backward: list[int] = field(default_factory=lambda: [0, 1, 2])
    channel_names: list[str] = field(default_factory=lambda: ["nonCT"])
    normalization_schemes: list[str] = field(default_factory=lambda: ["ZScoreNormalization"])
    use_mask_for_norm: list[bool] = field(default_factory=lambda: [False])
    intensity_properties: list[dict[str, float]] = field(default_factory=lambda: [{}])


#: The recipe of the published weights on TotalSegmentator (arXiv 2304.06716, section 4.1, and the published plans).
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
    """What plans of nnU-Net v1 say about preparation.

    Where they name no stage, which holds for the published ``plans.pkl``, spacing, patch and strides are those of
    :data:`PRETRAINING`.

    Args:
        plans: Plans of v1, from ``plans.pkl`` or from a ``.model.pkl``.
        init: Arguments of the v1 trainer, which name the stage and the kind of Dice; may be empty.
        input_channels: Channels that the weights have.
        num_classes: Outputs that the weights have, background included.
        source: Where the plans come from, for messages.

    Raises:
        PlansError: Plans of other weights, a normalization that is unknown, or clipping without statistics.
    """
    with reading(source, _UNUSABLE, PlansError, remedy=_REMEDY):
        # The others resample or normalize otherwise, which nnU-Net v2's default preprocessor would not repeat.
        if (preprocessor := plans.get("preprocessor_name")) not in (None, "GenericPreprocessor"):
            raise ValueError(
                f"preprocessor_name is {str(preprocessor)[:60]}; GenericPreprocessor alone can be converted"
            )
        _check_counts(plans, input_channels, num_classes, source)
        names = [
            str(_channel(plans["normalization_schemes"], c, "normalization_schemes", source))
            for c in range(input_channels)
        ]
        modalities = plans.get("modalities") or dict(enumerate(names))
        common: dict[str, Any] = {
            "channel_names": [str(_channel(modalities, c, "modalities", source)) for c in range(input_channels)],
            "normalization_schemes": [_scheme(name, source) for name in names],
            "use_mask_for_norm": [
                bool(_channel(plans.get("use_mask_for_norm") or {}, c, "use_mask_for_norm", source, default=False))
                for c in range(input_channels)
            ],
            "intensity_properties": [_statistics(plans, c, name, source) for c, name in enumerate(names)],
            "transpose_forward": _numbers(
                plans.get("transpose_forward", [0, 1, 2]), int, "transpose_forward", source, at_least=0
            ),
            "transpose_backward": _numbers(
                plans.get("transpose_backward", [0, 1, 2]), int, "transpose_backward", source, at_least=0
            ),
        }
        _check_transposes(common["transpose_forward"], common["transpose_backward"], source)
        return Preparation(**_stage(plans, init, source), **common)


def _stage(plans: Mapping[str, Any], init: Sequence[Any], source: str) -> dict[str, Any]:
    stages = plans.get("plans_per_stage")
    dice = init[4] if len(init) > 4 and isinstance(init[4], bool) else PRETRAINING.batch_dice
    if not stages:
        return {
            name: getattr(PRETRAINING, name)
            for name in ("spacing", "patch_size", "batch_size", "median_shape", "median_spacing", "strides")
        } | {"batch_dice": dice}
    index = init[5] if len(init) > 5 and isinstance(init[5], int) and init[5] in stages else max(stages)
    stage = stages[index]
    needed = ("current_spacing", "patch_size", "batch_size", "pool_op_kernel_sizes")
    if missing := [key for key in needed if key not in stage]:
        raise _unusable(source, f"stage {index}", f"no {', '.join(missing)}", "a stage as nnU-Net v1 plans it")
    pools = [_numbers(pool, int, "pool_op_kernel_sizes", source) for pool in stage["pool_op_kernel_sizes"]]
    spacing = _numbers(stage["current_spacing"], float, "current_spacing", source)
    patch = _numbers(stage["patch_size"], int, "patch_size", source)
    return {
        "spacing": spacing,
        "patch_size": patch,
        "batch_size": _numbers([stage["batch_size"]] * 3, int, "batch_size", source)[0],
        "batch_dice": dice,
        "median_shape": _numbers(stage.get("median_patient_size_in_voxels", patch), float, "median size", source),
        "median_spacing": _numbers(stage.get("original_spacing", spacing), float, "original_spacing", source),
        "strides": fit_strides([[1, 1, 1], *pools]),
    }


def _check_counts(plans: Mapping[str, Any], input_channels: int, num_classes: int, source: str) -> None:
    # v1 does not count the background.
    for key, actual in (("num_modalities", input_channels), ("num_classes", num_classes - 1)):
        if key in plans and plans[key] != actual:
            raise PlansError(
                "plans that belong to other weights",
                got=f"{source}: {key} is {str(plans[key])[:40]}",
                expected=f"{actual}, as the weights have {input_channels} input channels and {num_classes} outputs "
                "with background",
                remedy="Give the pickle that was published with these weights.",
            )


def _channel(values: Any, channel: int, key: str, source: str, *, default: Any = None) -> Any:
    if isinstance(values, Mapping):
        value = values.get(channel, default)
    else:
        value = values[channel] if isinstance(values, list | tuple) and channel < len(values) else default
    if value is None:
        raise _unusable(source, key, values, f"a value for channel {channel}")
    return value


def _scheme(name: str, source: str) -> str:
    if name in _SCHEMES:
        return _SCHEMES[name]
    if name in ("CT2",):
        raise _unusable(
            source, "normalization_schemes", name, f"one of {', '.join(_SCHEMES)}, which nnU-Net v2 has too"
        )
    return "ZScoreNormalization"  # v1 treats every other modality so


def _statistics(plans: Mapping[str, Any], channel: int, scheme: str, source: str) -> dict[str, float]:
    properties = (plans.get("dataset_properties") or {}).get("intensityproperties")
    found = _channel(properties, channel, "intensityproperties", source) if properties else {}
    statistics = {ours: float(found[theirs]) for ours, theirs in _STATISTICS.items() if theirs in found}
    missing = [
        theirs
        for ours, theirs in _STATISTICS.items()
        if ours not in statistics and ours not in ("min", "max", "median")
    ]
    if scheme == "CT" and missing:
        raise _unusable(
            source, "intensityproperties", f"no {', '.join(missing)}", "the statistics that CT clipping needs"
        )
    if not all(map(math.isfinite, statistics.values())):
        raise _unusable(source, "intensityproperties", statistics, "finite numbers")
    return statistics


def _numbers(values: Any, kind: type, key: str, source: str, *, at_least: float = 1e-6) -> list[Any]:
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(listed, list | tuple) or len(listed) != 3:
        raise _unusable(source, key, values, "three numbers")
    if not all(isinstance(v, Real) and at_least <= float(v) < float("inf") for v in listed):
        raise _unusable(source, key, values, "three numbers above 0" if at_least > 0 else "three numbers")
    return [kind(value) for value in listed]


def _check_transposes(forward: list[int], backward: list[int], source: str) -> None:
    if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward] != [0, 1, 2]:
        raise _unusable(
            source, "transpose_forward, transpose_backward", (forward, backward), "an order and its inverse"
        )


def _unusable(source: str, key: str, got: Any, expected: str) -> PlansError:
    shown = got if isinstance(got, str) else reprlib.repr(got)
    return PlansError(_UNUSABLE, got=f"{source}: {key}: {shown}"[:300], expected=expected, remedy=_REMEDY)


_UNUSABLE = "plans of nnU-Net v1 that cannot be used"
_REMEDY = "Give the pickle that was published with the weights, or leave it out for the pre-training preset."
