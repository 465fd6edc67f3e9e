"""Checkpoints of a training: whole or not at all, in nnU-Net's format or in pieces, and which one to go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from stunet.errors import CheckpointError, reading
from stunet.files import atomic_path, remove_leftovers
from stunet.training.optimizer_states import load_state, named_state, numbered_state, split_state, tensors_like
from stunet.training.sharding import ShardedTrainer
from stunet.weights import check_weights, read_checkpoint
from stunet.weights.sharded import (
    SHARDED_SUFFIX,
    ShardedSave,
    find_version,
    load_sharded,
    read_sharded,
    remove_sharded,
    remove_sharded_leftovers,
)

__all__ = ["CheckpointingTrainer", "set_aside"]

_FINAL, _LATEST, _BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))
#: What tensors' names begin with in a checkpoint in pieces.
_NETWORK, _OPTIMIZER = "network.", "optimizer."
#: What is taken from the rest of it.
_PROGRESS = ("optimizer", "init_args", "current_epoch", "logging", "_best_ema", "inference_allowed_mirroring_axes")


class CheckpointingTrainer(ShardedTrainer):
    """Writes checkpoints in nnU-Net's format, whole or not at all, and checks those that it reads.

    While the network is in pieces, ``checkpoint_latest`` and ``checkpoint_best`` are folders instead
    (:mod:`stunet.weights.sharded`), which all processes write while the training goes on. When it ends they make
    place for nnU-Net's files.
    """

    _continued = False
    _goes_on = False  # whether the training was asked to go on from an earlier one
    _saving: ShardedSave | None = None

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint in nnU-Net's format, or the periodic and the best one in pieces where the network is.

        Raises:
            CheckpointError: The last checkpoint in pieces could not be written.
        """
        path = Path(filename)
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
        elif self.is_divided and path.name in (_LATEST, _BEST):
            self._save_in_pieces(path.with_suffix(SHARDED_SUFFIX))
        elif self.is_divided or self.local_rank == 0:
            weights, optimizer_state = self.whole_weights(), self.whole_optimizer_state()
            if self.local_rank == 0:
                _write(path, {"network_weights": weights, "optimizer_state": optimizer_state, **self._progress()})
                remove_sharded(path.with_suffix(SHARDED_SUFFIX))  # of an earlier training, or with other settings

    def _progress(self) -> dict[str, Any]:
        """What nnU-Net keeps beside the states of network and optimizer."""
        return {
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            # Prediction finds this class in nnU-Net itself; the network is in the plans.
            "trainer_name": nnUNetTrainer.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }

    def _save_in_pieces(self, folder: Path) -> None:
        self.finish_saving()
        assert self._group is not None
        network = self._plain_network()
        tensors, rest = split_state(named_state(self.optimizer, network))
        named = {_NETWORK + name: value for name, value in network.state_dict().items()}
        named |= {_OPTIMIZER + name: value for name, value in tensors.items()}
        self._saving = ShardedSave(folder, named, {**self._progress(), "optimizer": rest}, self._group)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; fails, in all processes, where that has failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.wait()
        if self.local_rank == 0:  # the file that it takes the place of
            saving.folder.with_suffix(".pth").unlink(missing_ok=True)

    def has_only_pieces(self) -> bool:
        """Whether there is a checkpoint to go on from, but none that nnU-Net, which looks for files, would find."""
        folder = Path(self.output_folder)
        return not any((folder / name).is_file() for name in (_FINAL, _LATEST, _BEST)) and bool(self._candidates())

    def on_train_start(self) -> None:
        """Also clear away what a killed process has left."""
        super().on_train_start()
        if self.local_rank == 0:
            remove_leftovers(self.output_folder, "checkpoint_*.pth")
            remove_sharded_leftovers(Path(self.output_folder))

    def on_epoch_end(self) -> None:
        """Also make sure that the checkpoint in pieces of the last epoch has become whole."""
        self.finish_saving()
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Also leave nnU-Net's files alone in the place of checkpoints in pieces."""
        self.finish_saving()
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing:
            folder = Path(self.output_folder)
            best = find_version((folder / _BEST).with_suffix(SHARDED_SUFFIX))
            if best is not None:
                _write(folder / _BEST, _in_one_piece(best))
            for name in (_BEST, _LATEST):
                remove_sharded((folder / name).with_suffix(SHARDED_SUFFIX))

    def load_checkpoint(self, filename_or_checkpoint: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint after checking that it is whole, harmless and fits the network.

        Where ``checkpoint_latest.pth`` is asked for, the one of the latest epoch is taken, be it the best one, or in
        pieces: all are as complete, and fewer epochs are lost.

        Raises:
            CheckpointError: Truncated, no checkpoint, asks for code to be run, or of another network.
        """
        if self.is_ddp:
            dist.barrier()  # rank 0 may still be writing it
        path = self._last_whole(Path(filename_or_checkpoint))
        if not self.was_initialized:
            self.initialize()
        if path.is_dir():
            self._load_pieces(path)
        else:
            self.gather_network()
            self._load_whole(read_checkpoint(path), path)
        self._continued = True

    def _candidates(self) -> list[Path]:
        """What a training can go on from, ordered as :meth:`_last_whole` chooses among equal epochs."""
        folder = Path(self.output_folder)
        files = [folder / _LATEST, folder / _BEST]
        pieces = [find_version(file.with_suffix(SHARDED_SUFFIX)) for file in files]
        return [file for file in files if file.is_file()] + [version for version in pieces if version is not None]

    def _last_whole(self, requested: Path) -> Path:
        # nnU-Net asks for the best one where it is to continue and sees no other.
        continues = requested.name == _LATEST or (requested.name == _BEST and self._goes_on and not self._continued)
        candidates = self._candidates()
        if not continues or candidates in ([], [requested]):
            return requested
        epochs: dict[Path, int] = {}
        errors: list[CheckpointError] = []
        for path in candidates:
            try:
                content = read_sharded(path)[0] if path.is_dir() else read_checkpoint(path)
                epochs[path] = content["current_epoch"]
            except CheckpointError as error:
                errors.append(error)
                self.print_to_log_file(f"Passing over {_name(path)}: {error}")
        if not epochs:
            raise errors[0]
        # On equal epochs the best one: it was written last and knows of itself as the best.
        chosen = max(epochs, key=lambda path: (epochs[path], _name(path).startswith("checkpoint_best")))
        found = ", ".join(f"{_name(path)} after epoch {epoch - 1}" for path, epoch in epochs.items())
        self.print_to_log_file(f"Found {found}; continuing from {_name(chosen)}")
        return chosen

    def _load_whole(self, checkpoint: dict[str, Any], path: Path) -> None:
        """What the restricted reader has read; nnU-Net would read the file again, without restraint."""
        network = self._plain_network()
        check_weights(checkpoint["network_weights"], network.state_dict(), source=path)
        with reading(path, "a checkpoint that a training cannot continue from"):
            network.load_state_dict(checkpoint["network_weights"])
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
            scaler: Any = self.grad_scaler
            if scaler is not None and checkpoint["grad_scaler_state"] is not None:
                scaler.load_state_dict(checkpoint["grad_scaler_state"])
            self._load_progress(checkpoint)

    def _load_progress(self, content: dict[str, Any]) -> None:
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]

    def _load_pieces(self, version: Path) -> None:
        content, shapes = read_sharded(version)
        lacking = [key for key in _PROGRESS if key not in content]
        if lacking:
            raise CheckpointError(
                "a sharded checkpoint without all that a training needs",
                got=f"{version}: no {', '.join(lacking)}",
                expected="what stunet train wrote",
                remedy="Continue from another checkpoint of the fold.",
            )
        check_weights(_part(shapes, _NETWORK), self._plain_network().state_dict(), source=version)
        if self.divides and not self.is_divided:
            self.divide_network()
        network = self._plain_network()
        state = tensors_like(_part(shapes, _OPTIMIZER), network)
        room = {_NETWORK + name: value for name, value in network.state_dict().items()}
        load_sharded(version, room | {_OPTIMIZER + name: value for name, value in state.items()})
        load_state(self.optimizer, network, content["optimizer"], state, source=version)
        self._load_progress(content)


def set_aside(folder: Path) -> None:
    """Give the checkpoints of a fold, from which a training could go on, names that end with ``.previous``.

    Args:
        folder: The fold's.
    """
    for name in (_FINAL, _LATEST, _BEST):
        for path in ((folder / name), (folder / name).with_suffix(SHARDED_SUFFIX)):
            previous = path.with_name(f"{path.name}.previous")
            if path.exists():
                remove_sharded(previous)
                os.replace(path, previous)


def _in_one_piece(version: Path) -> dict[str, Any]:
    """nnU-Net's checkpoint of one in pieces."""
    content, shapes = read_sharded(version)
    tensors = {name: torch.zeros(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
    load_sharded(version, tensors)
    optimizer_state = numbered_state(content.pop("optimizer"), _part(tensors, _OPTIMIZER))
    return {"network_weights": _part(tensors, _NETWORK), "optimizer_state": optimizer_state, **content}


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _name(path: Path) -> str:
    return path.parent.name if path.is_dir() else path.name


def _write(path: Path, checkpoint: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)
