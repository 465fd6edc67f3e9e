"""A training step whose batch goes through the network in pieces, so that activations are those of a piece."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stunet.errors import SettingsError
from stunet.loss import WholeBatch
from stunet.training.partial_labels import PartialLabelTrainer

__all__ = ["AccumulatingTrainer"]


class AccumulatingTrainer(PartialLabelTrainer):
    """Gradients of a batch added up from pieces of it, before nnU-Net's step takes them.

    The step is that of the whole batch: the loss of a piece is weighed by what the whole batch annotates, which is
    counted first. With ``batch_dice`` that takes the probabilities of the whole batch, so the network runs once more
    for each piece, without gradients.

    Attributes:
        gradient_accumulation: Pieces into which each process divides its share of the batch.
    """

    gradient_accumulation: int = 1

    def on_train_start(self) -> None:
        """Also refuse pieces that cannot be.

        Raises:
            SettingsError: More pieces than samples, or a loss that is not the sum of pieces.
        """
        if not self.was_initialized:
            self.initialize()
        self._check_pieces()
        super().on_train_start()

    def _check_pieces(self) -> None:
        pieces = self.gradient_accumulation
        # The same in each process, so that all of them stop: the smallest share is the whole batch's floor.
        smallest = int(self.configuration_manager.batch_size) // self._ranks.size
        if pieces > smallest:
            raise SettingsError(
                "a batch that cannot be divided into so many pieces",
                got=f"gradient_accumulation={pieces} for {smallest} samples in a process",
                expected=f"{smallest} pieces at most",
                remedy="Lower gradient_accumulation, or raise batch_size.",
            )
        if pieces > 1 and self._partial_loss is None:
            raise SettingsError(
                "a loss that is not the sum of the losses of pieces",
                got=f"gradient_accumulation={pieces} for a dataset with regions, which keeps nnU-Net's own loss",
                expected="exclusive labels",
                remedy="Leave gradient_accumulation out; activation_checkpointing=all saves memory with any loss.",
            )

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step; where the batch goes in pieces, they run where nnU-Net asks for the loss."""
        if self.gradient_accumulation == 1:
            return super().train_step(batch)
        annotated = None if self._annotations is None else self._annotations.mask(batch["keys"])
        network, loss = self.network, self.loss
        self.network = _Later(network)
        self.loss = lambda data, target: self._loss_in_pieces(  # type: ignore[assignment] # nnU-Net only calls it
            network, loss, _Batch(data, target, annotated)
        )
        try:
            return super().train_step(batch)
        finally:
            self.network, self.loss = network, loss

    def _loss_in_pieces(self, network: nn.Module, loss: nn.Module, batch: _Batch) -> Tensor:
        assert self._partial_loss is not None
        whole = WholeBatch()
        pieces = batch.divide(self.gradient_accumulation)
        with torch.no_grad():
            for piece in pieces:
                # Targets stand in for logits where these are not read.
                output = network(piece.data) if self._partial_loss.counts_probabilities else piece.target
                with self._partial_loss.annotated_in(piece.annotated), self._partial_loss.counted_in(whole):
                    loss(output, piece.target)
                del output
        # What autocast has kept of the weights has no gradient.
        torch.clear_autocast_cache()
        done: list[Tensor] = []
        for piece in pieces[:-1]:
            # Gradients are exchanged with the last piece's, all at once.
            with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
                part = self._part(network, loss, piece, whole)
                torch.clear_autocast_cache()
                with _no_autocast(part.device.type):
                    torch.autograd.backward(part if self.grad_scaler is None else self.grad_scaler.scale(part))
                done.append(part.detach())
        return sum(done, self._part(network, loss, pieces[-1], whole))  # nnU-Net goes backward from here

    def _part(self, network: nn.Module, loss: nn.Module, piece: _Batch, whole: WholeBatch) -> Tensor:
        assert self._partial_loss is not None
        output = network(piece.data)
        with self._partial_loss.annotated_in(piece.annotated), self._partial_loss.as_part_of(whole):
            return cast(Tensor, loss(output, piece.target))


@dataclass(frozen=True)
class _Batch:
    """Images ``(B, C, X, Y[, Z])``, targets (a list with deep supervision), and what each case annotates."""

    data: Tensor
    target: Tensor | list[Tensor]
    annotated: Tensor | None

    def divide(self, n: int) -> list[_Batch]:
        size = len(self.data)
        return [self._cut(slice(a, b)) for a, b in pairwise(size * i // n for i in range(n + 1))]

    def _cut(self, cases: slice) -> _Batch:
        target = [t[cases] for t in self.target] if isinstance(self.target, list) else self.target[cases]
        return _Batch(self.data[cases], target, None if self.annotated is None else self.annotated[cases])


class _Later(nn.Module):
    """Stands in for a network that runs when the loss is asked for: it has its parameters and gives images back."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, data: Tensor) -> Tensor:
        return data


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
