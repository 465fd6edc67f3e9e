"""Weights of one network in another: other channels, other structures, other spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weights import STRIDES, TINY, tiny_weights, write_v1

from stunet.errors import CheckpointError, LabelError, UsageError
from stunet.labels.labels import Outputs
from stunet.network import STUNet, STUNetSize, build_stunet
from stunet.weights.convert import SourceWeights, open_weights
from stunet.weights.transfer import adapt_stem, load_weights, source_outputs, transfer_weights

SOURCE_LABELS = {"background": 0, "liver": 1, "left kidney": 2, "IVC": 3}
STEM, PROJECTION = "encoder.stages.0.0.conv1.weight", "encoder.stages.0.0.projection.weight"
HEADS = [f"decoder.seg_layers.{i}" for i in range(5)]


def softmax(*names: str) -> Outputs:
    return Outputs(("background", *names), exclusive=True)


def source(
    folder: Path, labels: dict[str, Any] = SOURCE_LABELS, channels: int = 1, n_outputs: int = 0
) -> SourceWeights:
    weights = tiny_weights(num_classes=n_outputs or len(labels), input_channels=channels)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.values():  # biases too, which are all 0 in a new network
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    path = folder / "source.pth"
    torch.save(
        {"network_weights": weights, "current_epoch": 1, "init_args": {"dataset_json": {"labels": labels}}}, path
    )
    return open_weights([path])


def target(num_classes: int, channels: int = 1, **kwargs: Any) -> STUNet:
    torch.manual_seed(5)
    return build_stunet(TINY, channels, num_classes, STRIDES, **kwargs)


def cloned(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_the_same_task_gets_every_parameter(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(4)
    report = transfer_weights(weights, network, softmax("liver", "left kidney", "IVC"))
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights.tensors[key])
    assert set(report.copied) == set(weights.tensors)
    assert (dict(report.adapted), report.fresh, report.unused_structures) == ({}, (), ())


def test_head_rows_go_by_name_at_every_level(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(4)
    report = transfer_weights(weights, network, softmax("inferior_vena_cava", "tumour", "kidney_left"))
    after = network.state_dict()
    for head in HEADS:
        for kind in ("weight", "bias"):
            key = f"{head}.{kind}"
            for row, source_row in ((0, 0), (1, 3), (3, 2)):
                assert torch.equal(after[key][row], weights.tensors[key][source_row])
            assert not after[key][2].any()  # the tumour's
    assert report.structures == {
        "background": "background", "inferior_vena_cava": "IVC", "tumour": None, "kidney_left": "left kidney",
    }  # fmt: skip
    assert report.unused_structures == ("liver",)
    assert report.adapted["decoder.seg_layers.0.weight"] == "3 of 4 rows by name"
    assert json.loads(json.dumps(report.as_dict()))["head"]["structures"]["tumour"] is None


def test_copied_rows_segment_as_the_source_does(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(3)
    original = target(4)
    original.load_state_dict(weights.tensors)
    transfer_weights(weights, network, softmax("IVC", "liver"))
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(image), original(image)[:, [0, 3, 1]])


def test_regions_get_the_log_odds_against_background(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(2)
    original = target(4)
    original.load_state_dict(weights.tensors)
    report = transfer_weights(weights, network, Outputs(("liver", "IVC"), exclusive=False))
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        logits = original(image)
        torch.testing.assert_close(network(image), logits[:, [1, 3]] - logits[:, :1], atol=1e-5, rtol=1e-5)
    assert report.adapted["decoder.seg_layers.0.weight"] == "2 of 2 rows by name, against background"


def test_fresh_heads_on_request(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(4)
    report = transfer_weights(weights, network, softmax("liver", "left kidney", "IVC"), head="fresh")
    for key, value in network.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if ".seg_layers." in key else weights.tensors[key])
    with torch.no_grad():
        assert not network(torch.randn(1, 1, 32, 32, 32)).any()  # all structures are equally likely at first
    assert len(report.fresh) == 10
    assert report.head_remark == "fresh heads were asked for"


def test_a_fresh_decoder_on_request(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(4)
    drawn = {key: value.clone() for key, value in network.state_dict().items()}
    report = transfer_weights(weights, network, softmax("liver", "left kidney", "IVC"), head="fresh-decoder")
    for key, value in network.state_dict().items():
        of_decoder = torch.zeros_like(value) if ".seg_layers." in key else drawn[key]
        assert torch.equal(value, weights.tensors[key] if key.startswith("encoder.") else of_decoder), key
    assert set(report.copied) == {key for key in drawn if key.startswith("encoder.")}
    assert not any(report.structures.values())


def test_unnamed_outputs_leave_the_heads_fresh(tmp_path: Path) -> None:
    path = write_v1(tmp_path, tiny_weights(num_classes=4), None)
    weights = open_weights([path])
    assert source_outputs(weights) is None
    report = transfer_weights(weights, target(4), softmax("liver", "left kidney", "IVC"))
    assert "does not say what its outputs are" in report.head_remark
    assert len(report.fresh) == 10


def test_published_weights_have_the_published_order(tmp_path: Path) -> None:
    weights = open_weights([write_v1(tmp_path, tiny_weights(num_classes=105), None)])
    outputs = source_outputs(weights)
    assert outputs is not None
    assert (outputs.names[40], outputs.exclusive) == ("liver", True)
    network = target(2)
    transfer_weights(weights, network, softmax("Liver"))
    key = "decoder.seg_layers.4.weight"
    assert torch.equal(network.state_dict()[key], weights.tensors[key][[0, 40]])


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("n_source", [1, 2])
def test_repeat_scaled_keeps_the_first_blocks_output_for_identical_channels(
    tmp_path: Path, n_source: int, channels: int
) -> None:
    weights, network = source(tmp_path, channels=n_source), target(4, channels)
    original = target(4, n_source)
    original.load_state_dict(weights.tensors)
    report = transfer_weights(weights, network, softmax("liver", "left kidney", "IVC"))
    image = torch.randn(2, n_source, 32, 32, 32)
    repeated = image[:, [c % n_source for c in range(channels)]]
    with torch.no_grad():
        ours, theirs = network.encoder.stages[0](repeated), original.encoder.stages[0](image)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert report.input_channels == (n_source, channels)
    assert set(report.adapted) == ({STEM, PROJECTION} if channels != n_source else set())


def test_fewer_channels_add_up() -> None:
    weight = torch.randn(4, 3, 3, 3, 3)
    adapted = adapt_stem(weight, torch.zeros(4, 2, 3, 3, 3), "repeat-scaled")
    torch.testing.assert_close(adapted, torch.stack((weight[:, 0] + weight[:, 2], weight[:, 1]), dim=1))


@pytest.mark.parametrize("policy", ["first", "zero-new"])
def test_leading_channels(policy: Any) -> None:
    weight, fresh = torch.randn(4, 2, 3, 3, 3), torch.randn(4, 3, 3, 3, 3)
    kept = fresh.clone()
    adapted = adapt_stem(weight, fresh, policy)
    assert torch.equal(adapted[:, :2], weight)
    assert torch.equal(adapted[:, 2], kept[:, 2] if policy == "first" else torch.zeros_like(kept[:, 2]))
    assert torch.equal(fresh, kept)
    assert torch.equal(adapt_stem(weight, fresh[:, :1], policy), weight[:, :1])


@pytest.mark.parametrize("channels", [1, 2])
def test_a_random_stem_is_the_networks_own(tmp_path: Path, channels: int) -> None:
    weights, network = source(tmp_path), target(4, channels)
    before = cloned(network)
    report = transfer_weights(weights, network, softmax("liver", "left kidney", "IVC"), stem="random")
    fresh = {STEM, PROJECTION, STEM.replace("weight", "bias"), PROJECTION.replace("weight", "bias")}
    assert set(report.fresh) == fresh
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else weights.tensors[key])


def test_a_preview_on_the_meta_device_reports_the_same(tmp_path: Path) -> None:
    weights, outputs = source(tmp_path), softmax("liver", "tumour")
    real = transfer_weights(weights, target(3, 2), outputs)
    with torch.device("meta"):
        network = build_stunet(TINY, 2, 3, STRIDES)
    assert transfer_weights(weights, network, outputs) == real
    text = str(real.rows())
    assert all(part in text for part in ("channels repeated and divided", "'tumour'", "left kidney"))


def test_2d_from_3d_is_refused_with_the_reason(tmp_path: Path) -> None:
    network = build_stunet(TINY, 1, 4, [[s[0], s[1]] for s in STRIDES], conv_op=nn.Conv2d)
    before = cloned(network)
    with pytest.raises(CheckpointError, match=r"2D network from 3D weights[\s\S]*no counterpart"):
        transfer_weights(source(tmp_path), network, softmax("liver", "left kidney", "IVC"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_size_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    network = build_stunet(STUNetSize("other", (1, 2, 1, 1, 1, 1), 2), 1, 4, STRIDES)
    before = cloned(network)
    with pytest.raises(CheckpointError, match=r"encoder\.stages\.1\.1\.conv1\.weight is missing"):
        transfer_weights(source(tmp_path), network, softmax("liver", "left kidney", "IVC"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_unknown_policies_and_wrong_names(tmp_path: Path) -> None:
    weights, names = source(tmp_path), softmax("liver", "left kidney", "IVC")
    with pytest.raises(UsageError, match="repeat-scaled, first, zero-new, random"):
        transfer_weights(weights, target(4), names, stem="mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="by-name, fresh"):
        transfer_weights(weights, target(4), names, head="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="4 different names"):
        transfer_weights(weights, target(4), softmax("liver"))


def test_weights_of_a_file_by_name_and_shape(tmp_path: Path) -> None:
    weights = source(tmp_path)
    same = target(4)
    report = load_weights(same, tmp_path / "source.pth")
    assert (set(report.copied), report.fresh, report.source) == (set(weights.tensors), (), str(weights.path))
    assert all(torch.equal(value, weights.tensors[key]) for key, value in same.state_dict().items())

    network = target(7, channels=2)
    before = cloned(network)
    report = load_weights(network, tmp_path / "source.pth", stem="first")
    assert set(report.adapted) == {STEM, PROJECTION}
    assert set(report.fresh) == {key for key in before if ".seg_layers." in key}
    for key, value in network.state_dict().items():
        if key not in report.adapted:
            assert torch.equal(value, before[key] if key in report.fresh else weights.tensors[key])
    assert torch.equal(network.state_dict()[STEM][:, :1], weights.tensors[STEM])

    report = load_weights(network, tmp_path / "source.pth", labels=["background", *"abcde", "Liver"])
    assert report.structures["Liver"] == "liver"
    key = "decoder.seg_layers.4.weight"
    assert torch.equal(network.state_dict()[key][6], weights.tensors[key][1])


def test_odd_labels_matter_only_where_rows_go_by_name(tmp_path: Path) -> None:
    odd = {"background": 0, "liver": "one", "left kidney": None, "IVC": 3}
    weights = source(tmp_path, labels=odd)
    assert set(load_weights(target(4), tmp_path / "source.pth").copied) == set(weights.tensors)
    with pytest.raises(LabelError, match="label values"):
        load_weights(target(4), tmp_path / "source.pth", labels=["background", *"abc"])


def test_weights_of_a_file_into_another_module(tmp_path: Path) -> None:
    weights, network = source(tmp_path), target(4)
    network.encoder.stages[0][0].norm2 = nn.GroupNorm(1, 2)
    network.decoder.stages[0][0].conv2 = nn.Sequential(network.decoder.stages[0][0].conv2)  # a wrapped layer
    report = load_weights(network, tmp_path / "source.pth", head="fresh")
    wrapped = {f"decoder.stages.0.0.conv2.0.{kind}" for kind in ("weight", "bias")}
    assert set(report.fresh) == wrapped | {f"{head}.{kind}" for head in HEADS for kind in ("weight", "bias")}
    part = nn.ModuleDict({"encoder": target(4).encoder})
    assert set(load_weights(part, tmp_path / "source.pth").copied) == set(part.state_dict())
    assert all(torch.equal(value, weights.tensors[key]) for key, value in part.state_dict().items())
    with pytest.raises(CheckpointError, match=r"nothing in \S*source\.pth fits"):
        load_weights(nn.Linear(2, 2), tmp_path / "source.pth")
    with pytest.raises(UsageError, match="4 different names"):
        load_weights(target(4), tmp_path / "source.pth", labels=["background"])


def test_weights_of_a_file_are_read_without_running_code(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"network_weights": {STEM: Call()}, "current_epoch": 1}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="asks for"):
        load_weights(target(4), tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
