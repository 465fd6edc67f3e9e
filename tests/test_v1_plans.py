"""Plans of nnU-Net v1: what is taken over, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import STRIDES, TINY, v1_plans, v1_stage

from stunet.errors import PlansError
from stunet.planning.model_folder import make_plans, read_v1_plans
from stunet.planning.plans import PRETRAINING, Preparation, resolve_configuration
from stunet.weights.read import read_pickle

STATISTICS = {
    "median": 60.0, "mean": 70.5, "sd": 40.25, "mn": -900.0, "mx": 2000.0, "percentile_00_5": -80.0,
    "percentile_99_5": 250.0, "local_props": {"case": {"mean": 1.0}},
}  # fmt: skip


def read(plans: dict[str, Any], init: tuple[Any, ...] = (), channels: int = 1, classes: int = 3) -> Preparation:
    return read_v1_plans(plans, init, input_channels=channels, num_classes=classes, source="x.model.pkl")


def test_published_pickles_are_the_preset(shared: Path) -> None:
    folder = shared / "golden" / "published_plan_files"
    for size in ("small", "base", "large", "huge"):
        content = read_pickle(folder / f"{size}_ep4k.model.pkl")
        assert read(content["plans"], content["init"], classes=105) == PRETRAINING
    # This one names no stage.
    assert read(read_pickle(folder / "plans.pkl"), classes=105) == PRETRAINING


def test_the_preset_is_the_papers() -> None:
    assert PRETRAINING.spacing == [1.5, 1.5, 1.5]
    assert PRETRAINING.patch_size == [128, 128, 128]
    assert PRETRAINING.batch_size == 2
    assert PRETRAINING.strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]
    assert PRETRAINING.normalization_schemes == ["ZScoreNormalization"]
    assert PRETRAINING.use_mask_for_norm == [False]
    assert PRETRAINING.transpose_forward == PRETRAINING.transpose_backward == [0, 1, 2]


def test_all_is_taken_over() -> None:
    plans = v1_plans(
        input_channels=3,
        modalities={0: "CT", 1: "MR", 2: "noNorm"},
        normalization_schemes=OrderedDict([(0, "CT"), (1, "nonCT"), (2, "noNorm")]),
        use_mask_for_norm=OrderedDict([(0, False), (1, True), (2, False)]),
        dataset_properties={"intensityproperties": OrderedDict([(0, STATISTICS), (1, STATISTICS), (2, STATISTICS)])},
        transpose_forward=[2, 0, 1],
        transpose_backward=[1, 2, 0],
    )
    got = read(plans, ("", 0, "", "", True, 0), channels=3)
    assert got.spacing == [3.0, 0.8, 0.9]
    assert got.median_spacing == [3.5, 0.7, 0.7]
    assert got.patch_size == [32, 48, 64]
    assert got.median_shape == [100.0, 200.0, 201.0]
    assert got.batch_size == 4
    assert got.batch_dice is True
    assert got.strides == STRIDES
    assert got.channel_names == ["CT", "MR", "noNorm"]
    assert got.normalization_schemes == ["CTNormalization", "ZScoreNormalization", "NoNormalization"]
    assert got.use_mask_for_norm == [False, True, False]
    assert (got.transpose_forward, got.transpose_backward) == ([2, 0, 1], [1, 2, 0])
    assert got.intensity_properties[0] == {
        "mean": 70.5, "median": 60.0, "std": 40.25, "min": -900.0, "max": 2000.0, "percentile_00_5": -80.0,
        "percentile_99_5": 250.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["PreprocessorFor2D", "Preprocessor3DDifferentResampling", "GenericPreprocessor_scale_uint8_to_0_1"]
)
def test_another_preparation_of_images_is_refused(name: str) -> None:
    assert read(v1_plans(preprocessor_name="GenericPreprocessor")) == read(v1_plans())
    with pytest.raises(PlansError, match=f"x\\.model\\.pkl.*preprocessor_name is {name};"):
        read(v1_plans(preprocessor_name=name))


def test_the_stage_is_the_trainers_else_the_finest() -> None:
    coarse = v1_stage(current_spacing=np.array([4.0, 4.0, 4.0]))
    plans = v1_plans(plans_per_stage={0: coarse, 1: v1_stage()})
    assert read(plans).spacing == [3.0, 0.8, 0.9]
    assert read(plans, ("", 0, "", "", False, 0)).spacing == [4.0, 4.0, 4.0]


def test_few_strides_are_padded() -> None:
    plans = v1_plans(plans_per_stage={0: v1_stage(pool_op_kernel_sizes=[[1, 2, 2], [2, 2, 2], [2, 2, 2]])})
    assert read(plans).strides == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1], [1, 1, 1]]


def test_plans_of_v2_say_the_same() -> None:
    plans = make_plans(read(v1_plans()), TINY)
    assert plans["plans_name"] == "STUNetPlans_d111111w2"
    assert plans["original_median_shape_after_transp"] == [100, 200, 201]
    assert plans["foreground_intensity_properties_per_channel"] == {"0": {}}
    configuration = resolve_configuration(plans, "3d_fullres")
    assert configuration["spacing"] == [3.0, 0.8, 0.9]
    assert configuration["patch_size"] == [32, 48, 64]
    assert configuration["architecture"]["arch_kwargs"]["strides"] == STRIDES
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [2, 4, 8, 16, 32, 32]
    assert configuration["resampling_fn_data_kwargs"]["order"] == 3
    assert configuration["resampling_fn_probabilities_kwargs"] == {
        "is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"num_classes": 9}, "num_classes is 8 instead of 2"),
        ({"num_modalities": 2}, "num_modalities is 2"),
        ({"normalization_schemes": OrderedDict([(0, "CT")])}, "no mean, sd, percentile"),
        ({"normalization_schemes": OrderedDict([(0, "CT2")])}, "CT2"),
        ({"normalization_schemes": OrderedDict()}, "without a value for channel 0"),
        ({"transpose_backward": [1, 2, 0]}, "an order and its inverse"),
        ({"transpose_forward": [0, 1, 1]}, "an order and its inverse"),
        ({"plans_per_stage": {0: {}}}, "KeyError: 'current_spacing'"),
        ({"plans_per_stage": [1]}, "plans of nnU-Net v1 that cannot be used"),
        ({"plans_per_stage": {"a": {}}}, "KeyError: 'current_spacing'"),
        ({"plans_per_stage": {0: v1_stage(patch_size="abc")}}, "could not convert string to float"),
        ({"plans_per_stage": {0: v1_stage(patch_size=[32, 32])}}, "three numbers"),
        ({"plans_per_stage": {0: v1_stage(current_spacing=[1.0, float("nan"), 1.0])}}, "three numbers above 0"),
        ({"plans_per_stage": {0: v1_stage(pool_op_kernel_sizes=[[0, 2, 2]])}}, "three numbers above 0"),
        ({"plans_per_stage": {0: v1_stage(pool_op_kernel_sizes=3)}}, "not iterable"),
        ({"dataset_properties": {"intensityproperties": {0: {"mean": "x"}}}}, "could not convert string to float"),
    ],
)
def test_plans_that_cannot_be_used(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlansError, match=expected):
        read(v1_plans(**more))


def test_a_patch_that_the_strides_do_not_divide() -> None:
    plans = v1_plans(plans_per_stage={0: v1_stage(patch_size=[32, 48, 50])})
    with pytest.raises(PlansError, match=r"set patch_size to \[32, 48, 64\]"):
        make_plans(read(plans), TINY)
