"""Plans as nnU-Net 2.8 writes them, small enough to read."""

from __future__ import annotations

from typing import Any


def architecture(strides: list[list[int]]) -> dict[str, Any]:
    n_axes, n = len(strides[0]), len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": [min(4 * 2**i, 32) for i in range(n)],
            "conv_op": f"torch.nn.modules.conv.Conv{n_axes}d",
            "kernel_sizes": [[3] * n_axes] * n,
            "strides": strides,
            "n_conv_per_stage": [2] * n,
            "n_conv_per_stage_decoder": [2] * (n - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{n_axes}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(name: str, patch_size: list[int], strides: list[list[int]], **more: Any) -> dict[str, Any]:
    resampling = {
        f"resampling_fn_{kind}{suffix}": value
        for kind, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False))
        for suffix, value in (
            ("", "resample_data_or_seg_to_shape"),
            ("_kwargs", {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}),
        )
    }
    return {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch_size,
        "median_image_size_in_voxels": [float(n) for n in patch_size],
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        **resampling,
        "architecture": architecture(strides),
        **more,
    }


def make_plans() -> dict[str, Any]:
    """2d with seven stages, 3d_lowres with six, 3d_fullres with four, and the cascade."""
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration("2d", [128, 64], [[1, 1]] + [[2, 2]] * 4 + [[2, 1], [2, 1]]),
            "3d_lowres": configuration(
                "3d_lowres", [64, 32, 32], [[1, 1, 1]] + [[2, 2, 2]] * 4 + [[2, 1, 1]], next_stage="3d_cascade_fullres"
            ),
            "3d_fullres": configuration("3d_fullres", [40, 56, 40], [[1, 1, 1]] + [[2, 2, 2]] * 3),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"max": 3000.0, "mean": 100.0, "median": 90.0, "min": -1000.0, "percentile_00_5": -900.0,
                  "percentile_99_5": 1000.0, "std": 200.0}
        },
    }  # fmt: skip


DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "numTraining": 10,
    "file_ending": ".nii.gz",
}
