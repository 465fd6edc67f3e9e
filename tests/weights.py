"""Tiny STU-Nets as the files that people have of them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stunet.network import STUNetSize, build_stunet
from stunet.weights.convert import to_published_key

TINY = STUNetSize("d111111w2", (1,) * 6, 2)
STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]


def tiny_weights(num_classes: int = 3, input_channels: int = 1, size: STUNetSize = TINY) -> dict[str, Tensor]:
    """Random weights by our names."""
    torch.manual_seed(0)
    return build_stunet(size, input_channels, num_classes, STRIDES).state_dict()


def published(weights: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The same by the published names."""
    return OrderedDict((to_published_key(key), tensor) for key, tensor in weights.items())


def v1_plans(num_classes: int = 3, input_channels: int = 1, **more: Any) -> dict[str, Any]:
    """Plans of nnU-Net v1, with numpy values where v1 has them."""
    return {
        "num_stages": 1,
        "num_modalities": input_channels,
        "modalities": dict.fromkeys(range(input_channels), "nonCT"),
        "normalization_schemes": OrderedDict((c, "nonCT") for c in range(input_channels)),
        "use_mask_for_norm": OrderedDict((c, False) for c in range(input_channels)),
        "num_classes": num_classes - 1,
        "dataset_properties": {"intensityproperties": None},
        "transpose_forward": [np.int64(0), 1, 2],
        "transpose_backward": [np.int64(0), np.int64(1), np.int64(2)],
        "keep_only_largest_region": {(1,): True},
        "plans_per_stage": {0: v1_stage()},
        **more,
    }


def v1_stage(**more: Any) -> dict[str, Any]:
    """One stage of :func:`v1_plans`."""
    return {
        "batch_size": 4,
        "patch_size": np.array([32, 48, 64]),
        "current_spacing": np.array([3.0, 0.8, 0.9]),
        "original_spacing": np.array([3.5, 0.7, 0.7]),
        "median_patient_size_in_voxels": np.array([100, 200, 201]),
        "pool_op_kernel_sizes": STRIDES[1:],
        "do_dummy_2D_data_aug": np.bool_(False),
        **more,
    }


def write_v1(folder: Path, weights: dict[str, Tensor], plans: dict[str, Any] | None, name: str = "x") -> Path:
    """A ``.model`` and, with plans, its ``.model.pkl``."""
    path = folder / f"{name}.model"
    torch.save({"epoch": 7, "state_dict": published(weights), "optimizer_state_dict": None,
                "plot_stuff": ([np.float64(1)], [], [], [np.float32(2)])}, path)  # fmt: skip
    if plans is not None:
        init = ("", 0, "", "", True, 0, True, False, True)
        content = OrderedDict(init=init, name="STUNetTrainer_small", plans=plans)
        path.with_name(f"{name}.model.pkl").write_bytes(pickle.dumps(content))
    return path
