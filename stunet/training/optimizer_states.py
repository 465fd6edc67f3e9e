"""An optimizer's state by the names of the parameters, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from stunet.errors import CheckpointError

__all__ = [
    "divide_like",
    "load_state",
    "map_tensors",
    "named_state",
    "numbered_state",
    "split_state",
    "tensors_like",
    "whole",
]

#: Of a parameter's state, between the parameter's name and that of the value.
_SEPARATOR = ":"


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its pieces. All processes must ask for it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divide_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's piece of a tensor that all processes have, where it is one like the parameter's.

    Args:
        tensor: Of the parameter's shape, or a value that stays whole.
        parameter: A whole one, or one in pieces.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def map_tensors(state: Mapping[str, Any], function: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    """``optimizer.state_dict()`` with each tensor of the parameters' states replaced, in the parameters' order.

    Args:
        state: What is left as it is.
        function: Gets the tensor and the number of its parameter.
    """
    states = {
        number: {
            key: function(value, number) if isinstance(value, Tensor) else value
            for key, value in state["state"][number].items()
        }
        for number in sorted(state["state"])
    }
    return {**state, "state": states}


def named_state(optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names of parameters in the place of numbers."""
    names = _names(optimizer, network)
    state = optimizer.state_dict()
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"param_groups": groups, "state": {names[n]: dict(values) for n, values in state["state"].items()}}


def split_state(named: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a named state by one name each, and the state without them."""
    tensors = {
        f"{name}{_SEPARATOR}{key}": value
        for name, values in named["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    rest = {
        name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for name, values in named["state"].items()
    }
    return tensors, {**named, "state": rest}


def tensors_like(shapes: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Room for the tensors of :func:`split_state`, divided as the network's parameters are.

    Args:
        shapes: Names, shapes and types.
        network: Its parameters are whole or in pieces.
    """
    parameters = dict(network.named_parameters())
    room = {}
    for name, shape in shapes.items():
        parameter = parameters.get(name.rpartition(_SEPARATOR)[0])
        if parameter is not None and parameter.shape == shape.shape:
            room[name] = torch.zeros_like(parameter, dtype=shape.dtype, requires_grad=False)
        else:
            room[name] = torch.zeros(shape.shape, dtype=shape.dtype)
    return room


def load_state(
    optimizer: Optimizer, network: nn.Module, rest: Mapping[str, Any], tensors: Mapping[str, Tensor], *, source: object
) -> None:
    """Give an optimizer a state that :func:`split_state` has divided.

    Args:
        optimizer: Its groups are those of the state.
        network: Whose parameters it changes.
        rest: The state without its tensors.
        tensors: The tensors, whole or in pieces, as the parameters are.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: Parameters that are grouped in another way.
    """
    mine = [group["params"] for group in named_state(optimizer, network)["param_groups"]]
    theirs = [list(group["params"]) for group in rest["param_groups"]]
    if mine != theirs:
        raise CheckpointError(
            "a checkpoint of another optimizer",
            got=f"{source}: {_describe(theirs)}",
            expected=_describe(mine),
            remedy="Continue with the fine_tune that the training was started with.",
        )
    optimizer.load_state_dict(numbered_state(rest, tensors))


def numbered_state(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` gave before :func:`named_state` and :func:`split_state`.

    Args:
        rest: The state without its tensors.
        tensors: The tensors.
    """
    numbers: dict[str, int] = {}
    groups = []
    for group in rest["param_groups"]:
        numbers |= {name: len(numbers) + i for i, name in enumerate(group["params"])}
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    state: dict[int, dict[str, Any]] = {numbers[name]: dict(values) for name, values in rest["state"].items()}
    for key, tensor in tensors.items():
        name, _, value = key.rpartition(_SEPARATOR)
        state.setdefault(numbers[name], {})[value] = tensor
    return {"state": state, "param_groups": groups}


def _describe(groups: list[list[str]]) -> str:
    return f"groups of {', '.join(str(len(group)) for group in groups)} parameters"


def _names(optimizer: Optimizer, network: nn.Module) -> dict[int, str]:
    """Name of each parameter by the number that it has in the optimizer's state."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: names[id(parameter)] for number, parameter in enumerate(parameters)}
