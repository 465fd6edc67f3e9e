"""The network is an ordinary module: whatever is done to one counts, beside the published structure and in double."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from published_structure import PublishedStructure
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, jacobian, vhp
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import leaky_relu
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune, weight_norm

from stunet.network import STUNet, STUNetSize, create_model

SIZE, STRIDES, SHAPE = STUNetSize("narrow", (1, 2, 1, 1, 1, 1), 2), [1, 2, 2, 2, 1, 1], (2, 1, 16, 8, 8)
ENCODER, MERGING = "encoder.stages.0.0.", "decoder.stages.4.0."


def pair() -> tuple[nn.Module, nn.Module]:
    """Ours and the published structure with the same weights, norms that are not the identity, and biases."""
    torch.manual_seed(0)
    ours = create_model(SIZE, 1, 2, STRIDES, deep_supervision=True).double()
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    published = PublishedStructure(SIZE, 1, 2, STRIDES).double()
    published.load_state_dict(ours.state_dict())
    for module in published.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False  # in place, it cannot be watched
    return ours, published


def image(seed: int = 1) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def loss_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: sum((output**3).mean() for output in network(x))


def named(network: nn.Module, name: str) -> list[str]:
    """Where a module is; the published structure has two objects for the activations of a block."""
    return [name] if not name.endswith("act") or isinstance(network, STUNet) else [name + "1", name + "2"]


def each(network: nn.Module, name: str) -> list[nn.Module]:
    return [network.get_submodule(one) for one in named(network, name)]


def replace(network: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> None:
    torch.manual_seed(2)
    new = make(each(network, name)[0]).double()
    for one in named(network, name):
        network.set_submodule(one, new)


class LoRA(nn.Module):
    """An adapter as libraries have it: the weight of what it wraps, and two factors of its own."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv3d(conv.in_channels, 1, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = nn.Conv3d(1, conv.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Any:
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def conv(old: nn.Conv3d, kernel: int = 3, **kwargs: Any) -> nn.Conv3d:
    return nn.Conv3d(old.in_channels, old.out_channels, kernel, **kwargs)


def hooked(kind: str) -> Callable[[nn.Module, str], None]:
    def change(network: nn.Module, name: str) -> None:
        for module in each(network, name):
            if kind == "forward":
                module.register_forward_hook(lambda m, args, y: 1.5 * y)
            elif kind == "forward with kwargs, always":
                module.register_forward_hook(lambda m, args, kw, y: y.sin(), with_kwargs=True, always_call=True)
            elif kind == "pre":
                module.register_forward_pre_hook(lambda m, args: (args[0].tanh(),))
            elif kind == "full backward":
                module.register_full_backward_hook(lambda m, grad, _: tuple(g if g is None else 2 * g for g in grad))
            else:
                module.register_full_backward_pre_hook(lambda m, grad: (grad[0] * 3,))

    return change


def replaced(make: Callable[[Any], nn.Module]) -> Callable[[nn.Module, str], None]:
    return lambda network, name: replace(network, name, make)


def changed(function: Callable[[Any], Any]) -> Callable[[nn.Module, str], None]:
    def change(network: nn.Module, name: str) -> None:
        torch.manual_seed(2)
        for module in each(network, name):
            function(module)

    return change


def own_forward(module: nn.Module) -> None:
    usual = module.forward
    module.forward = lambda x: usual(x).sigmoid()


