"""The network against the published code's outputs, closed forms and nnU-Net's demands."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from published_structure import Block, PublishedStructure
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import instance_norm, interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from versions import FAKE_CUDA, WHOLE_GRAPHS

from stunet.errors import ArchitectureError
from stunet.network import (
    SIZES,
    MergingBlock,
    ResidualBlock,
    STUNet,
    STUNetSize,
    _instance_norm,
    _is_channels_last,
    _is_plain,
    build_stunet,
    create_model,
)
from stunet.weights.convert import from_published_key

TINY = {"features_per_stage": [2, 4, 8, 16, 32, 32], "n_blocks_per_stage": [1, 2, 1, 1, 1, 1]}
STRIDES = [1, 2, 2, 2, 2, (1, 1, 2)]


def tiny(n_axes: int = 3, **kwargs: Any) -> STUNet:
    torch.manual_seed(0)
    conv_op = {2: nn.Conv2d, 3: nn.Conv3d}[n_axes]
    strides = [1, 2, 2, 2, 2, (1,) * (n_axes - 1) + (2,)]
    network = STUNet(1, 3, conv_op=conv_op, strides=strides, **{**TINY, **kwargs})
    return network.apply(network.initialize)


@pytest.mark.parametrize(
    ("size", "expected"), [("small", 14_596_941), ("base", 58_262_669), ("large", 440_302_605), ("huge", 1_457_326_221)]
)
def test_parameter_counts_are_the_published_ones(size: str, expected: int) -> None:
    with torch.device("meta"):
        network = STUNet(
            1, 105, features_per_stage=SIZES[size].features, n_blocks_per_stage=SIZES[size].depth, strides=STRIDES
        )
    assert sum(p.numel() for p in network.parameters()) == expected


def outputs_and_gradients(golden: dict[str, Any], network: nn.Module) -> list[Tensor]:
    """All outputs of a golden case's network, and the gradients at its input and its first convolution."""
    weights = {from_published_key(key): value for key, value in golden["published_state_dict"].items()}
    network.load_state_dict(weights, strict=True)
    image = golden["input"].clone().requires_grad_()
    outputs = network(image)
    assert len(outputs) == 5
    loss = sum((output**2).mean() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, (image, network.get_parameter("encoder.stages.0.0.conv1.weight")))]


@pytest.mark.parametrize("case", ["totalseg_strides", "anisotropic_2ch", "shallow_padded"])
def test_golden_outputs_and_gradients(shared: Path, case: str) -> None:
    golden = torch.load(shared / "golden" / f"stunet_{case}.pt", weights_only=True)
    expected = [*golden["outputs"], golden["grad_input"], golden["grad_first_conv_weight"]]
    strides = [(1, 1, 1), *(tuple(s) for s in golden["strides"])]
    strides += [(1, 1, 1)] * (6 - len(strides))
    size = STUNetSize("golden", tuple(golden["depth"]), golden["dims"][0])
    assert size.features == tuple(golden["dims"])
    arguments = (size, golden["input_channels"], golden["num_classes"], strides)
    ours = outputs_and_gradients(golden, build_stunet(*arguments, deep_supervision=True))
    # The published order of operations, to see how far this machine's rounding is from that of the golden files'.
    published = outputs_and_gradients(golden, PublishedStructure(*arguments))
    for mine, theirs, here in zip(ours, expected, published, strict=True):
        rounding = (here - theirs).abs().max()
        assert (mine - theirs).abs().max() <= 5e-5 * theirs.abs().max() + 2 * rounding  # PyTorch 2.7: 3.5e-5


