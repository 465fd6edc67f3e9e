"""Outputs of layers: which, of which network, and that nothing of the reading stays behind."""

from __future__ import annotations

import pytest
import torch
from networks import UNET_PATCH, unet
from torch import Tensor, nn
from weights import STRIDES, TINY

from stunet.errors import FeatureError
from stunet.network import build_stunet
from stunet.ranking import FeatureHooks, decoder_stages, unwrap


def n_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_decoder_stages_of_nnunets_networks_finest_first(name: str) -> None:
    network = unet(name)
    network.decoder.deep_supervision = False  # nnU-Net's decoder then runs the finest head alone
    x = torch.randn(2, 1, *UNET_PATCH)
    with torch.no_grad(), FeatureHooks(network) as hooks:
        assert hooks.names == ("decoder.stages.1", "decoder.stages.0")
        fine, coarse = hooks.run(x)
        assert (tuple(fine.shape), tuple(coarse.shape)) == ((2, 4, 8, 16, 12), (2, 8, 8, 8, 6))
        # By hand: the decoder's formula.
        skips = network.encoder(x)
        expected = network.decoder.stages[0](torch.cat((network.decoder.transpconvs[0](skips[-1]), skips[-2]), 1))
        torch.testing.assert_close(coarse, expected)
        torch.testing.assert_close(network.decoder.seg_layers[-1](fine), network(x))


def test_decoder_stages_of_stunet_finest_first() -> None:
    network = build_stunet(TINY, 1, 3, STRIDES).eval()
    with torch.no_grad(), FeatureHooks(network) as hooks:
        maps = hooks.run(torch.randn(1, 1, 32, 32, 32))
    assert [m.shape[1] for m in maps] == [2, 4, 8, 16, 32]
    assert [m.shape[4] for m in maps] == [32, 16, 8, 4, 2]
    assert hooks.names == decoder_stages(network) == tuple(f"decoder.stages.{i}" for i in (4, 3, 2, 1, 0))


def test_named_layers_in_the_order_given() -> None:
    network = unet()
    names = ("encoder.stages.2", "encoder.stages.0.0.convs.1.norm", "decoder.stages.1")
    x = torch.randn(1, 1, *UNET_PATCH)
    with torch.no_grad(), FeatureHooks(network, names) as hooks:
        maps = hooks.run(x)
        stages = network.encoder(x)
    torch.testing.assert_close(maps[0], stages[2])
    assert [m.shape[1] for m in maps] == [16, 4, 4]


def test_a_reader_sees_an_output_before_the_next_layer_changes_it() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LeakyReLU(0.5, inplace=True))
    x = torch.randn(1, 1, 4, 4)
    expected = network[0](x).detach().clone()
    assert (expected < 0).any()
    with torch.no_grad(), FeatureHooks(network, ["0"]) as hooks:
        (changed,) = hooks.run(x)
        (read,) = hooks.run(x, lambda name, output: output.clone() if name == "0" else output * 0)
    assert torch.equal(read, expected)
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "both", "none"])
def test_wrappers_are_seen_through(wrap: str) -> None:
    network = unet()
    wrapped = nn.DataParallel(network) if wrap in ("parallel", "both") else network
    if wrap in ("compiled", "both"):
        wrapped = torch.compile(wrapped, backend="eager")  # never compiled, as the inner network is run
    assert unwrap(wrapped) is network
    x = torch.randn(1, 1, *UNET_PATCH)
    with torch.no_grad(), FeatureHooks(wrapped) as hooks, FeatureHooks(network) as expected:
        assert hooks.names == expected.names
        for ours, theirs in zip(hooks.run(x), expected.run(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert n_hooks(network) == 0


def test_a_part_called_module_is_no_wrapper() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)

    network = Network()
    assert unwrap(network) is network


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_hooks_are_gone_however_the_context_is_left() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), Failing())
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="no"), FeatureHooks(network, ["0"]) as hooks:  # noqa: PT012
        assert n_hooks(network) == 1
        hooks.run(x)
    assert n_hooks(network) == 0
    with pytest.raises(KeyError), FeatureHooks(network, ["0", "1"]):
        raise KeyError
    assert n_hooks(network) == 0
    with FeatureHooks(network, ["0"]):
        pass
    assert n_hooks(network) == 0


def test_unknown_layers_are_named_with_some_that_exist() -> None:
    with pytest.raises(FeatureError, match=r"decoder\.stage\.1\n[\s\S]*decoder\.stages\.1"):
        FeatureHooks(unet(), ["decoder.stage.1"])
    with pytest.raises(FeatureError, match="such as 0, 1"):
        FeatureHooks(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), ["zzzzzz"])
    with pytest.raises(FeatureError, match="decoder stages are not known"):
        FeatureHooks(nn.Sequential(nn.Conv2d(1, 2, 1)))


def test_layers_that_do_not_run_or_give_no_map() -> None:
    network = unet()
    network.decoder.deep_supervision = False
    x = torch.randn(1, 1, *UNET_PATCH)
    with pytest.raises(FeatureError, match=r"does not run[\s\S]*decoder\.seg_layers\.0"), torch.no_grad():  # noqa: SIM117
        with FeatureHooks(network, ["decoder.seg_layers.0"]) as hooks:
            hooks.run(x)
    with pytest.raises(FeatureError, match=r"encoder, a PlainConvEncoder, gives a list"), torch.no_grad():  # noqa: SIM117
        with FeatureHooks(network, ["encoder"]) as hooks:
            hooks.run(x)
    outside = FeatureHooks(network)
    with pytest.raises(FeatureError, match="does not run"), torch.no_grad():
        outside.run(x)
    assert n_hooks(network) == 0
