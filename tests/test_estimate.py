"""Estimates against closed forms, the paper's table and PyTorch's own memory events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stunet.losses import partial_dice_ce_loss
from stunet.network import SIZES, STUNet, STUNetSize, build_stunet, default_strides, estimate

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


def _measured_peak(network: STUNet, *, train: bool, patch: tuple[int, ...], batch: int, classes: int, loss: str) -> int:
    """Peak of memory that PyTorch allocates on the CPU, from its profiler's allocation events."""
    image = torch.randn(batch, 1, *patch)
    target = torch.randint(classes, (batch, *patch))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for output in network(image)[:-1]:
            stride = [a // b for a, b in zip(patch, output.shape[2:], strict=True)]
            small = target[:, :: stride[0], :: stride[1], :: stride[2]]
            if loss == "stunet":
                losses.append(partial_dice_ce_loss(output, small, batch_dice=False))
                continue
            p = output.softmax(1)
            one_hot = torch.zeros(p.shape, dtype=torch.bool).scatter_(1, small[:, None], 1)
            dice = 2 * (p * one_hot)[:, 1:].sum((2, 3, 4)) / p[:, 1:].sum((2, 3, 4))
            losses.append(nn.functional.cross_entropy(output, small) - dice.mean())
        sum(losses[1:], losses[0]).backward()
        optimizer.step()

    fixed = 4 * sum(p.numel() for p in network.parameters())
    if train:
        step()  # makes the momentum
        optimizer.zero_grad(set_to_none=True)
        fixed *= 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if train:
            step()
        else:
            with torch.no_grad():
                network(image)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak + fixed


@pytest.mark.parametrize(
    ("train", "loss", "classes"),
    [(True, "stunet", 3), (True, "stunet", 25), (True, "nnunet", 25), (False, "stunet", 3), (False, "stunet", 25)],
)
def test_memory_is_what_pytorch_allocates(train: bool, loss: Any, classes: int) -> None:
    # Large enough for oneDNN's convolutions; for small tensors PyTorch copies the image to columns instead.
    size, patch = SIZES["small"], (64, 64, 64)
    network = build_stunet(size, 1, classes, default_strides(patch), deep_supervision=train)
    batch = 2 if train else 1
    measured = _measured_peak(network, train=train, patch=patch, batch=batch, classes=classes, loss=loss)
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