@pytest.mark.parametrize("n_axes", [2, 3])
def test_every_parameter_gets_gradient(n_axes: int) -> None:
    network = tiny(n_axes, deep_supervision=True)
    shape = (32, 32, 64)[-n_axes:]
    outputs = network(torch.randn(2, 1, *shape))
    assert [tuple(o.shape[2:]) for o in outputs] == [tuple(n // 2**i for n in shape) for i in range(5)]
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before an instance norm is taken out again by the norm; its gradient is rounding error or zero.
    assert all(name.endswith(("conv1.bias", "conv2.bias")) for name in without)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("where", ["encoder", "all"])
def test_activation_checkpointing_changes_no_value_and_no_gradient(where: Any) -> None:
    plain = tiny(deep_supervision=True)
    checkpointed = tiny(deep_supervision=True, activation_checkpointing=where)
    x = torch.randn(1, 1, 32, 32, 64)
    outputs, gradients = [], []
    for network in (plain, checkpointed):
        y = network(x)
        outputs.append(y)
        gradients.append(torch.autograd.grad(sum((o**3).sum() for o in y), list(network.parameters())))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_activation_checkpointing_keeps_fewer_tensors() -> None:
    def saved_bytes(where: Any) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = tiny(activation_checkpointing=where)(torch.randn(1, 1, 32, 32, 32))
        del y
        return sum(kept.values())

    assert saved_bytes("all") < saved_bytes("encoder") < saved_bytes("none")


def test_deep_supervision_is_switched_as_nnunet_does() -> None:
    network = tiny(deep_supervision=True)
    x = torch.randn(1, 1, 32, 16, 32)
    finest = network(x)[0]
    network.decoder.deep_supervision = False
    alone = network(x)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, finest)


@pytest.mark.parametrize("n_axes", [2, 3])
def test_feature_map_size_is_what_all_convolutions_put_out(n_axes: int) -> None:
    network = tiny(n_axes, deep_supervision=True)
    published = PublishedStructure(STUNetSize("tiny", (1, 2, 1, 1, 1, 1), 2), 1, 3, network.encoder.strides, n_axes)
    counted = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in published.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(count)
    for up in published.decoder.upsamplings:  # ours are at the coarser resolution
        up.register_forward_hook(lambda m, args, y: count(m, args, args[0][:, : y.shape[1]]))
        up.conv._forward_hooks.clear()
    shape = (16, 32, 64)[-n_axes:]
    published(torch.randn(1, 1, *shape))
    assert network.compute_conv_feature_map_size(shape) == counted


def test_a_model_by_its_size() -> None:
    network = create_model("small", input_channels=2, num_classes=4, conv_op=nn.Conv2d, strides=[1, 2, 2, 2, 2, 2])
    assert network(torch.zeros(1, 2, 64, 64)).shape == (1, 4, 64, 64)
    assert create_model().encoder.strides == ((1, 1, 1), *((2, 2, 2),) * 4, (1, 1, 2))


def test_initialisation_is_he_for_leaky_rectifiers() -> None:
    network = build_stunet("small", 1, 3, STRIDES)
    weight = network.encoder.stages[3][0].conv2.weight  # 128 -> 128
    expected = (2 / (1 + 0.01**2) / (128 * 27)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.01)
    assert all(not m.bias.any() for m in network.modules() if isinstance(m, nn.Conv3d))


@WHOLE_GRAPHS
@pytest.mark.parametrize(("n_axes", "where"), [(2, "none"), (3, "none"), (2, "all")])
def test_compiles_into_one_graph(n_axes: int, where: Any) -> None:
    network = tiny(n_axes, deep_supervision=True, activation_checkpointing=where)
    x = torch.randn(1, 1, *(32, 32, 64)[-n_axes:])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))


@WHOLE_GRAPHS
def test_all_patches_of_one_size_share_a_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    network = tiny(deep_supervision=True)
    compiled = torch.compile(network, backend="eager")
    for _ in range(2):  # epochs, as nnU-Net trains and validates
        network.train()
        for _ in range(2):
            sum(logits.square().mean() for logits in compiled(torch.randn(2, 1, 32, 32, 64))).backward()
            with torch.no_grad():
                for p in network.parameters():
                    p -= 0 if p.grad is None else 1e-3 * p.grad
        network.eval()
        with torch.no_grad():
            compiled(torch.randn(2, 1, 32, 32, 64))
    assert counters["stats"]["unique_graphs"] == 2  # one with gradients, one without
    assert not counters["graph_break"]


