"""Checkpoints as candidates: whatever fits is read with its own weights, whatever does not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import UNET_PATCH, UNET_STRIDES, unet, write_unet
from torch import nn
from weights import STRIDES, TINY, tiny_weights, write_v1

from stunet.errors import ArchitectureError, CheckpointError, UsageError
from stunet.network import STUNet, STUNetSize, build_stunet
from stunet.ranking import (
    CandidateNetwork,
    FeatureHooks,
    Target,
    build_candidate,
    draw_points,
    extract_case,
    load_candidate,
)
from stunet.weights import adapt_stem

PATCH = (32, 32, 32)
OTHER = STUNetSize("d112111w3", (1, 1, 2, 1, 1, 1), 3)
OTHER_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]


def target(channels: int = 1, strides: Any = OTHER_STRIDES) -> Target:
    return Target(input_channels=channels, patch_size=PATCH, strides=strides)


def write_stunet(path: Path, *, labels: dict[str, Any] | None = None, channels: int = 1, **more: Any) -> Path:
    weights = tiny_weights(num_classes=4, input_channels=channels, **more)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    init_args = {"dataset_json": {"labels": labels or {"background": 0, "a": 1, "b": 2, "c": 3}}}
    torch.save({"network_weights": weights, "current_epoch": 7, "init_args": init_args}, path)
    return path


def features(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), FeatureHooks(network) as hooks:
        return hooks.run(x)


@pytest.mark.parametrize("size", [TINY, OTHER])
def test_a_stunet_of_any_size_gets_the_targets_strides(tmp_path: Path, size: STUNetSize) -> None:
    path = write_stunet(tmp_path / "x.pth", size=size)
    candidate = build_candidate(path, target())
    reference = build_stunet(size, 1, 4, OTHER_STRIDES).eval()
    reference.load_state_dict(torch.load(path)["network_weights"])
    x = torch.randn(1, 1, *PATCH)
    for ours, theirs in zip(features(candidate.network, x), features(reference, x), strict=True):
        assert torch.equal(ours, theirs)
    description = candidate.description
    assert description.network == f"STU-Net {size.name}"
    assert (description.epoch, description.n_outputs, description.outputs) == (7, 4, ("background", "a", "b", "c"))
    heads = sum(p.numel() for p in reference.decoder.seg_layers.parameters())
    assert description.parameters == sum(p.numel() for p in reference.parameters()) - heads
    assert candidate.fit_patch(PATCH) == PATCH
    assert not candidate.network.training
    assert description.as_dict()["stem"] == ""


def test_the_heads_probabilities_are_the_source_models(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    candidate = build_candidate(path, target())
    reference = build_stunet(TINY, 1, 4, OTHER_STRIDES).eval()
    reference.load_state_dict(torch.load(path)["network_weights"])
    image = np.random.default_rng(0).standard_normal((1, *PATCH)).astype(np.float32)
    labels = (image[0] > 1).astype(np.int8)
    points = draw_points(labels, case="x", per_class=9, n_whole=9)
    read = extract_case(candidate.network, image, points, patch_size=PATCH, head=candidate.head)
    with torch.no_grad():
        dense = reference(torch.from_numpy(image)[None]).softmax(1)[0]
    assert read.probabilities is not None
    np.testing.assert_allclose(read.probabilities, dense.numpy()[(slice(None), *points.balanced.T)].T, atol=1e-5)
    assert candidate.head is not None
    assert candidate.head.names == ("background", "a", "b", "c")


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunets_networks_keep_their_strides(tmp_path: Path, name: str) -> None:
    original = unet(name)
    candidate = build_candidate(write_unet(tmp_path / "x.pth", original), target())
    assert candidate.description.network == name
    assert candidate.total_stride == (2, 4, 4)
    assert candidate.fit_patch((7, 16, 13)) == (8, 16, 16)
    assert candidate.fit_patch((1, 1, 1)) == (4, 4, 4)  # one voxel at the coarsest stage would have no norm
    x = torch.randn(1, 1, *UNET_PATCH)
    for ours, theirs in zip(features(candidate.network, x), features(original, x), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        logits = original(x)
    assert candidate.head is not None
    fine = features(candidate.network, x)[0]
    ours = candidate.head.probabilities(fine[0].flatten(1).T)
    torch.testing.assert_close(ours, logits.softmax(1)[0].flatten(1).T)


@pytest.mark.parametrize("stem", ["repeat-scaled", "first", "zero-new", "random"])
@pytest.mark.parametrize("kind", ["STU-Net", "PlainConvUNet", "ResidualEncoderUNet"])
def test_other_channels_by_the_stem_policies(tmp_path: Path, kind: str, stem: Any) -> None:
    path = tmp_path / "x.pth"
    if kind == "STU-Net":
        write_stunet(path)
        key = "encoder.stages.0.0.conv1"
    else:
        write_unet(path, unet(kind))
        key = "encoder.stages.0.0.convs.0.conv" if kind == "PlainConvUNet" else "encoder.stem.convs.0.conv"
    candidate = build_candidate(path, target(channels=3), stem=stem)
    torch.rand(1)
    again = build_candidate(path, target(channels=3), stem=stem)
    weights = torch.load(path)["network_weights"]
    state, repeated = candidate.network.state_dict(), again.network.state_dict()
    ours = state[f"{key}.weight"]
    assert ours.shape[1] == 3
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, repeated[f"{key}.weight"])  # what is fresh is the same each time
    if stem in ("repeat-scaled", "zero-new"):
        assert torch.equal(ours, adapt_stem(weights[f"{key}.weight"], torch.full_like(ours, 9.0), stem))
    if stem == "first":
        assert torch.equal(ours[:, :1], weights[f"{key}.weight"])
        assert ours[:, 1:].std() > 0
    assert torch.equal(state[f"{key}.bias"], weights[f"{key}.bias"]) != (stem == "random")
    others = [k for k in weights if not any(part in k for part in ("seg_layers", "stages.0.0", "stem"))]
    assert len(others) > 10
    assert all(torch.equal(weights[k], state[k]) for k in others)
    assert (candidate.description.source_channels, candidate.description.input_channels) == (1, 3)
    assert candidate.description.stem == stem
    x = torch.randn(1, 3, *PATCH)
    assert all(torch.isfinite(m).all() for m in features(candidate.network, x))


def test_the_callers_random_numbers_stay(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    build_candidate(path, target(channels=2), stem="random")
    assert torch.equal(torch.rand(3), expected)


def test_a_network_of_the_plans_is_loaded_in_place(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    network = build_stunet(TINY, 1, 2, STRIDES, deep_supervision=True)
    heads = {k: v.clone() for k, v in network.state_dict().items() if "seg_layers" in k}
    candidate = load_candidate(path, network)
    assert candidate.network is network
    weights = torch.load(path)["network_weights"]
    for key, value in network.state_dict().items():
        assert torch.equal(value, heads[key] if key in heads else weights[key])
    original = unet()
    fresh = unet(num_classes=5)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    loaded: CandidateNetwork = load_candidate(write_unet(tmp_path / "y.pth", original), fresh)
    x = torch.randn(1, 1, *UNET_PATCH)
    assert torch.equal(features(loaded.network, x)[1], features(original, x)[1])


def refused(path: Path, network: nn.Module, message: str) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_candidate(path, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_does_not_fit_is_refused_by_what_differs(tmp_path: Path) -> None:
    stunet, plain = write_stunet(tmp_path / "x.pth"), write_unet(tmp_path / "y.pth", unet())
    refused(
        stunet,
        build_stunet(OTHER, 1, 2, STRIDES),
        r"another size[\s\S]*encoder\.stages\.2\.1\.conv1\.weight is missing",
    )
    refused(stunet, build_stunet(TINY, 1, 2, [[1, 1]] * 6, conv_op=nn.Conv2d), "2D network from 3D")
    refused(stunet, unet(), r"another kind[\s\S]*STU-Net[\s\S]*PlainConvUNet")
    refused(plain, build_stunet(TINY, 1, 2, STRIDES), r"another kind[\s\S]*got: .*PlainConvUNet[\s\S]*STUNet")
    refused(plain, unet("ResidualEncoderUNet"), r"another kind[\s\S]*ResidualEncoderUNet")
    strides = [UNET_STRIDES[0], [2, 2, 2], UNET_STRIDES[2]]
    shapes = r"encoder\.stages\.1\.0\.convs\.0\.conv\.weight is \(8, 4, 1, 3, 3\) instead of \(8, 4, 3, 3, 3\)"
    refused(plain, unet(strides=strides), rf"another architecture[\s\S]*{shapes}")
    refused(plain, unet(strides=UNET_STRIDES[:2]), "is not in the network")
    with pytest.raises(CheckpointError, match="3D weights for 2D patches"):
        build_candidate(stunet, Target(input_channels=1, patch_size=(32, 32), strides=[[1, 1]] * 6))
    with pytest.raises(ArchitectureError, match="impossible strides"):
        build_candidate(stunet, target(strides=UNET_STRIDES))
    for path in (stunet, plain):
        with pytest.raises(UsageError, match="unknown policy for the stem"):
            build_candidate(path, target(), stem="mean")  # type: ignore[arg-type]


def test_broken_files_raise(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    content = torch.load(path)
    content["network_weights"]["encoder.stages.2.0.conv1.weight"][0, 0] = torch.nan
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"not finite[\s\S]*encoder\.stages\.2\.0\.conv1\.weight"):
        build_candidate(path, target())
    del content["network_weights"]["encoder.stages.2.0.conv1.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"encoder\.stages\.2\.0\.conv1\.weight is missing"):
        build_candidate(path, target())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="truncated"):
        build_candidate(path, target())
    with pytest.raises(CheckpointError, match="missing checkpoint"):
        build_candidate(tmp_path / "none.pth", target())


def test_no_parameter_can_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a load leaves out is NaN, and so are the features; nothing runs on with random weights."""
    monkeypatch.setattr("stunet.ranking.candidates.transfer_weights", _no_transfer)
    candidate = build_candidate(write_stunet(tmp_path / "x.pth"), target())
    assert isinstance(candidate.network, STUNet)
    assert all(torch.isnan(m).all() for m in features(candidate.network, torch.randn(1, 1, *PATCH)))


def _no_transfer(*args: Any, **kwargs: Any) -> Any:
    class Report:
        input_channels = (1, 1)

    return Report()


@pytest.mark.parametrize("kind", ["STU-Net", "PlainConvUNet"])
def test_regions_give_no_probabilities(tmp_path: Path, kind: str) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "edge": 3, "ignore": 4}
    path = tmp_path / "x.pth"
    if kind == "STU-Net":
        write_stunet(path, labels={**labels, "more": 5})
    else:
        write_unet(path, unet(), labels=labels)
    candidate = build_candidate(path, target())
    assert candidate.head is None
    assert candidate.description.exclusive is False
    assert candidate.description.outputs is not None
    assert candidate.description.outputs[:3] == ("whole", "core", "edge")


def test_outputs_that_nothing_names(tmp_path: Path) -> None:
    candidate = build_candidate(write_v1(tmp_path, tiny_weights(num_classes=4), None), target())
    assert candidate.head is not None
    assert candidate.head.names is candidate.description.outputs is None
    assert candidate.head.weight.shape == (4, 2)
