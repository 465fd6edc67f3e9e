"""Presets in plans: sizes, and pre-training as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from plans import make_plans
from stunet.cli.options import complete_presets
from stunet.network import SIZES, find_size
from stunet.planning.plans import PRETRAINING, apply_preset, load_preset, plans_size, rewrite_plans


def test_the_preset_is_what_the_published_plans_say() -> None:
    assert complete_presets() == ["totalsegmentator"]
    assert load_preset("totalsegmentator")["settings"]["num_epochs"] == 4000
    assert PRETRAINING.strides == [[1, 1, 1], *[[2, 2, 2]] * 4, [1, 1, 2]]


def planned(**more: Any) -> dict[str, Any]:
    return {
        **make_plans(), "original_median_spacing_after_transp": [3.0, 0.75, 1.5],
        "original_median_shape_after_transp": [100, 200, 300], "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0], **more,
    }  # fmt: skip


def test_images_are_prepared_as_published_whatever_nnunet_planned() -> None:
    before = planned()
    plans = apply_preset(before, "totalsegmentator")
    assert before == planned()
    assert (plans["transpose_forward"], plans["transpose_backward"]) == ([0, 1, 2], [0, 1, 2])
    # the axes in the images' own order, and the median image at 1.5 mm
    assert plans["original_median_spacing_after_transp"] == [0.75, 1.5, 3.0]
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["median_image_size_in_voxels"] == [100.0, 300.0, 200.0]
    assert list(plans["configurations"]) == ["3d_fullres"]
    rewritten = rewrite_plans(plans, size=find_size("base"), plans_name="STUNetPlans_base_totalsegmentator")
    manager = PlansManager(rewritten).get_configuration("3d_fullres")
    assert manager.patch_size == [128, 128, 128]
    assert list(manager.spacing) == [1.5, 1.5, 1.5]
    assert manager.batch_size == 2
    assert manager.normalization_schemes == ["ZScoreNormalization"]
    assert manager.pool_op_kernel_sizes == [[1, 1, 1], *[[2, 2, 2]] * 4, [1, 1, 2]]
    # data of its own, which all sizes share
    assert manager.data_identifier == "STUNetPlans_totalsegmentator_3d_fullres"


def test_every_channel_is_normalized() -> None:
    statistics = make_plans()["foreground_intensity_properties_per_channel"]["0"]
    plans = apply_preset(
        planned(foreground_intensity_properties_per_channel={"0": statistics, "1": statistics}), "totalsegmentator"
    )
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"] * 2
    assert configuration["use_mask_for_norm"] == [False, False]


@pytest.mark.parametrize("name", SIZES)
def test_every_preset_builds(name: str) -> None:
    preset = load_preset(name)
    assert preset["size"] == name
    manager = PlansManager(
        rewrite_plans(make_plans(), size=SIZES[name], plans_name="x", settings=preset["settings"])
    ).get_configuration("3d_fullres")
    with torch.device("meta"):
        network = get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            1,
            3,
            deep_supervision=True,
        )
        outputs = network(torch.zeros(1, 1, *manager.patch_size))
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), list(network.parameters()))
    assert all(g is not None for g in gradients)
    assert plans_size(manager.configuration) == SIZES[name]
