"""Outputs of a network's layers while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stunet.errors import FeatureError

__all__ = ["FeatureHooks", "decoder_stages", "unwrap"]


def unwrap(network: nn.Module) -> nn.Module:
    """The network within the wrappers of ``DistributedDataParallel`` and ``torch.compile``, in any order.

    Args:
        network: A network, wrapped or not.
    """
    # A wrapper has the network as its only child. A network that calls one of its parts "module" has other parts too.
    while [name for name, _ in network.named_children()] in (["module"], ["_orig_mod"]):
        network = next(network.children())
    return network


def decoder_stages(network: nn.Module) -> tuple[str, ...]:
    """Names of the decoder's stages, finest first: of STU-Net, of nnU-Net's networks, of all that are made like them.

    The stages, not the heads: nnU-Net's decoders compute the coarse heads in training alone.

    Args:
        network: A network, wrapped or not.

    Raises:
        FeatureError: It has no ``decoder.stages``.
    """
    network = unwrap(network)
    stages = getattr(getattr(network, "decoder", None), "stages", None)
    if not isinstance(stages, nn.ModuleList) or len(stages) == 0:
        raise FeatureError(
            "a network whose decoder stages are not known",
            got=f"{type(network).__name__} with {', '.join(name for name, _ in network.named_children()) or 'nothing'}",
            expected="a list of modules decoder.stages, coarsest first, as STU-Net and nnU-Net's networks have it",
            remedy="Name the layers to read.",
        )
    return tuple(f"decoder.stages.{i}" for i in reversed(range(len(stages))))


class FeatureHooks:
    """Context in which a network's runs give the outputs of some of its layers.

    The hooks are there inside the context only, however it is left::

        with FeatureHooks(network) as hooks:
            maps = hooks.run(image)

    Args:
        network: The network. Of one wrapped in ``DistributedDataParallel`` or by ``torch.compile`` the inner network
            is run: compiled code passes hooks over that were not there when it was compiled.
        names: Layers by the names that the inner network's ``named_modules`` gives them; the decoder's stages by
            default, finest first.

    Attributes:
        network: The network without wrappers.
        names: The layers, in the order in which their outputs are given.

    Raises:
        FeatureError: No such layer, or a network whose decoder stages are not known.
    """

    def __init__(self, network: nn.Module, names: Sequence[str] | None = None) -> None:
        self.network = unwrap(network)
        self.names = decoder_stages(self.network) if names is None else tuple(names)
        modules = dict(self.network.named_modules())
        for name in self.names:
            if name not in modules or name == "":
                raise _unknown_layer(name, list(modules))
        self._modules = {name: modules[name] for name in self.names}
        self._handles: list[RemovableHandle] = []
        self._outputs: dict[str, Tensor] = {}
        self._read: Callable[[str, Tensor], Tensor] | None = None

    def __enter__(self) -> FeatureHooks:
        self._handles += [
            module.register_forward_hook(partial(self._keep, name)) for name, module in self._modules.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def run(self, x: Tensor, read: Callable[[str, Tensor], Tensor] | None = None) -> tuple[Tensor, ...]:
        """Run the network once.

        Args:
            x: ``(B, C, X, Y[, Z])``.
            read: What to make of a layer's output, given its name and ``(B, C_d, ...)``, as soon as it is there. What
                is not kept need not stay in memory until the network is done, and cannot be changed in place by the
                layers that follow. By default the output itself.

        Returns:
            One tensor for each name.

        Raises:
            FeatureError: A layer that did not run, or that gives something else than one tensor.
        """
        self._outputs.clear()
        self._read = read
        try:
            self.network(x)
            if missing := [name for name in self.names if name not in self._outputs]:
                raise FeatureError(
                    "a layer that does not run",
                    got=missing[0],
                    expected="a layer that takes part in the forward pass (coarse heads do in training alone), inside "
                    "the context",
                    remedy="Name another layer, such as a stage of the decoder.",
                )
            return tuple(self._outputs[name] for name in self.names)
        finally:
            self._read = None
            self._outputs.clear()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise FeatureError(
                "a layer without a feature map",
                got=f"{name}, a {type(module).__name__}, gives a {type(output).__name__}",
                expected="a layer whose output is one tensor",
                remedy="Name a layer within it.",
            )
        self._outputs[name] = output if self._read is None else self._read(name, output)


def _unknown_layer(name: str, known: list[str]) -> FeatureError:
    alike = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or [other for other in known if other][:5]
    return FeatureError(
        "no such layer in the network",
        got=name or "an empty name",
        expected=f"a name that named_modules() gives, such as {', '.join(alike)}",
        remedy="Correct the name.",
    )
