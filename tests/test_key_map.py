from __future__ import annotations

import pytest

from stunet.errors import CheckpointError
from stunet.network import SIZES, STUNetSize, build_stunet
from stunet.weights.convert import from_published_key, to_published_key


@pytest.mark.parametrize("size", [SIZES["small"], STUNetSize("deep", (1, 2, 3, 2, 1, 12), 2)])
def test_total_and_one_to_one_in_both_directions(size: STUNetSize) -> None:
    ours = list(build_stunet(size, 1, 2, [1, 2, 2, 2, 2, 2]).state_dict())
    published = [to_published_key(key) for key in ours]
    assert len(set(published)) == len(ours)
    assert [from_published_key(key) for key in published] == ours


def test_examples_by_hand() -> None:
    assert from_published_key("conv_blocks_context.5.1.conv3.weight") == "encoder.stages.5.1.projection.weight"
    assert from_published_key("conv_blocks_localization.0.0.norm2.bias") == "decoder.stages.0.0.norm2.bias"
    assert from_published_key("upsample_layers.4.conv.weight") == "decoder.upsamplings.4.conv.weight"
    assert from_published_key("seg_outputs.0.bias") == "decoder.seg_layers.0.bias"


def test_golden_keys_are_all_mapped(shared) -> None:  # type: ignore[no-untyped-def]
    import torch

    for file in sorted((shared / "golden").glob("stunet_*.pt")):
        keys = torch.load(file, weights_only=True)["published_state_dict"]
        assert [to_published_key(from_published_key(key)) for key in keys] == list(keys)


@pytest.mark.parametrize("key", ["encoder.stages.0.0.conv1.weight", "conv_blocks_context.0.0.conv4.weight", "x", ""])
def test_unknown_published_key(key: str) -> None:
    with pytest.raises(CheckpointError, match="no counterpart"):
        from_published_key(key)


@pytest.mark.parametrize("key", ["seg_outputs.0.weight", "encoder.stages.0.conv1.weight", "decoder.seg_layers.0.scale"])
def test_unknown_key_of_ours(key: str) -> None:
    with pytest.raises(CheckpointError, match="no counterpart"):
        to_published_key(key)
