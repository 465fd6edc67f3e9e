"""A STU-Net whose parameters lie in pieces on several processes (PyTorch's FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stunet.network.architecture import STUNet
from stunet.network.sharded_memory import sharded_units

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard"]


def shard(network: STUNet, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Divide parameters, gradients and whatever an optimizer makes of them among the processes, in place.

    Each stage and each way up is gathered when it is about to compute, and let go of afterwards, and so are the heads.
    Nothing must work in place upon what a stage or a way up returns: gathering for the backward pass hangs on it. An
    optimizer made before does not know the new parameters.

    Args:
        network: The same weights on each process.
        mesh: The processes, along one axis.
        dtype: What stages compute in; gradients are summed in fp32 all the same. The parameters' own by default.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second or two

    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=dtype is not None
    )
    for part in sharded_units(network):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # What is left, the heads, is small. Let go of as well, as otherwise it would stay whole where no backward pass
    # follows, and whoever asks the network for its parameters after a validation would get others than the optimizer's.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
