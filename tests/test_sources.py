"""Weights out of every kind of file, the same whatever wrapped them; and files that hold something else."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from weights import TINY, published, tiny_weights, v1_plans, write_v1

from stunet.errors import CheckpointError, UsageError
from stunet.network import SIZES, STUNetSize, build_stunet
from stunet.weights.convert import infer_architecture, open_weights, write_published

KEY, PUBLISHED_KEY = "encoder.stages.0.0.conv1.weight", "conv_blocks_context.0.0.conv1.weight"
INIT_ARGS = {"plans": {"configurations": {}}, "configuration": "3d_fullres", "device": torch.device("cuda", 0)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in b)


def v2(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "network_weights": weights, "current_epoch": 12, "init_args": INIT_ARGS, "logging": {"a": [np.float64(1)]},
        "inference_allowed_mirroring_axes": (0, 2),
    }  # fmt: skip


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("nnU-Net v1", "published"), ("old nnU-Net v2 port", "published"), ("nnU-Net v2", "ours"),
        ("plain tensors", "published"), ("plain tensors", "ours"),
    ],
)  # fmt: skip
def test_every_wrapping_gives_the_same(tmp_path: Path, kind: str, names: str, prefix: str, legacy: bool) -> None:
    weights = tiny_weights()
    state = prefixed(published(weights) if names == "published" else weights, prefix)
    content = {"nnU-Net v1": {"epoch": 12, "state_dict": state}, "plain tensors": state}.get(kind, v2(state))
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    got = open_weights([tmp_path / "x.pth"])
    assert equal(got.tensors, weights)
    assert got.kind == kind
    assert got.epoch == (None if kind == "plain tensors" else 12)
    assert got.mirroring_axes == ((0, 2) if "v2" in kind else None)
    assert got.init_args.get("configuration") == ("3d_fullres" if "v2" in kind else None)
    assert got.precision == "float32"


@pytest.mark.parametrize("names", ["published", "ours"])
def test_safetensors(tmp_path: Path, names: str) -> None:
    weights = tiny_weights()
    save_file(dict(published(weights) if names == "published" else weights), tmp_path / "x.safetensors")
    got = open_weights([tmp_path / "x.safetensors"])
    assert equal(got.tensors, weights)
    assert got.kind == "safetensors"
    content = (tmp_path / "x.safetensors").read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors is .* truncated"):
            open_weights([tmp_path / "cut.safetensors"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", ["model", "safetensors"])
def test_half_precision_becomes_fp32(tmp_path: Path, dtype: torch.dtype, ending: str) -> None:
    halves = {key: tensor.to(dtype) for key, tensor in tiny_weights().items()}
    path = tmp_path / f"x.{ending}"
    if ending == "model":
        torch.save({"state_dict": published(halves)}, path)
    else:
        save_file(halves, path)
    got = open_weights([path])
    assert equal(got.tensors, {key: tensor.float() for key, tensor in halves.items()})
    assert got.precision == str(dtype).removeprefix("torch.")


def test_a_model_folder_and_a_fold(tmp_path: Path) -> None:
    weights = tiny_weights()
    (tmp_path / "model" / "fold_2").mkdir(parents=True)
    torch.save(v2(weights), tmp_path / "model" / "fold_2" / "checkpoint_final.pth")
    for folder in (tmp_path / "model", tmp_path / "model" / "fold_2"):
        assert equal(open_weights([folder]).tensors, weights)
    (tmp_path / "model" / "fold_3").mkdir()
    torch.save(v2(weights), tmp_path / "model" / "fold_3" / "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match=r"several checkpoints[\s\S]*fold_2[\s\S]*fold_3"):
        open_weights([tmp_path / "model"])
    with pytest.raises(CheckpointError, match="without a checkpoint"):
        open_weights([tmp_path])


def test_pickles_in_any_order_and_beside_the_weights(tmp_path: Path) -> None:
    model = write_v1(tmp_path, tiny_weights(), v1_plans())
    bare = {key: value for key, value in v1_plans().items() if key != "plans_per_stage"}
    (tmp_path / "elsewhere").mkdir()
    plans = tmp_path / "elsewhere" / "plans.pkl"
    plans.write_bytes(pickle.dumps({**bare, "base_num_features": 32}))
    pkl = tmp_path / "x.model.pkl"
    for paths in ([model], [model, pkl], [pkl, model], [plans, pkl, model], [model, plans]):
        got = open_weights(paths)
        assert got.v1_plans["plans_per_stage"][0]["patch_size"].tolist() == [32, 48, 64]
        assert got.v1_init[4] is True
        assert len(got.pickles) == (2 if plans in paths else 1)
        assert ("base_num_features" in got.v1_plans) is (plans in paths)
    pkl.unlink()
    assert open_weights([model]).v1_plans == {}
    with pytest.raises(CheckpointError, match=r"missing pickle[\s\S]*x\.model\.pkl"):
        open_weights([model, pkl])


def test_pickles_that_contradict_each_other_or_are_none(tmp_path: Path) -> None:
    model = write_v1(tmp_path, tiny_weights(), v1_plans())
    plans = tmp_path / "plans.pkl"
    plans.write_bytes(pickle.dumps({**v1_plans(), "num_classes": 104}))
    with pytest.raises(CheckpointError, match=r"contradict[\s\S]*num_classes: 2 and, in plans\.pkl, 104"):
        open_weights([model])
    plans.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="a pickle without plans"):
        open_weights([model])
    with pytest.raises(CheckpointError, match="no file with weights"):
        open_weights([tmp_path / "x.model.pkl"])
    with pytest.raises(CheckpointError, match="more than one file with weights"):
        open_weights([model, model])


@pytest.mark.parametrize(
    ("size", "channels", "classes", "expected"),
    [
        (TINY, 2, 7, "d111111w2"),
        (STUNetSize("x", (1, 2, 3, 1, 12, 1), 3), 1, 2, "d1-2-3-1-12-1w3"),
        *((size, 1, 105, name) for name, size in SIZES.items()),
    ],
)
def test_size_channels_and_classes_from_shapes(size: STUNetSize, channels: int, classes: int, expected: str) -> None:
    with torch.device("meta"):
        weights = build_stunet(size, channels, classes, [1, 2, 2, 2, 2, 2]).state_dict()
    got = infer_architecture(weights, source="x")
    assert (got.size.name, got.size.depth, got.size.width) == (expected, size.depth, size.width)
    assert (got.input_channels, got.num_classes, got.n_axes) == (channels, classes, 3)


def test_2d() -> None:
    weights = build_stunet(TINY, 1, 2, [1, 2, 2, 2, 2, 2], conv_op=nn.Conv2d).state_dict()
    assert infer_architecture(weights, source="x").n_axes == 2


def changed(**changes: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {**tiny_weights(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (changed(**{KEY: None}), f"{KEY} is missing"),
        (changed(**{"decoder.upsamplings.1.conv.bias": None}), "decoder.upsamplings.1.conv.bias is missing"),
        (changed(**{"encoder.stages.0.0.conv4.weight": torch.zeros(1)}), "conv4.weight is not in the network"),
        (
            changed(**{"decoder.stages.0.0.norm1.weight": torch.zeros(3)}),
            r"decoder.stages.0.0.norm1.weight is \(3,\) instead of \(32,\)",
        ),
        (changed(**{"encoder.stages.5.0.conv1.weight": torch.zeros(64, 32, 3, 3, 3)}), r"2, 4, 8, 16, 32, 64\]"),
        (changed(**{KEY: torch.zeros(2)}), "not the weight of a 2D or 3D convolution"),
        (changed(**{"decoder.seg_layers.4.weight": torch.zeros(3)}), "not the weight of a 2D or 3D convolution"),
        ({"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(1)}, "conv1.weight is missing"),
        ({"conv_blocks_context.0.blocks.0.conv.weight": torch.zeros(1)}, "conv_blocks_context.0.blocks.0.conv.weight"),
        ({**published(tiny_weights()), **tiny_weights()}, "weights of another network"),
        (changed(**{KEY: torch.full((2, 1, 3, 3, 3), torch.nan)}), f"{KEY} has 54 NaN"),
        (
            changed(**{KEY: torch.tensor([torch.inf, 0.0]).repeat(27).reshape(2, 1, 3, 3, 3)}),
            f"{KEY} has 27 NaN or inf",
        ),
        (changed(**{KEY: torch.zeros(2, 1, 3, 3, 3, dtype=torch.float64)}), f"{KEY} is torch.float64"),
        (changed(**{KEY: torch.zeros(2, 1, 3, 3, 3, dtype=torch.int8)}), f"{KEY} is torch.int8"),
        (changed(**{KEY: torch.zeros(1).expand(2, 1, 3, 3, 3)}), "more than its 4 B"),
        (changed(**{KEY: "text"}), f"{KEY} is <class 'str'>"),
        (changed(**{f"module.{KEY}": torch.zeros(2, 1, 3, 3, 3)}), f"{KEY} twice"),
        ({1: torch.zeros(1)}, "a int as a name"),
    ],
)
def test_other_things_than_a_stunet_are_named(tmp_path: Path, state: dict[Any, Any], expected: str) -> None:
    torch.save({"network_weights": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_weights([tmp_path / "x.pth"])
    assert "x.pth" in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_as_in_the_file(tmp_path: Path, bad: float) -> None:
    state = published(tiny_weights())
    state[PUBLISHED_KEY].flatten()[3] = bad
    torch.save({"state_dict": state}, tmp_path / "x.model")
    with pytest.raises(CheckpointError, match=f"not finite[\\s\\S]*{PUBLISHED_KEY} has 1 NaN or infinite values of 54"):
        open_weights([tmp_path / "x.model"])


def test_a_view_does_not_bring_what_it_is_a_view_of(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights[KEY] = torch.cat([weights[KEY], torch.zeros(1000, 1, 3, 3, 3)])[:2]
    torch.save(weights, tmp_path / "x.pth")
    got = open_weights([tmp_path / "x.pth"]).tensors[KEY]
    assert torch.equal(got, weights[KEY])
    assert got.untyped_storage().nbytes() == 4 * 54


@pytest.mark.parametrize("axes", [5, "ab", [7], [[0]]])
def test_mirroring_axes_that_are_none(tmp_path: Path, axes: Any) -> None:
    torch.save({**v2(tiny_weights()), "inference_allowed_mirroring_axes": axes}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="that are no axes"):
        open_weights([tmp_path / "x.pth"])


def test_arguments_that_would_fill_the_memory(tmp_path: Path) -> None:
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    torch.save({**v2(tiny_weights()), "init_args": {"plans": value}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has containers with more than"):
        open_weights([tmp_path / "x.pth"])


@pytest.mark.parametrize("content", [[1], {"a": 1}, {}, {"state_dict": 3}, 5])
def test_files_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.model")
    with pytest.raises(CheckpointError, match=r"a file without weights[\s\S]*x\.model"):
        open_weights([tmp_path / "x.model"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(tmp_path: Path, share: float, legacy: bool) -> None:
    torch.save({"state_dict": published(tiny_weights())}, tmp_path / "x.model",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    content = (tmp_path / "x.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"cut\.model is .*truncated"):
        open_weights([tmp_path / "cut.model"])


def test_back_to_published_bit_for_bit(tmp_path: Path) -> None:
    weights = tiny_weights()
    torch.save(v2(weights), tmp_path / "x.pth")
    write_published(open_weights([tmp_path / "x.pth"]), tmp_path / "new" / "x.model")
    content = torch.load(tmp_path / "new" / "x.model", weights_only=True)
    assert content["epoch"] == 12
    assert list(content["state_dict"]) == list(published(weights))
    assert equal(content["state_dict"], published(weights))
    with pytest.raises(UsageError, match="an output that exists"):
        write_published(open_weights([tmp_path / "x.pth"]), tmp_path / "new" / "x.model")


def test_2d_has_no_published_form(tmp_path: Path) -> None:
    torch.save(build_stunet(TINY, 1, 2, [1, 2, 2, 2, 2, 2], conv_op=nn.Conv2d).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a 2D network"):
        write_published(open_weights([tmp_path / "x.pth"]), tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()
