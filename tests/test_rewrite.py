"""Rewritten plans: what is new, and that all the rest stays."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from plans import make_plans
from stunet.errors import PlansError, SettingsError
from stunet.network import STUNet, STUNetSize, find_size
from stunet.planning.plans import fit_strides, is_stunet, plans_size, rewrite_configuration, rewrite_plans

SIZE = STUNetSize("mine", (1, 1, 2, 1, 1, 1), 2)


def rewrite(plans: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return rewrite_plans(plans or make_plans(), **{"size": SIZE, "plans_name": "STUNetPlans_mine", **kwargs})


def without_architectures(plans: dict[str, Any]) -> dict[str, Any]:
    stripped = deepcopy(plans)
    stripped.pop("plans_name")
    for configuration in stripped["configurations"].values():
        configuration.pop("architecture", None)
    return stripped


def test_everything_but_name_and_architecture_stays() -> None:
    before = make_plans()
    snapshot = deepcopy(before)
    after = rewrite(before)
    assert before == snapshot
    assert without_architectures(after) == without_architectures(before)
    assert after["plans_name"] == "STUNetPlans_mine"
    assert list(after["configurations"]) == list(before["configurations"])
    assert "architecture" not in after["configurations"]["3d_cascade_fullres"]
    assert json.loads(json.dumps(after)) == after


@pytest.mark.parametrize("name", ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_nnunet_builds_every_configuration(name: str, deep_supervision: bool) -> None:
    manager = PlansManager(rewrite()).get_configuration(name)
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        2,
        3,
        deep_supervision=deep_supervision,
    )
    assert isinstance(network, STUNet)
    outputs = network(torch.zeros(1, 2, *manager.patch_size))
    assert len(manager.pool_op_kernel_sizes) == 6
    if deep_supervision:
        # nnU-Net downsamples the labels by these very products.
        scale, expected = [1] * len(manager.patch_size), []
        for stride in manager.pool_op_kernel_sizes[:-1]:
            scale = [a * b for a, b in zip(scale, stride, strict=True)]
            expected.append([n // s for n, s in zip(manager.patch_size, scale, strict=True)])
        assert [list(output.shape[2:]) for output in outputs] == expected
    else:
        assert outputs.shape == (1, 3, *manager.patch_size)


def test_strides_are_padded_and_cut_to_six() -> None:
    assert fit_strides([[1, 1], [2, 2]]) == [[1, 1], [2, 2], [1, 1], [1, 1], [1, 1], [1, 1]]
    seven = [[i, i] for i in range(1, 8)]
    assert fit_strides(seven) == seven[:6]


def test_settings_go_where_they_count() -> None:
    settings = {"num_epochs": 5, "batch_size": 7, "activation_checkpointing": "all"}
    after = rewrite(settings=settings, configurations=["3d_fullres"])
    fullres = after["configurations"]["3d_fullres"]
    assert fullres["stunet"] == {"num_epochs": 5}
    assert fullres["batch_size"] == 7
    assert fullres["architecture"]["arch_kwargs"]["activation_checkpointing"] == "all"
    cascade = PlansManager(after).get_configuration("3d_cascade_fullres").configuration
    assert is_stunet(cascade)
    assert cascade["stunet"] == {"num_epochs": 5}
    before = make_plans()["configurations"]
    assert after["configurations"]["2d"] == before["2d"]
    assert after["configurations"]["3d_lowres"] == before["3d_lowres"]


def test_a_configuration_that_inherits_can_be_rewritten_alone() -> None:
    after = rewrite(configurations=["3d_cascade_fullres"], settings={"num_epochs": 2})
    cascade = after["configurations"]["3d_cascade_fullres"]
    assert cascade["inherits_from"] == "3d_fullres"
    assert cascade["previous_stage"] == "3d_lowres"
    assert is_stunet(cascade)
    assert not is_stunet(after["configurations"]["3d_fullres"])


def test_rewriting_again_keeps_settings_and_changes_the_size() -> None:
    once = rewrite(settings={"num_epochs": 5, "activation_checkpointing": "encoder"})
    twice = rewrite(once, size=find_size("small"), settings={"initial_lr": 0.1})
    for name in ("2d", "3d_lowres", "3d_fullres"):
        configuration = twice["configurations"][name]
        assert plans_size(configuration).name == "small"
        assert configuration["stunet"] == {"num_epochs": 5, "initial_lr": 0.1}
        assert configuration["architecture"]["arch_kwargs"]["activation_checkpointing"] == "encoder"
    assert rewrite(once) == once


def test_a_users_own_block_is_read() -> None:
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["stunet"] = {"num_epochs": 5, "activation_checkpointing": "all"}
    fullres = rewrite(plans)["configurations"]["3d_fullres"]
    assert fullres["stunet"] == {"num_epochs": 5}
    assert fullres["architecture"]["arch_kwargs"]["activation_checkpointing"] == "all"
    plans["configurations"]["3d_fullres"]["stunet"] = {"epochs": 5}
    with pytest.raises(SettingsError, match=r"3d_fullres[\s\S]*epochs[\s\S]*num_epochs"):
        rewrite(plans)


@pytest.mark.parametrize("block", ["abc", None, [1], 3])
def test_a_block_that_is_no_object(block: Any) -> None:
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["stunet"] = block
    with pytest.raises(SettingsError, match=r"configuration 3d_fullres.* instead of an object"):
        rewrite(plans)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [((), "stunet", {}), ((), "STUNet", {}), (("configurations", "2d"), "STUNet", {}),
     (("configurations", "3d_fullres"), "num_epochs", 200)],
)  # fmt: skip
def test_settings_that_nothing_would_read(place: tuple[str, ...], key: str, value: Any) -> None:
    plans = make_plans()
    target = plans
    for part in place:
        target = target[part]
    target[key] = value
    with pytest.raises(SettingsError, match=rf"nothing reads[\s\S]*{key}"):
        rewrite(plans)


def test_inheritance_is_the_same_for_plans_and_trainers() -> None:
    plans = make_plans()
    configurations = plans["configurations"]
    configurations["3d_fullres"]["stunet"] = {"batch_size": 4, "num_epochs": 9}
    configurations["3d_bs1"] = {"inherits_from": "3d_fullres", "batch_size": 1}
    configurations["3d_bs3"] = {"inherits_from": "3d_bs1", "stunet": {"batch_size": 3, "initial_lr": 0.5}}
    after = rewrite(plans, settings={"save_every": 7})
    for name, batch_size, settings in (
        ("3d_fullres", 4, {"num_epochs": 9, "save_every": 7}),
        ("3d_cascade_fullres", 4, {"num_epochs": 9, "save_every": 7}),
        ("3d_bs1", 1, {"num_epochs": 9, "save_every": 7}),
        ("3d_bs3", 3, {"initial_lr": 0.5, "save_every": 7}),
    ):
        by_plan = PlansManager(after).get_configuration(name).configuration
        by_trainer = rewrite_configuration(plans, name, size=SIZE, settings={"save_every": 7})
        resolved = PlansManager({**plans, "configurations": {**configurations, name: by_trainer}})
        for got in (by_plan, resolved.get_configuration(name).configuration):
            assert is_stunet(got)
            assert got["batch_size"] == batch_size
            assert got["stunet"] == settings


@pytest.mark.parametrize(
    ("child", "error", "message"),
    [
        ({"stunet": {"epochs": 1}}, SettingsError, "child"),
        ({"patch_size": [41, 56, 40]}, PlansError, "child: patch_size .*41, 56, 40"),
        ({"inherits_from": "parent"}, PlansError, "child cannot be read"),
        ({"inherits_from": "child"}, PlansError, "child cannot be read"),
    ],
)
def test_what_inherits_is_checked_too(child: dict[str, Any], error: type[Exception], message: str) -> None:
    plans = make_plans()
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres", **child}
    with pytest.raises(error, match=message):
        rewrite(plans)


def test_architectures_that_are_not_convolutional() -> None:
    plans = make_plans()
    del plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(PlansError, match=r"2d cannot be read[\s\S]*strides"):
        rewrite(plans)
    after = rewrite(plans, configurations=["3d_fullres"])
    assert after["configurations"]["2d"] == plans["configurations"]["2d"]


def test_plans_of_early_nnunet_v2_are_understood() -> None:
    plans = make_plans()
    configuration = plans["configurations"]["3d_fullres"]
    kwargs = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 32,
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [3, 3, 3],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }
    with pytest.warns(UserWarning, match="old nnU-Net plans"):
        after = rewrite(plans)["configurations"]["3d_fullres"]
    assert after == rewrite()["configurations"]["3d_fullres"]


@pytest.mark.parametrize("patch_size", [[40, 56, 42], [40, 60, 40], [20, 28, 28]])
def test_a_patch_that_the_strides_do_not_divide(patch_size: list[int]) -> None:
    with pytest.raises(PlansError, match=r"multiples of \[8, 8, 8\]"):
        rewrite(configurations=["3d_fullres"], settings={"patch_size": patch_size})


def test_a_patch_with_too_few_axes_or_too_few_voxels() -> None:
    with pytest.raises(PlansError, match="strides of 3 axes"):
        rewrite(configurations=["3d_fullres"], settings={"patch_size": [64, 64]})
    with pytest.raises(PlansError, match="one voxel at the coarsest stage"):
        rewrite(configurations=["3d_fullres"], settings={"patch_size": [8, 8, 8]})


def test_unknown_configuration_lists_the_known() -> None:
    with pytest.raises(PlansError, match=r"3d_full[\s\S]*2d, 3d_lowres, 3d_fullres, 3d_cascade_fullres"):
        rewrite(configurations=["3d_full"])


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"plans_per_stage": {}}, "nnU-Net v1"),
        ({"labels": {}}, "not a plans file"),
        ([1, 2], "not a plans file"),
        ({"configurations": {}}, "no configuration has a network"),
    ],
)
def test_what_is_no_plans_file(plans: Any, message: str) -> None:
    with pytest.raises(PlansError, match=message):
        rewrite_plans(plans, size=SIZE, plans_name="x")
