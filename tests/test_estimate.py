"""Estimates against closed forms, the paper's table and PyTorch's own memory events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_events import EDGE, Training, allocated

from stunet.network import SIZES, STUNetSize, build_stunet, default_strides, estimate

PUBLISHED_STRIDES = [1, 2, 2, 2, 2, (1, 1, 2)]


@pytest.mark.parametrize("name", ["small", "base"])
def test_macs_are_close_to_the_published_ones(shared: Path, name: str) -> None:
    published = json.loads((shared / "facts" / "stunet_tables.json").read_text())["sizes"][name]["tera_macs_128"]
    ours = estimate(
        SIZES[name], patch_size=(128,) * 3, batch_size=1, num_classes=105, strides=PUBLISHED_STRIDES
    ).macs  # fmt: skip
    # Ours saves the coarse heads, seven eighths of each 1x1 convolution on the way up, and at the finest three levels
    # 19 of the 54 products for each voxel and pair of channels where the way up and the skip connection meet.
    assert 0.82 * published < ours / 1e12 < 0.85 * published


def test_macs_and_parameters_of_a_small_network_by_hand() -> None:
    size = STUNetSize("tiny", (1,) * 6, 2)
    got = estimate(size, patch_size=(32, 32), batch_size=1, num_classes=3, input_channels=2)
    f, n = (2, 4, 8, 16, 32, 32), [32 * 32 // 4**i for i in (0, 1, 2, 3, 3, 3)]  # strides 2 stop at 4 voxels
    macs = parameters = 0
    for level in range(6):
        c_in = 2 if level == 0 else f[level - 1]
        weights = 9 * c_in * f[level] + 9 * f[level] ** 2 + c_in * f[level]
        macs += weights * n[level]
        parameters += weights + 3 * f[level] + 4 * f[level]  # biases, and two norms
    for level in range(5):
        weights = 9 * 2 * f[level] ** 2 + 9 * f[level] ** 2 + 2 * f[level] ** 2
        macs += f[level + 1] * f[level] * n[level + 1]
        if level < 2:  # enough voxels: a transposed convolution with a 4x4 kernel below, and the projection below, too
            macs += (9 + 9 + 1) * f[level] ** 2 * n[level] + (16 + 1) * f[level] ** 2 * n[level + 1]
        else:
            macs += weights * n[level]
        parameters += weights + 7 * f[level] + f[level + 1] * f[level] + f[level] + 3 * f[level] + 3
    macs += 3 * f[0] * n[0]  # the finest head alone
    assert got.macs == macs
    assert got.parameters == parameters


def test_default_strides() -> None:
    assert default_strides((128, 128)) == [[1, 1]] + [[2, 2]] * 5
    assert default_strides((8, 40, 56)) == [[1, 1, 1], [2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("train", "loss", "classes"),
    [(True, "stunet", 3), (True, "stunet", 25), (True, "nnunet", 25), (False, "stunet", 3), (False, "stunet", 25)],
)
def test_memory_is_what_pytorch_allocates(train: bool, loss: Any, classes: int) -> None:
    size, patch = SIZES["small"], (EDGE,) * 3
    if train:
        measured = Training(size, batch=2, classes=classes, loss=loss).peak()
    else:
        network = build_stunet(size, 1, classes, default_strides(patch))
        image = torch.randn(1, 1, *patch)
        with torch.no_grad():
            measured = allocated(lambda: network(image)) + 4 * sum(p.numel() for p in network.parameters())
    got = estimate(size, patch_size=patch, batch_size=2, num_classes=classes, loss=loss)
    assert (got.training_bytes if train else got.inference_bytes) == pytest.approx(measured, rel=0.15)


def test_checkpointing_and_half_precision_save_memory() -> None:
    def cost(**kwargs: object) -> int:
        return estimate(
            SIZES["small"], patch_size=(64,) * 3, batch_size=2, num_classes=3, **kwargs  # type: ignore[arg-type]
        ).training_bytes  # fmt: skip

    assert cost(activation_checkpointing="all") < cost(activation_checkpointing="encoder") < cost()
    assert cost(precision="amp") < cost()
    activations = math.prod((64,) * 3) * 2 * 4
    assert cost() > 16 * 4 * activations  # the finest level alone keeps several maps of 16 channels


def test_the_lean_loss_shows_at_many_classes() -> None:
    def cost(loss: Any, classes: int) -> int:
        return estimate(
            SIZES["small"], patch_size=(64,) * 3, batch_size=2, num_classes=classes, loss=loss
        ).training_bytes

    logits = 105 * 4 * 2 * 64**3
    assert cost("nnunet", 105) - cost("stunet", 105) > 2 * logits
