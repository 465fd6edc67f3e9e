"""Checkpoints as candidates: whatever fits is read with its own weights, whatever does not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from networks import UNET_PATCH, UNET_STRIDES, unet, unet_architecture, write_unet
from torch import nn
from weights import TINY, tiny_weights, write_v1

from stunet.errors import ArchitectureError, CheckpointError, UsageError
from stunet.network import STUNetSize, build_stunet
from stunet.ranking.points import draw_points, extract_case, read_stages
from stunet.ranking.ranking import Candidate, build_candidate, name_checkpoints, read_zoo
from stunet.weights.convert import open_any_weights, trained_parts
from stunet.weights.transfer import adapt_stem

PATCH = (32, 32, 32)
OTHER = STUNetSize("d112111w3", (1, 1, 2, 1, 1, 1), 3)
OTHER_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]


def build(path: Path, channels: int = 1, strides: Any = OTHER_STRIDES, **more: Any) -> Candidate:
    return build_candidate(path, **{"input_channels": channels, "patch_size": PATCH, "strides": strides, **more})


def write_stunet(path: Path, *, labels: dict[str, Any] | None = None, channels: int = 1, **more: Any) -> Path:
    weights = tiny_weights(num_classes=4, input_channels=channels, **more)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    init_args = {"dataset_json": {"labels": labels or {"background": 0, "a": 1, "b": 2, "c": 3}}}
    torch.save({"network_weights": weights, "current_epoch": 7, "init_args": init_args}, path)
    return path


def features(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(read_stages(network, x, torch.Tensor.clone, "decoder"))


@pytest.mark.parametrize("size", [TINY, OTHER])
def test_a_stunet_of_any_size_gets_the_targets_strides(tmp_path: Path, size: STUNetSize) -> None:
    path = write_stunet(tmp_path / "x.pth", size=size)
    candidate = build(path)
    reference = build_stunet(size, 1, 4, OTHER_STRIDES).eval()
    reference.load_state_dict(torch.load(path)["network_weights"])
    x = torch.randn(1, 1, *PATCH)
    for ours, theirs in zip(features(candidate.network, x), features(reference, x), strict=True):
        assert torch.equal(ours, theirs)
    description = candidate.description
    assert description["network"] == f"STU-Net {size.name}"
    assert (description["epoch"], description["n_outputs"]) == (7, 4)
    assert description["outputs"] == ("background", "a", "b", "c")
    heads = sum(p.numel() for p in reference.decoder.seg_layers.parameters())
    assert description["parameters"] == sum(p.numel() for p in reference.parameters()) - heads
    assert candidate.patch_size == PATCH
    assert not candidate.network.training
    assert description["stem"] == ""


def test_the_heads_probabilities_are_the_source_models(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    candidate = build(path)
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


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunets_networks_keep_their_strides(tmp_path: Path, name: str) -> None:
    original = unet(name)
    candidate = build(write_unet(tmp_path / "x.pth", original))
    assert candidate.description["network"] == name
    for patch, fitted in ((PATCH, PATCH), ((7, 16, 13), (8, 16, 16))):
        assert build(tmp_path / "x.pth", patch_size=patch).patch_size == fitted
    # One voxel at the coarsest stage, of stride (2, 4, 4), would have no norm.
    assert build(tmp_path / "x.pth", patch_size=(1, 1, 1)).patch_size == (4, 4, 4)
    x = torch.randn(1, 1, *UNET_PATCH)
    for ours, theirs in zip(features(candidate.network, x), features(original, x), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        logits = original(x)
    assert candidate.head is not None
    fine = features(candidate.network, x)[0]
    ours = candidate.head.probabilities(fine[0].flatten(1).T)
    torch.testing.assert_close(ours, logits.softmax(1)[0].flatten(1).T)


@pytest.mark.parametrize("kind", ["STU-Net", "PlainConvUNet", "ResidualEncoderUNet"])
def test_a_stem_for_other_channels(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pth"
    if kind == "STU-Net":
        write_stunet(path)
        key = "encoder.stages.0.0.conv1.weight"
    else:
        write_unet(path, unet(kind))
        key = f"encoder.{'stages.0.0.convs' if kind == 'PlainConvUNet' else 'stem.convs'}.0.conv.weight"
    candidate = build(path, 3)
    weights, state = torch.load(path)["network_weights"], candidate.network.state_dict()
    assert state[key].shape[1] == 3
    assert torch.equal(state[key], adapt_stem(weights[key], torch.full_like(state[key], 9.0), "repeat-scaled"))
    same = [k for k in weights if "seg_layers" not in k and weights[k].shape == state[k].shape]
    assert len(same) > 10
    assert all(torch.equal(weights[k], state[k]) for k in same)
    description = candidate.description
    assert (description["source_channels"], description["input_channels"]) == (1, 3)
    assert description["stem"] == "repeat-scaled"
    x = torch.randn(1, 3, *PATCH)
    assert all(torch.isfinite(m).all() for m in features(candidate.network, x))


def test_what_does_not_fit_is_refused_by_what_differs(tmp_path: Path) -> None:
    stunet = write_stunet(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="3D weights for 2D patches"):
        build_candidate(stunet, input_channels=1, patch_size=(32, 32), strides=[[1, 1]] * 6)
    with pytest.raises(ArchitectureError, match="strides"):
        build(stunet, strides=UNET_STRIDES)


def test_broken_files_raise(tmp_path: Path) -> None:
    path = write_stunet(tmp_path / "x.pth")
    content = torch.load(path)
    content["network_weights"]["encoder.stages.2.0.conv1.weight"][0, 0] = torch.nan
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"not finite[\s\S]*encoder\.stages\.2\.0\.conv1\.weight"):
        build(path)
    del content["network_weights"]["encoder.stages.2.0.conv1.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"encoder\.stages\.2\.0\.conv1\.weight is missing"):
        build(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="truncated"):
        build(path)
    with pytest.raises(CheckpointError, match="missing checkpoint"):
        build(tmp_path / "none.pth")


@pytest.mark.parametrize("kind", ["STU-Net", "PlainConvUNet"])
def test_regions_give_no_probabilities(tmp_path: Path, kind: str) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "edge": 3, "ignore": 4}
    path = tmp_path / "x.pth"
    if kind == "STU-Net":
        write_stunet(path, labels={**labels, "more": 5})
    else:
        write_unet(path, unet(), labels=labels)
    candidate = build(path)
    assert candidate.head is None
    assert candidate.description["exclusive"] is False
    assert candidate.description["outputs"][:3] == ("whole", "core", "edge")


def test_outputs_that_nothing_names(tmp_path: Path) -> None:
    candidate = build(write_v1(tmp_path, tiny_weights(num_classes=4), None))
    assert candidate.head is not None
    assert candidate.description["outputs"] is None
    assert candidate.head.weight.shape == (4, 2)


def _touch(root: Path, *paths: str) -> list[Path]:
    found = []
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        found.append(file)
    return found


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["m1/fold_0/checkpoint_final.pth", "m2/fold_0/checkpoint_final.pth"], ["m1", "m2"]),
        (["m/fold_0/checkpoint_final.pth", "m/fold_1/checkpoint_final.pth"], ["fold_0", "fold_1"]),
        (["m/f/checkpoint_final.pth", "m/f/checkpoint_best.pth"], ["checkpoint_final", "checkpoint_best"]),
        (["a/x/best.pth", "a/y/best.pth", "b/x/best.pth"], ["a/x", "a/y", "b/x"]),
        (["one/checkpoint_final.pth"], ["checkpoint_final"]),
    ],
)
def test_names_are_what_differs(tmp_path: Path, paths: list[str], names: list[str]) -> None:
    files = _touch(tmp_path, *paths)
    assert list(name_checkpoints(files).items()) == list(zip(names, files, strict=True))


def test_zoo_file(tmp_path: Path) -> None:
    a, b = _touch(tmp_path, "zoo/a/final.pth", "b.pth")
    zoo = tmp_path / "zoo" / "zoo.yaml"
    zoo.write_text("checkpoints:\n  - {name: 'A, long', path: a/final.pth}\n  - path: ../b.pth\n")
    assert list(read_zoo(zoo).items()) == [("A, long", a), ("b", b)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("checkpoints: [", "zoo.yaml"),
        ("- a.pth", "Expected object, got array"),
        ("models: []", "models"),
        ("checkpoints: []", "checkpoints: Expected array of length >= 1"),
        ("checkpoints: [{path: a.pth, weight: 2}]", "weight"),
        ("checkpoints: [a.pth]", "checkpoints[0]"),
        ("checkpoints: [{path: a.pth}, {path: gone.pth}]", "gone.pth"),
        ("checkpoints: [{path: a.pth, name: x}, {path: b.pth, name: x}]", "x twice"),
        ("checkpoints: [{path: a.pth, name: 3}]", "checkpoints[0].name"),
        ("checkpoints: [{path: a.pth, name: ''}]", "checkpoints[0].name"),
        ("checkpoints: [{path: a.pth, name: ' '}]", "checkpoints[0].name"),
        ("checkpoints: [{path: a.pth}, {path: a.pth}]", "a.pth"),
        ("checkpoints: [{path: a.pth, path: b.pth}]", "duplicate key 'path'"),
    ],
)
def test_bad_zoo_files(tmp_path: Path, content: str, problem: str) -> None:
    _touch(tmp_path, "a.pth", "b.pth")
    zoo = tmp_path / "zoo.yaml"
    zoo.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_zoo(zoo)
    assert problem in str(caught.value)


def test_checkpoints_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.pth"):
        name_checkpoints([tmp_path / "gone.pth"])


def write_nnssl(path: Path, weights: dict[str, torch.Tensor], name: str, prefix: str = "", **described: Any) -> Path:
    """A checkpoint as nnssl's users share it, with the plan of its adaptation."""
    plan = {
        "architecture_plans": {"arch_class_name": name, "arch_kwargs": None, **described},
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [160, 160, 160]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": f"{prefix}encoder.stages",
        "key_to_stem": f"{prefix}encoder.stem",
        "keys_to_in_proj": [f"{prefix}encoder.stem.convs.0.conv"],
        "key_to_lpe": None,
    }
    state = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
    torch.save({"network_weights": state, "nnssl_adaptation_plan": plan, "trainer_name": "BaseMAETrainer"}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_encoder_of_an_nnssl_checkpoint_is_read(tmp_path: Path, name: str, decoder: bool, prefix: str) -> None:
    network, described = unet(name), unet_architecture(name)
    weights = {key: tensor for key, tensor in network.state_dict().items() if decoder or key.startswith("encoder.")}
    arguments = {
        "arch_kwargs": described["arch_kwargs"],
        "arch_kwargs_requiring_import": described["_kw_requires_import"],
    }
    path = write_nnssl(tmp_path / "x.pth", weights, name, prefix, **arguments)
    candidate = build_candidate(path, input_channels=1, patch_size=UNET_PATCH, strides=OTHER_STRIDES)
    x = torch.randn(1, 1, *UNET_PATCH)
    with torch.no_grad():
        expected = network.encoder(x)
        found = read_stages(candidate.network, x, torch.Tensor.clone, "encoder")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert candidate.head is None
    assert candidate.description["pretext"] == "BaseMAETrainer"
    assert trained_parts(path) == ("encoder",)


@pytest.mark.parametrize("name", ["ResEncL", "NoSkipResEncL"])
def test_nnssls_large_network_has_its_published_shape(tmp_path: Path, name: str) -> None:
    network = ResidualEncoderUNet(
        1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], [1, 3, 4, 6, 6, 6], 1, [1] * 5,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    weights = {key: tensor.half() for key, tensor in network.state_dict().items() if key.startswith("encoder.")}
    assert len(weights) == 448, "as in the published checkpoint"
    opened = open_any_weights(write_nnssl(tmp_path / "x.pth", weights, name))
    assert opened.trained == ("encoder",)
    key = "encoder.stages.5.blocks.5.conv2.conv.weight"
    assert torch.equal(opened.tensors[key], weights[key].float())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [("PrimusM", {}, ["PrimusM", "U-Net"]), ("ResEncL", {"encoder.stages.0.x": torch.ones(1)}, ["stem"])],
)
def test_what_else_nnssl_trains_is_refused(
    tmp_path: Path, name: str, given: dict[str, torch.Tensor], words: list[str]
) -> None:
    path = write_nnssl(tmp_path / "x.pth", given, name)
    with pytest.raises(CheckpointError) as refusal:
        build(path)
    assert all(word in str(refusal.value) for word in words)
