"""Weights of nnU-Net's own networks, and plans that must not be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import UNET_PATCH, unet, unet_architecture, write_unet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from weights import tiny_weights, write_v1

from plans import configuration, make_plans
from stunet.errors import CheckpointError
from stunet.weights.convert import SourceWeights, UNetWeights, open_any_weights
from stunet.weights.transfer import source_outputs

NAMES = ["PlainConvUNet", "ResidualEncoderUNet"]


def opened(path: Path) -> UNetWeights:
    weights = open_any_weights(path)
    assert isinstance(weights, UNetWeights)
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_a_network_built_from_the_checkpoint_does_the_same(tmp_path: Path, name: str) -> None:
    original = unet(name, 2, 3)
    weights = opened(write_unet(tmp_path / "x.pth", original))
    architecture = weights.architecture
    assert (architecture.name, architecture.input_channels, architecture.num_classes) == (name, 2, 3)
    assert (architecture.n_axes, weights.epoch) == (3, 5)
    network = architecture.build(2, 3).eval()
    network.load_state_dict(weights.tensors, strict=True)
    x = torch.randn(1, 2, *UNET_PATCH)
    with torch.no_grad():
        assert torch.equal(network(x), original(x))
    outputs = source_outputs(weights)
    assert outputs is not None
    assert outputs.names == ("background", "liver", "spleen")


def test_two_axes_prefixes_and_half_precision(tmp_path: Path) -> None:
    strides = [[1, 1], [2, 2], [2, 1]]
    original = unet("PlainConvUNet", strides=strides).half()
    path = write_unet(tmp_path / "x.pth", original, described=unet_architecture("PlainConvUNet", strides))
    content = torch.load(path, weights_only=True)
    content["network_weights"] = {f"_orig_mod.{key}": value for key, value in content["network_weights"].items()}
    torch.save(content, path)
    weights = opened(path)
    assert weights.architecture.n_axes == 2
    for key, value in original.state_dict().items():
        assert torch.equal(weights.tensors[key], value.float())


def test_a_model_folder_and_a_stunet(tmp_path: Path) -> None:
    (tmp_path / "model" / "fold_0").mkdir(parents=True)
    write_unet(tmp_path / "model" / "fold_0" / "checkpoint_final.pth", unet())
    assert opened(tmp_path / "model").path == tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    assert isinstance(open_any_weights(write_v1(tmp_path, tiny_weights(), None)), SourceWeights)


@pytest.mark.parametrize("name", NAMES)
def test_plans_before_nnunet_2_2_as_nnunet_translates_them(tmp_path: Path, name: str) -> None:
    own = configuration("3d_fullres", list(UNET_PATCH), [[1, 1, 1]])
    del own["architecture"]
    own |= {
        "UNet_class_name": name, "UNet_base_num_features": 4, "unet_max_num_features": 10,
        "n_conv_per_stage_encoder": [1, 2, 2], "n_conv_per_stage_decoder": [2, 1], "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    }  # fmt: skip
    plans = {**make_plans(), "configurations": {"3d_fullres": own, "3d_large": {"inherits_from": "3d_fullres"}}}
    theirs = PlansManager(plans).get_configuration("3d_large")
    arguments = {
        **theirs.network_arch_init_kwargs, "conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU,
    }  # fmt: skip
    network_class = type(unet(name))
    original = network_class(input_channels=1, num_classes=2, **arguments).eval()
    weights = opened(write_unet(tmp_path / "x.pth", original, plans=plans))
    network = weights.architecture.build(1, 2).eval()
    network.load_state_dict(weights.tensors)
    x = torch.randn(1, 1, *UNET_PATCH)
    with torch.no_grad():
        assert torch.equal(network(x), original(x))


def changed(**more: Any) -> dict[str, Any]:
    described = unet_architecture()
    return {**described, "arch_kwargs": {**described["arch_kwargs"], **more}}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({**unet_architecture(), "network_class_name": "os.system"}, r"not trusted[\s\S]*os\.system[\s\S]*--trust"),
        (changed(nonlin="os.system"), r"nonlin os\.system"),
        (changed(nonlin="torch.nn.Module"), r"nonlin torch\.nn\.Module"),
        (changed(norm_op="torch.nn.modules.instancenorm.os.system"), "norm_op"),
        (changed(conv_op=3), "conv_op 3"),
        (changed(features_per_stage=[4, 8, 10**9]), "features_per_stage"),
        (changed(n_stages=10**6), "n_stages"),
        (changed(strides=[[1, 1, 1]] * 10**4), "strides"),
        (changed(nonlin_kwargs={"inplace": "yes"}), "nonlin_kwargs"),
        (changed(unheard_of=1), "unheard_of"),
        (changed(n_stages=4), "AssertionError"),
        (changed(features_per_stage=[4, 8, 32]), r"encoder\.stages\.2\.\S+ is \(16, 8, 3, 3, 3\) instead of \(32, 8"),
        ({"network_class_name": "PlainConvUNet"}, "arch_kwargs"),
        (changed(n_conv_per_stage=[8192] * 32), "more than 1000 convolutions"),
    ],
)
def test_plans_that_are_not_believed(tmp_path: Path, described: dict[str, Any], message: str) -> None:
    arguments = {"strides": [[1, 1, 1]], **described.get("arch_kwargs", {})}
    plans = make_plans()
    own = configuration("3d_fullres", list(UNET_PATCH), arguments["strides"], architecture=described)
    plans["configurations"] = {"3d_large": own}
    with pytest.raises(CheckpointError, match=message):
        open_any_weights(write_unet(tmp_path / "x.pth", unet(), plans=plans))


def test_configurations_that_lead_nowhere(tmp_path: Path) -> None:
    circle = {
        **make_plans(),
        "configurations": {"3d_large": {"inherits_from": "b"}, "b": {"inherits_from": "3d_large"}},
    }
    with pytest.raises(CheckpointError, match="inherits from itself"):
        open_any_weights(write_unet(tmp_path / "x.pth", unet(), plans=circle))
    old = {**make_plans(), "configurations": {"3d_large": {"UNet_class_name": "PlainConvUNet"}}}
    for plans in ({}, {"configurations": {}}, {"configurations": {"3d_large": {"inherits_from": "c"}}}, old):
        with pytest.raises(CheckpointError, match="do not say what network"):
            open_any_weights(write_unet(tmp_path / "x.pth", unet(), plans=plans))


def test_weights_that_are_no_network_or_not_finite(tmp_path: Path) -> None:
    network = unet()
    path = write_unet(tmp_path / "x.pth", network)
    content = torch.load(path, weights_only=True)
    without = {key: value for key, value in content["network_weights"].items() if "seg_layers" not in key}
    torch.save({**content, "network_weights": without}, path)
    with pytest.raises(CheckpointError, match="without the stem or the heads"):
        open_any_weights(path)
    with torch.no_grad():
        network.decoder.stages[0].convs[0].conv.weight[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite[\s\S]*decoder\.stages\.0\.convs\.0\.conv\.weight"):
        open_any_weights(write_unet(path, network))