DILATED = partial(conv, padding=2, dilation=2)
HOOKS = ["forward", "forward with kwargs, always", "pre", "full backward", "full backward pre"]
PARTS = ["conv1", "norm1", "conv2", "norm2", "act", "projection"]
TABLE: dict[str, tuple[str, Callable[[nn.Module, str], None]]] = {
    **{f"{kind} hook on {part}": (ENCODER + part, hooked(kind)) for kind in HOOKS for part in PARTS},
    **{f"forward hook where levels merge, on {part}": (MERGING + part, hooked("forward")) for part in PARTS},
    **{f"backward hook where levels merge, on {part}": (MERGING + part, hooked("full backward")) for part in PARTS},
    "forward hook on a head": ("decoder.seg_layers.4", hooked("forward")),
    "forward hook on an upsampling": ("decoder.upsamplings.4", hooked("forward")),
    "forward hook on an upsampling's convolution": ("decoder.upsamplings.4.conv", hooked("forward")),
    "hook on a weight": (ENCODER + "conv2", changed(lambda m: m.weight.register_hook(lambda grad: 2 * grad))),
    "hook on a norm's weight": (ENCODER + "norm1", changed(lambda m: m.weight.register_hook(lambda grad: 2 * grad))),
    "hook on a norm's bias": (MERGING + "norm2", changed(lambda m: m.bias.register_hook(lambda grad: 2 * grad))),
    "GroupNorm": (ENCODER + "norm1", replaced(lambda old: nn.GroupNorm(1, old.num_features))),
    "BatchNorm": (ENCODER + "norm2", replaced(lambda old: nn.BatchNorm3d(old.num_features))),
    "InstanceNorm with statistics": (
        ENCODER + "norm1",
        replaced(lambda old: nn.InstanceNorm3d(old.num_features, affine=True, track_running_stats=True)),
    ),
    "InstanceNorm without weights": (ENCODER + "norm1", replaced(lambda old: nn.InstanceNorm3d(old.num_features))),
    "another eps": (ENCODER + "norm1", changed(lambda m: setattr(m, "eps", 0.3))),
    "no norm": (MERGING + "norm1", replaced(lambda old: nn.Identity())),
    "ReLU": (ENCODER + "act", replaced(lambda old: nn.ReLU())),
    "PReLU": (ENCODER + "act", replaced(lambda old: nn.PReLU())),
    "GELU": (MERGING + "act", replaced(lambda old: nn.GELU())),
    "another slope": (ENCODER + "act", replaced(lambda old: nn.LeakyReLU(0.3))),
    "a slope below 0": (ENCODER + "act", replaced(lambda old: nn.LeakyReLU(-0.3))),
    "LoRA on conv2": (ENCODER + "conv2", replaced(LoRA)),
    "LoRA where levels merge": (MERGING + "conv1", replaced(LoRA)),
    "LoRA on an upsampling": ("decoder.upsamplings.4.conv", replaced(LoRA)),
    "LoRA on a head": ("decoder.seg_layers.4", replaced(LoRA)),
    "dilated convolution": (ENCODER + "conv2", replaced(DILATED)),
    "dilated convolution where levels merge": (MERGING + "conv1", replaced(DILATED)),
    "convolution without bias": (ENCODER + "conv2", replaced(lambda old: conv(old, padding=1, bias=False))),
    "convolution with a larger kernel": (MERGING + "conv2", replaced(lambda old: conv(old, 5, padding=2))),
    "convolution with reflected padding": (
        ENCODER + "conv2", replaced(lambda old: conv(old, padding=1, padding_mode="reflect"))
    ),
    "pruning": (ENCODER + "conv2", changed(lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "pruning where levels merge": (MERGING + "conv1", changed(lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "weight_norm as a hook": (ENCODER + "conv2", changed(weight_norm)),
    "weight_norm as a parametrization": (MERGING + "conv1", changed(parametrizations.weight_norm)),
    "parametrization of a norm": (
        ENCODER + "norm1", changed(lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Halved()))
    ),
    "a forward of the object's own": (ENCODER + "norm1", changed(own_forward)),
    "frozen norm": (ENCODER + "norm1", changed(lambda m: m.requires_grad_(False))),
    "frozen convolution": (MERGING + "conv2", changed(lambda m: m.requires_grad_(False))),
    "nothing": ("", changed(lambda m: None)),
}  # fmt: skip


def gradients(network: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by the input and all parameters, by the names of ours."""
    leaf = x.clone().requires_grad_()
    network.zero_grad()
    outputs = network(leaf)
    sum((output**3).mean() for output in outputs).backward()
    found = {name.replace("act1", "act"): p.grad for name, p in network.named_parameters() if p.grad is not None}
    return outputs, {**found, "input": leaf.grad}


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", TABLE)
def test_what_is_done_to_a_module_counts(case: str) -> None:
    name, change = TABLE[case]
    ours, published = pair()
    before = ours(image())[0]
    for network in (ours, published):
        change(network, name)
    for mode in (True, False):
        for network in (ours, published):
            network.train(mode)
        for _ in range(2):  # pruned and normalised weights are computed anew for each pass
            outputs, found = gradients(ours, image())
            expected_outputs, expected = gradients(published, image())
            assert_same(outputs, expected_outputs)
            assert_same(found, expected)
        with torch.no_grad():
            assert_same(ours(image()), published(image()))
    if "backward" not in case and not case.startswith(("frozen", "nothing", "hook on a", "weight_norm")):
        assert not torch.allclose(outputs[0], before)  # it did count


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_every_module(kind: str) -> None:
    def count(network: nn.Module) -> int:
        seen: list[nn.Module] = []
        register = getattr(global_hooks, f"register_module_{kind}_hook")
        handle = register(lambda module, *args: seen.append(module))
        try:
            gradients(network, image())
        finally:
            handle.remove()
        return sum(isinstance(m, nn.Conv3d | nn.InstanceNorm3d | nn.LeakyReLU) for m in seen)

    ours, published = pair()
    assert count(ours) == count(published)


def test_watching_sees_every_output_in_training() -> None:
    """Also after the watching has ended, nothing stays behind."""
    ours, published = pair()
    seen: list[dict[str, Tensor]] = []
    for network in (ours, published):
        seen.append({})
        handles = [
            module.register_forward_hook(lambda m, args, y, name=name, found=seen[-1]: found.update({name: y}))
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv3d | nn.InstanceNorm3d) and "upsamplings" not in name
        ]
        network(image())
        for handle in handles:
            handle.remove()
    assert len(seen[0]) == len(seen[1]) > 40
    assert_same(seen[0], seen[1])
    assert_same(gradients(ours, image()), gradients(published, image()))


def by_func_grad(network: nn.Module) -> Any:
    parameters = dict(network.named_parameters())
    return torch.func.grad(lambda p: sum((o**3).mean() for o in functional_call(network, p, (image(),))))(parameters)


def per_sample(network: nn.Module) -> Any:
    parameters = dict(network.named_parameters())

    def loss(p: Any, x: Tensor) -> Tensor:
        return sum((o**3).mean() for o in functional_call(network, p, (x[None],)))

    return vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, image())


def by_dual_numbers(network: nn.Module) -> Any:
    with forward_ad.dual_level():
        outputs = network(forward_ad.make_dual(image(), image(2)))
        return [forward_ad.unpack_dual(output).tangent for output in outputs]


def by_updated_weights(network: nn.Module) -> Any:
    """Gradients through a step of training, as meta-learning has them; backward runs after the weights are back."""
    parameters = dict(network.named_parameters())
    steps = torch.autograd.grad(loss_of(network)(image()), list(parameters.values()), create_graph=True)
    rate = 0.01 / max(float(step.detach().abs().max()) for step in steps)
    fast = {name: p - rate * step for (name, p), step in zip(parameters.items(), steps, strict=True)}
    loss = sum((o**3).mean() for o in functional_call(network, fast, (image(2),)))
    grads = torch.autograd.grad(loss, list(parameters.values()))
    scale = max(float(grad.abs().max()) for grad in grads)
    return [grad / scale for grad in grads]


class AsTuple(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(x))


def by_tracing(network: nn.Module) -> Any:
    traced = torch.jit.trace(AsTuple(network), (image(2),))
    return gradients(traced, image())


def by_symbolic_tracing(network: nn.Module) -> Any:
    return gradients(torch.fx.symbolic_trace(network), image())


def of_many_outputs(network: nn.Module) -> Any:
    return jacobian(lambda x: network(x)[4].flatten()[:3], image(), vectorize=True)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.func.grad": by_func_grad,
    "vmap of grad": per_sample,
    "jvp": lambda network: jvp(lambda x: network(x), (image(),), (image(2),)),
    "forward-mode AD": by_dual_numbers,
    "hvp": lambda network: hvp(loss_of(network), image(), image(2)),
    "vhp": lambda network: vhp(loss_of(network), image(), image(2)),
    "gradient through a step": by_updated_weights,
    "jacobian of many outputs at once": of_many_outputs,
    "jvp of torch.func.grad": lambda network: jvp(torch.func.grad(loss_of(network)), (image(),), (image(2),)),
    "jit.trace": by_tracing,
    "fx.symbolic_trace": by_symbolic_tracing,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", TRANSFORMS)
def test_transformations(case: str, mode: bool) -> None:
    ours, published = (TRANSFORMS[case](network.train(mode)) for network in pair())
    torch.testing.assert_close(ours, published, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_onnx_export_by_tracing(mode: bool) -> None:
    training = torch.onnx.TrainingMode.TRAINING if mode else torch.onnx.TrainingMode.EVAL
    network = pair()[0].float()
    try:
        torch.onnx.export(network, (image().float(),), io.BytesIO(), dynamo=False, training=training)
    except torch.onnx.errors.OnnxExporterError as error:
        assert "onnx is not installed" in str(error)  # noqa: PT017 - raised when all is exported, but not yet written


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["hvp", "gradient through a step", "jacobian of many outputs at once"])
def test_second_derivatives_of_channels_last(case: str) -> None:
    """In fp32, where the finest stages are channels-last."""
    results = []
    for network in pair():
        network.float()
        function: Any = loss_of(network)
        x, v = image().float(), image(2).float()
        if case == "hvp":
            results.append(hvp(function, x, v)[1])
        elif case == "jacobian of many outputs at once":
            results.append(jacobian(lambda x, network=network: network(x)[0].flatten()[:3], x, vectorize=True))
        else:
            parameters = list(network.parameters())
            grads = torch.autograd.grad(function(x), parameters, create_graph=True)
            penalty = sum((grad**2).sum() for grad in grads)
            results.append(torch.cat([g.flatten() for g in torch.autograd.grad(penalty, parameters)]))
    assert results[1].norm() > 0
    assert (results[0] - results[1]).norm() < 1e-2 * results[1].norm()


def test_hooks_on_weights_of_channels_last() -> None:
    found = []
    for network in pair():
        weight = network.float().get_submodule(ENCODER + "norm1").weight
        weight.register_hook(lambda grad: 2 * grad)
        for again in (False, True):
            loss = loss_of(network)(image().float())
            found.append(torch.autograd.grad(loss, weight, create_graph=again)[0].detach())
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-3, atol=1e-3 * float(found[3].abs().max()))


@pytest.mark.parametrize("kind", ["adapter", "checkpointed"])
def test_second_derivatives_of_other_paths(kind: str) -> None:
    ours, published = pair()
    if kind == "checkpointed":
        weights = ours.state_dict()
        ours = create_model(SIZE, 1, 2, STRIDES, deep_supervision=True, activation_checkpointing="all").double()
        ours.load_state_dict(weights)
    else:
        for network in (ours, published):
            replace(network, ENCODER + "conv2", LoRA)
    assert_same(*(hvp(loss_of(network), image(), image(2)) for network in (ours, published)))


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    for network in pair():
        loss = loss_of(network)(image())
        with torch.no_grad():
            network.get_submodule(ENCODER + "conv2").weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_tensor_subclasses_pass_through_every_operation() -> None:
    class Watched(Tensor):
        seen: ClassVar[set[str]] = set()

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.add(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, _ = pair()
    outputs = ours(image().as_subclass(Watched))
    assert all(type(output) is Watched for output in outputs)
    assert {"conv3d", "instance_norm", leaky_relu.__name__, "interpolate", "cat"} <= Watched.seen