def test_levels_merge_by_transposed_convolutions_under_the_compiler_too() -> None:
    network, called = tiny(deep_supervision=True), []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "conv_transpose" in str(node.target))
        return graph.forward

    for merged in (3, 2):
        called.clear()
        torch._dynamo.reset()
        x = torch.randn(1, 1, 32, 32, 64)
        torch.testing.assert_close(torch.compile(network, backend=count)(x), network(x), rtol=1e-4, atol=1e-4)
        assert len(called) == merged
        network.decoder.stages[4][0].conv1.register_forward_hook(lambda module, args, y: 1.5 * y)


def test_inference_mode() -> None:
    network, x = tiny(), torch.randn(1, 1, 32, 16, 32)
    expected = network(x)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


class Operations(TorchDispatchMode):
    """Names of all operations, each with the type of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor):
            self.found.append((str(func), y.dtype))
        return y


def test_hooks_of_weights_leave_the_fast_path_and_hooks_of_calls_do_not() -> None:
    network, x = tiny(), torch.randn(2, 1, 32, 32, 64)

    def operations() -> list[str]:
        with torch.no_grad(), Operations() as operations:
            network(x)
        return [name for name, _ in operations.found]

    fast = operations()
    for module in network.modules():  # as sharding does
        module.register_state_dict_pre_hook(lambda *_: None)
    assert operations() == fast
    network.encoder.stages[0][0].conv1.register_forward_hook(lambda *_: None)
    assert operations() != fast


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA")
@FAKE_CUDA
@pytest.mark.parametrize("channels", [2, 64])  # the second with too few voxels for a summed kernel
def test_interpolation_does_not_leave_half_precision(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where levels merge; autocast on CUDA would do it in fp32."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), Operations() as operations:
        with torch.device("cuda"):
            block = MergingBlock(nn.Conv3d, channels, scale=(2, 2, 2))
            below, skip = (torch.empty(1, channels, n, n, n, dtype=torch.half) for n in (4, 8))
        with torch.autocast("cuda", torch.half):
            block(below, skip)
    assert {dtype for name, dtype in operations.found if "upsample" in name} == {torch.half}


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA")
@FAKE_CUDA
def test_channels_last_on_a_gpu_is_left_to_pytorch() -> None:
    """Its matrix products may be TF32, of which a variance has 10 bits."""
    with FakeTensorMode(), Operations() as operations:
        with torch.device("cuda"):
            network, x = tiny(), torch.empty(2, 1, 32, 32, 64)
        network(x.to(memory_format=CHANNELS_LAST))
    assert not [name for name, _ in operations.found if "mm" in name]


def test_merging_in_half_precision_is_as_exact_as_one_convolution() -> None:
    """Two sums rounded to fp16 and added, where the published network rounds one; up to half of the range of fp16."""
    torch.manual_seed(0)
    block = MergingBlock(nn.Conv3d, 8, scale=(2, 2, 2))
    below, skip = torch.randn(2, 8, 8, 8, 8), torch.randn(2, 8, 16, 16, 16)

    @torch.no_grad()
    def sums(block: MergingBlock, scale: float, dtype: torch.dtype) -> Tensor:
        """What goes into the first norm, and the projection."""
        found: list[Tensor] = []
        block._finish = lambda y, residual, is_fast: found.extend((y, residual)) or y
        with torch.autocast("cpu", torch.half, enabled=dtype == torch.half):
            block((below * scale).half().to(dtype), (skip * scale).half().to(dtype))
        return torch.stack(found).double()

    largest = 2.0**15 / float(sums(block, 1, torch.float).abs().max())
    for scale in (1, largest):
        ours = sums(block, scale, torch.half)
        handle = block.conv1.register_forward_hook(lambda *_: None)  # so that modules are called
        theirs = sums(block, scale, torch.half)
        handle.remove()
        exact = sums(deepcopy(block).double(), scale, torch.double)
        errors = [float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt()) for y in (ours, theirs)]
        assert errors[0] < 1.5 * errors[1] < 1e-3


def test_without_pytorchs_private_names_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = tiny(), torch.randn(1, 1, 32, 16, 32)
    expected = network(x)
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert not _is_plain(network.encoder.stages[0][0], x)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_half_precision_from_stage_to_stage() -> None:
    network = tiny(deep_supervision=True)
    seen = set()
    for module in (*network.encoder.stages, *network.decoder.upsamplings, *network.decoder.stages):
        module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(1, 1, 32, 16, 32))
    assert seen == {torch.bfloat16}
    sum(o.float().sum() for o in outputs).backward()


def test_state_dict_names_nothing_twice() -> None:
    storages = [t.data_ptr() for t in tiny().state_dict().values()]
    assert len(storages) == len(set(storages))


def test_input_that_the_strides_do_not_divide() -> None:
    with pytest.raises(ArchitectureError, match=r"\(16, 16, 40\)[\s\S]*multiples of \(16, 16, 32\)"):
        tiny()(torch.zeros(1, 1, 16, 16, 40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_per_stage": [2, 4, 8]}, "features_per_stage"),
        ({"n_blocks_per_stage": [1, 1, 1, 1, 1, 0]}, "n_blocks_per_stage"),
        ({"n_stages": 5}, "n_stages=5"),
        ({"strides": [1, 2, 2, 2, 2]}, "strides"),
        ({"strides": [1, 2, 2, 2, 2, (1, 2)]}, "strides"),
        ({"activation_checkpointing": "some"}, "'none', 'encoder', 'all'"),
    ],
)
def test_impossible_networks(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        STUNet(1, 2, **{**TINY, "strides": STRIDES, **change})


@pytest.mark.parametrize(("channels", "classes"), [(0, 2), (1, 0), (-1, 2)])
def test_impossible_channels(channels: int, classes: int) -> None:
    with pytest.raises(ArchitectureError, match="positive whole number"):
        STUNet(channels, classes, strides=STRIDES, **TINY)


def test_heads_that_nobody_weighs_are_not_computed() -> None:
    network = tiny(deep_supervision=True)
    x = torch.randn(1, 1, 32, 32, 32)
    every = network(x)
    network.decoder.supervised_levels = 3
    outputs = network(x)
    torch.testing.assert_close(outputs, every[:3], rtol=0, atol=0)
    sum(o.sum() for o in outputs).backward()
    without = [head for head in network.decoder.seg_layers if head.weight.grad is None]
    assert without == list(network.decoder.seg_layers[:2])
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), every[0])


def test_one_voxel_at_the_coarsest_stage() -> None:
    network = tiny()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ArchitectureError, match="one voxel"):
            network(torch.zeros(2, 1, 16, 16, 32))


# What the fast path computes in another way than the published network, against it in double precision.

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
    assert _is_channels_last(y)
    bound = 1e-5 if offset == 0 else 1e-4  # the convolutions of a large offset lose digits by themselves
    assert (y - expected).abs().max() <= bound * expected.abs().max()
    names = ["x", *(name for name, _ in ours.named_parameters())]
    for name, a, b in zip(names, gradients(ours, y, [x]), gradients(reference, expected, [exact]), strict=True):
        if not name.endswith(("conv1.bias", "conv2.bias")):  # rounding alone
            assert (a - b).abs().max() <= 10 * bound * b.abs().max(), name


def test_statistics_of_a_nearly_constant_channel() -> None:
    torch.manual_seed(0)
    x = (1000 + torch.randn(1, 2, 32, 32, 32)).contiguous(memory_format=CHANNELS_LAST)
    ours = _instance_norm(x, torch.ones(2), torch.zeros(2), 1e-5)
    expected, stock = instance_norm(x.double()), instance_norm(x.contiguous())
    assert _is_channels_last(ours)
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
