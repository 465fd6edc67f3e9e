"""nnU-Net's trainer with a network that lies in pieces on several processes while it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import distributed as dist
from torch.optim import Optimizer

from stunet.network import shard
from stunet.planning import Parallel
from stunet.training.accumulation import AccumulatingTrainer
from stunet.training.optimizer_states import divide_like, map_tensors, whole

__all__ = ["ShardedTrainer"]


class ShardedTrainer(AccumulatingTrainer):
    """Divides parameters, gradients and momentum among the processes, where the plans say ``parallel: fsdp``.

    Until :meth:`on_train_start` each process has the plain network, with the same weights, so whatever loads weights
    finds what it knows. Afterwards the network is in pieces, and so is the optimizer's state; before the final
    validation, in which each process predicts cases of its own, it is put together again.

    On CUDA the network computes in bf16, which needs no scaling of gradients, and gradients are summed in fp32.
    ``torch.compile`` stays off: nnU-Net compiles the network as one, and gathering between stages would break that up.

    Attributes:
        parallel: See :data:`stunet.planning.Parallel`; says nothing where there is one process.
    """

    parallel: Parallel = "ddp"

    optimizer: Optimizer

    _group: dist.ProcessGroup | None = None  # of checkpoints alone, while the network is in pieces

    @property
    def divides(self) -> bool:
        """Whether the network will be in pieces while it is trained."""
        return self.parallel == "fsdp" and self._ranks.size > 1

    @property
    def is_divided(self) -> bool:
        """Whether it is now."""
        return self._group is not None

    def _do_i_compile(self) -> bool:
        return not self.divides and bool(super()._do_i_compile())

    def _distribute(self) -> None:
        if not self.divides:
            super()._distribute()
            return
        self.grad_scaler = None
        for tensor in self._plain_network().state_dict().values():
            dist.broadcast(tensor, src=0)  # each process has initialised its own

    def plot_network_architecture(self) -> None:
        """Not of a network in pieces, as one process would wait for the others in it."""
        if not self.is_divided:
            super().plot_network_architecture()

    def on_train_start(self) -> None:
        """Also divide the network, once all that loads weights or computes in one process alone is done."""
        super().on_train_start()
        if self.divides and not self.is_divided:
            self.divide_network()

    def divide_network(self) -> None:
        """Divide the network, and the optimizer's state; all processes at once."""
        network, state = self._plain_network(), self.optimizer.state_dict()
        # Norms return views, and blocks work in place within a stage; upon a stage's output nothing does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self._ranks.size,))
        shard(network, mesh, dtype=torch.bfloat16 if self.device.type == "cuda" else None)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if state["state"]:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            divided = map_tensors(state, lambda tensor, number: divide_like(tensor, parameters[number]))
            self.optimizer.load_state_dict(divided)
        # One of its own, as checkpoints are written beside the training, and of gloo, as they are written from the CPU.
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        self.print_to_log_file(f"The network is divided among {self._ranks.size} processes")

    def gather_network(self) -> None:
        """Put the network together again, in each process; the optimizer begins anew."""
        if not self.is_divided:
            return
        network = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, self.num_input_channels,
            self.label_manager.num_segmentation_heads, self.enable_deep_supervision,
        ).to(self.device)  # fmt: skip
        values = network.state_dict()
        for name, value in self._plain_network().state_dict().items():
            values[name].copy_(whole(value))
        self.network = network
        self._group = None
        self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step, in bf16 where the network is in pieces on CUDA."""
        with self._precision():
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss and hard counts of one batch, in the precision of the training."""
        with self._precision():
            return super().validation_step(batch)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if not self.is_divided or self.device.type != "cuda":
            yield
            return
        # nnU-Net's autocast takes the type that is set when it begins. Not enabled here, so that its backward pass,
        # which stands outside of autocast, stays there.
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=False):
            yield

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation with the whole network in each process, which predicts cases of its own."""
        self.gather_network()
        super().perform_actual_validation(save_probabilities)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights, on the CPU where they have to be put together. All processes must ask for them."""
        weights = self._plain_network().state_dict()
        return {name: self._for_rank_0(value) for name, value in weights.items()} if self.is_divided else weights

    def whole_optimizer_state(self) -> dict[str, Any]:
        """As :meth:`whole_weights`, for the optimizer."""
        state = self.optimizer.state_dict()
        return map_tensors(state, lambda tensor, _: self._for_rank_0(tensor)) if self.is_divided else state

    def _for_rank_0(self, tensor: torch.Tensor) -> torch.Tensor:
        full = whole(tensor)
        # The others let go of each at once.
        return full.cpu() if self.local_rank == 0 else torch.empty(0)
