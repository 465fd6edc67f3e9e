"""What the network computes in another way than the published one, against PyTorch's own layers in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_structure import Block, PublishedStructure
from torch import Tensor, nn
from torch.nn.functional import instance_norm, interpolate

from stunet.network import SIZES, STUNetSize, build_stunet
from stunet.network.blocks import MergingBlock, ResidualBlock
from stunet.network.normalization import is_channels_last

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = torch.channels_last_3d


def randomize(network: nn.Module) -> None:
    """Norms that are not the identity, and biases that are not 0."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)


def gradients(network: nn.Module, output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return list(torch.autograd.grad((output * weight).sum(), [*inputs, *network.parameters()]))


@pytest.mark.parametrize(("n_axes", "project"), [(2, True), (3, True), (3, False)])
def test_a_block_and_its_gradients(n_axes: int, project: bool) -> None:
    torch.manual_seed(0)
    channels, stride = (3, 4) if project else (4, 4), (2, 1, 1)[:n_axes] if project else (1,) * n_axes
    ours = ResidualBlock(CONVS[n_axes], *channels, stride=stride, project=project).double()
    published = Block(channels, stride, project=project).double()
    randomize(ours)
    published.load_state_dict(ours.state_dict())
    x = torch.randn(2, channels[0], *(6, 5, 7)[:n_axes], dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(ours, ours(x), [x]), gradients(published, published(x), [x]), rtol=1e-10, atol=1e-10
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(x), published(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [(2, 2), (1, 2, 2), (2, 1, 3), (1, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("coarse", [(2, 1, 1), (4, 6, 5)], ids=["few voxels", "many"])
def test_merging_is_convolving_the_concatenation(scale: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    n_axes = len(scale)
    ours = MergingBlock(CONVS[n_axes], 3, scale=scale).double()
    published = Block((6, 3), (1,) * n_axes, project=True).double()
    randomize(ours)
    published.load_state_dict(ours.state_dict())
    fine = [n * s for n, s in zip(coarse, scale, strict=False)]
    inputs = [torch.randn(2, 3, *shape, dtype=torch.double, requires_grad=True) for shape in (coarse[:n_axes], fine)]
    expected = published(torch.cat((interpolate(inputs[0], fine), inputs[1]), 1))
    torch.testing.assert_close(ours(*inputs), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        gradients(ours, ours(*inputs), inputs), gradients(published, expected, inputs), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_channels_last_loses_no_digits(offset: float) -> None:
    torch.manual_seed(0)
    ours = ResidualBlock(nn.Conv3d, 4, 4, stride=(1, 1, 1), project=False)
    randomize(ours)
    reference = Block((4, 4), (1, 1, 1), project=False).double()
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 24, 20, 28) + offset
    x, exact = x.requires_grad_(), x.double().requires_grad_()
    y, expected = ours(x), reference(exact)
    assert is_channels_last(y)
    bound = 1e-5 if offset == 0 else 1e-4  # the convolutions of a large offset lose digits by themselves
    assert (y - expected).abs().max() <= bound * expected.abs().max()
    names = ["x", *(name for name, _ in ours.named_parameters())]
    for name, a, b in zip(names, gradients(ours, y, [x]), gradients(reference, expected, [exact]), strict=True):
        if not name.endswith(("conv1.bias", "conv2.bias")):  # rounding alone
            assert (a - b).abs().max() <= 10 * bound * b.abs().max(), name


def test_statistics_of_a_nearly_constant_channel() -> None:
    torch.manual_seed(0)
    norm = ResidualBlock(nn.Conv3d, 2, 2, stride=(1, 1, 1), project=False).norm1
    x = (1000 + torch.randn(1, 2, 32, 32, 32)).contiguous(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        ours, expected, stock = norm(x), instance_norm(x.double()), instance_norm(x.contiguous())
    assert is_channels_last(ours)
    # As far from the truth as PyTorch's own.
    assert (ours - expected).abs().max() <= 2 * (stock - expected).abs().max() + 1e-6


@pytest.mark.parametrize("size", [SIZES["small"], STUNetSize("deep", (2,) * 6, 6)])
def test_the_whole_network_is_the_published_one(size: STUNetSize) -> None:
    torch.manual_seed(0)
    strides: list[Any] = [1, (1, 2, 2), 2, 2, 2, (1, 1, 2)]
    ours = build_stunet(size, 2, 3, strides, deep_supervision=True)
    randomize(ours)
    published, reference = (PublishedStructure(size, 2, 3, strides) for _ in range(2))
    for each in (published, reference):
        each.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 16, 32, 64)
    with torch.no_grad():
        exact = reference.double()(x.double())
        for mine, theirs, truth in zip(ours(x), published(x), exact, strict=True):
            scale = truth.abs().max()
            assert (mine - theirs).abs().max() <= 1e-5 * scale
            assert (mine - truth).abs().max() <= 3 * (theirs - truth).abs().max() + 1e-6 * scale


def test_bfloat16_gradients_are_as_near_as_the_published_ones() -> None:
    torch.manual_seed(0)
    ours = ResidualBlock(nn.Conv3d, 4, 4, stride=(1, 1, 1), project=True)
    published = Block((4, 4), (1, 1, 1), project=True)
    published.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, 8, requires_grad=True)
    exact = gradients(published, published(x), [x])
    found = []
    for network in (ours, published):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        assert y.dtype == torch.bfloat16
        found.append(gradients(network, y.float(), [x]))
    names = ["x", *(name for name, _ in ours.named_parameters())]
    for name, mine, theirs, truth in zip(names, *found, exact, strict=True):
        assert mine.dtype == torch.float32
        if not name.endswith(("conv1.bias", "conv2.bias")):
            assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 0.01 * truth.norm(), name


def test_frozen_parts_get_no_gradient() -> None:
    ours = ResidualBlock(nn.Conv3d, 2, 2, stride=(1, 1, 1), project=False)
    ours.requires_grad_(False)
    ours.conv2.weight.requires_grad_()
    ours(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is not None] == ["conv2.weight"]


def test_fewer_tensors_are_kept_than_published() -> None:
    def kept(network: nn.Module) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = network(torch.randn(2, 1, 32, 32, 32))
        del y
        return sum(storages.values()) - sum(p.numel() * 4 for p in network.parameters())

    size, strides = STUNetSize("narrow", (1,) * 6, 4), [1, 2, 2, 2, 1, 1]
    assert kept(build_stunet(size, 1, 3, strides, deep_supervision=True)) < 0.6 * kept(
        PublishedStructure(size, 1, 3, strides)
    )
