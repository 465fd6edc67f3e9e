"""Checkpoints of a training: atomic, in nnU-Net's format or sharded, which to resume from, and which transfers best."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch import distributed as dist

from stunet.errors import CheckpointError, STUNetError, reading
from stunet.files import atomic_path, write_json
from stunet.planning.preprocessed import open_preprocessed
from stunet.ranking import prepare_target, score_candidate
from stunet.training.distributed import Ranks
from stunet.training.optimizer import set_kernel
from stunet.weights.read import check_weights, read_checkpoint
from stunet.weights.sharded import SHARDED_SUFFIX, ShardedSave, find_version, load_sharded, read_sharded, remove_sharded

if TYPE_CHECKING:
    from stunet.training.trainer import BaseSTUNetTrainer

_FINAL, _LATEST, _BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))
#: What tensors' names begin with in a sharded checkpoint; of the optimizer's, ``:`` separates parameter and value.
_NETWORK, _OPTIMIZER = "network.", "optimizer."


class Checkpoints:
    """Write a trainer's checkpoints atomically in nnU-Net's format, and check those that it reads.

    While the network is sharded, ``checkpoint_latest`` and ``checkpoint_best`` are folders instead
    (:mod:`stunet.weights.sharded`), which all processes write while the training continues. When it ends they make
    place for nnU-Net's files.
    """

    def __init__(self, trainer: BaseSTUNetTrainer, *, asked_to_resume: bool) -> None:
        self._trainer = trainer
        self._asked_to_resume = asked_to_resume
        self._saving: ShardedSave | None = None
        self.resumed = False  # whether the training continues an earlier one

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.output_folder)

    def save(self, path: Path, epochs: int) -> None:
        """Write a checkpoint after so many epochs, sharded if it is a sharded network's periodic or best one."""
        trainer, sharding = self._trainer, self._trainer.sharding
        if trainer.disable_checkpointing:
            trainer.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        progress = {
            "grad_scaler_state": None if trainer.grad_scaler is None else trainer.grad_scaler.state_dict(),
            "logging": trainer.logger.get_checkpoint(),
            "_best_ema": trainer._best_ema,
            "current_epoch": epochs,
            "init_args": trainer.my_init_kwargs,
            # Prediction finds this class in nnU-Net itself; the network is in the plans.
            "trainer_name": nnUNetTrainer.__name__,
            "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
            **trainer.pretext_state(),
        }
        if sharding.group is not None and path.name in (_LATEST, _BEST):
            self.finish()
            weights, optimizer_state = sharding.states(full=False)
            tensors = {_NETWORK + name: value for name, value in weights.items()}
            for name, values in optimizer_state["state"].items():
                tensors |= {f"{_OPTIMIZER}{name}:{key}": v for key, v in values.items() if isinstance(v, Tensor)}
            content = {**progress, "optimizer": {"param_groups": optimizer_state["param_groups"]}}
            self._saving = ShardedSave(path.with_suffix(SHARDED_SUFFIX), tensors, content, sharding.group)
            return
        if sharding.group is None:
            weights, optimizer_state = trainer.plain_network.state_dict(), trainer.optimizer.state_dict()
        else:
            weights, optimizer_state = sharding.states(full=True)  # of all processes
        if trainer.local_rank == 0:
            _write(path, {"network_weights": weights, "optimizer_state": _numbered(optimizer_state), **progress})
            remove_sharded(path.with_suffix(SHARDED_SUFFIX))  # of an earlier training, or with other settings

    def finish(self) -> None:
        """Wait for the sharded checkpoint that is being written; fails, in all processes, where that has failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()
            if self._trainer.local_rank == 0:  # the file that it takes the place of
                saving.folder.with_suffix(".pth").unlink(missing_ok=True)

    def replace_sharded(self) -> None:
        """Leave nnU-Net's files alone in the place of sharded checkpoints, once the final one is written."""
        if self._trainer.local_rank == 0 and not self._trainer.disable_checkpointing:
            best = find_version((self._folder / _BEST).with_suffix(SHARDED_SUFFIX))
            if best is not None:
                content, shapes = read_sharded(best)
                tensors = {name: torch.zeros(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
                load_sharded(best, tensors)
                content["network_weights"] = _part(tensors, _NETWORK)
                optimizer_state = _optimizer_state(content.pop("optimizer"), _part(tensors, _OPTIMIZER))
                _write(self._folder / _BEST, {**content, "optimizer_state": _numbered(optimizer_state)})
            for name in (_BEST, _LATEST):
                remove_sharded((self._folder / name).with_suffix(SHARDED_SUFFIX))

    def has_only_sharded(self) -> bool:
        """Whether there is a checkpoint to resume from, but none that nnU-Net, which looks for files, would find."""
        files = [self._folder / name for name in (_FINAL, _LATEST, _BEST)]
        return not any(file.is_file() for file in files) and bool(self._candidates())

    def resume_from_sharded(self) -> None:
        """Resume, where that was asked for, from a checkpoint that nnU-Net does not find."""
        if self._asked_to_resume and not self.resumed and self.has_only_sharded():
            self.load(self._folder / _LATEST)

    def load(self, requested: Path) -> None:
        """Resume from a checkpoint after checking that it is complete, harmless and fits the network.

        Where ``checkpoint_latest.pth`` is asked for, the one of the latest epoch is taken, be it the best one, or
        sharded: all are as complete, and fewer epochs are lost. The optimizer keeps the kernel that the plans want.

        Raises:
            CheckpointError: Truncated, no checkpoint, asks for code to be run, or of another network.
        """
        trainer = self._trainer
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing it
        path = self._newest(requested)
        if not trainer.was_initialized:
            trainer.initialize()
        remedy = "resume with the fine_tune it began with, or copy it again"
        with reading(path, "a checkpoint that this training cannot continue from", remedy=remedy):
            if path.is_dir():
                self._load_sharded(path)
            else:
                trainer.sharding.gather()
                self._load_file(path)
        set_kernel(trainer.optimizer, fused=trainer.fused_optimizer)
        self.resumed = True

    def _candidates(self) -> list[Path]:
        files = [self._folder / _LATEST, self._folder / _BEST]
        versions = [find_version(file.with_suffix(SHARDED_SUFFIX)) for file in files]
        return [file for file in files if file.is_file()] + [version for version in versions if version is not None]

    def _newest(self, requested: Path) -> Path:
        # nnU-Net asks for the best one where it is to continue and sees no other.
        resumes = requested.name == _LATEST or (requested.name == _BEST and self._asked_to_resume and not self.resumed)
        candidates = self._candidates()
        if not resumes or candidates in ([], [requested]):
            return requested
        epochs: dict[Path, int] = {}
        for path in candidates:
            try:
                content = read_sharded(path)[0] if path.is_dir() else read_checkpoint(path)
                epochs[path] = content["current_epoch"]
            except CheckpointError as error:
                self._trainer.print_to_log_file(f"Passing over {_name(path)}: {error}")
        if not epochs:
            return candidates[0]  # which says what is wrong with it
        # On equal epochs the best one: it was written last and knows of itself as the best.
        chosen = max(epochs, key=lambda path: (epochs[path], _name(path).startswith("checkpoint_best")))
        found = ", ".join(f"{_name(path)} after epoch {epoch - 1}" for path, epoch in epochs.items())
        self._trainer.print_to_log_file(f"Found {found}; continuing from {_name(chosen)}")
        return chosen

    def _load_file(self, path: Path) -> None:
        trainer, checkpoint = self._trainer, read_checkpoint(path)  # nnU-Net would unpickle whatever it holds
        network = trainer.plain_network
        check_weights(checkpoint["network_weights"], network.state_dict(), source=path)
        network.load_state_dict(checkpoint["network_weights"])
        trainer.load_pretext_state(checkpoint)
        trainer.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self._load_progress(checkpoint)

    def _load_sharded(self, version: Path) -> None:
        trainer = self._trainer
        content, shapes = read_sharded(version)
        check_weights(_part(shapes, _NETWORK), trainer.plain_network.state_dict(), source=version)
        trainer.sharding.shard()
        network = trainer.plain_network
        momentum = {  # sharded as the parameters are
            key: torch.zeros_like(network.get_parameter(key.rpartition(":")[0]), dtype=shape.dtype, requires_grad=False)
            for key, shape in _part(shapes, _OPTIMIZER).items()
        }
        tensors = {_NETWORK + name: value for name, value in network.state_dict().items()}
        load_sharded(version, tensors | {_OPTIMIZER + name: value for name, value in momentum.items()})
        trainer.optimizer.load_state_dict(_optimizer_state(content["optimizer"], momentum))
        self._load_progress(content)

    def _load_progress(self, content: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer.my_init_kwargs = content["init_args"]
        trainer.logger.load_checkpoint(content["logging"])
        for name in ("current_epoch", "_best_ema", "inference_allowed_mirroring_axes"):
            setattr(trainer, name, content[name])


def set_aside(folder: Path, ranks: Ranks) -> None:
    """Rename the checkpoints of a fold, from which a restart would resume, to end with ``.previous``.

    All processes call it once they have read their weights, which may be among what is renamed.
    """
    barrier = dist.barrier if ranks.size > 1 else lambda: None
    barrier()
    for name in (_FINAL, _LATEST, _BEST) if ranks.rank == 0 else ():
        for path in (folder / name, (folder / name).with_suffix(SHARDED_SUFFIX)):
            if path.exists():
                previous = path.with_name(f"{path.name}.previous")
                remove_sharded(previous)
                os.replace(path, previous)
    barrier()


def _optimizer_state(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Build an optimizer's state by the parameters' names, which any optimizer loads as well as numbers."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(":")
        state.setdefault(parameter, {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Number the parameters of an optimizer's state, which may be by names, as ``optimizer.state_dict()`` does."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _name(path: Path) -> str:
    return path.parent.name if path.is_dir() else path.name


def _write(path: Path, checkpoint: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


class TransferSelection:
    """Score checkpoints of a training for one target by CC-FV, and keep the best one.

    ``transfer_curve.json`` in the fold's folder has all scores, and a training that is resumed continues it;
    ``checkpoint_best_transfer.pth`` is the checkpoint with the highest one. Cases and points of the target are drawn
    at once, the same ones throughout, so that what is wrong with it shows before the training.
    """

    n_cases = 20

    def __init__(self, trainer: BaseSTUNetTrainer) -> None:
        self._trainer = trainer
        dataset = open_preprocessed(str(trainer.select_for), "nnUNetPlans", trainer.configuration_name)
        self._name = dataset.name
        self._target = prepare_target(dataset, dataset.choose(dataset.cases, self.n_cases, seed=0))

    def score(self, checkpoint: Path, epoch: int) -> None:
        """Score a checkpoint that was just written. What fails is logged: it must not end a training of weeks."""
        log, curve_file = self._trainer.print_to_log_file, checkpoint.with_name("transfer_curve.json")
        try:
            device = self._trainer.device
            result = score_candidate(checkpoint.name, checkpoint, self._target, device=device, n_resamples=200)
        except STUNetError as error:
            log(f"No transferability score for epoch {epoch}: {error}")
            return
        curve: list[dict[str, Any]] = []
        with suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or no curve
            # Epochs from here on are of a run that was interrupted, and are done again.
            curve = [point for point in json.loads(curve_file.read_text(encoding="utf-8")) if point["epoch"] < epoch]
        best = max((point["score"] for point in curve), default=-float("inf"))
        score = float(result.scores["ccfv"] or 0.0)
        kept = checkpoint.with_name("checkpoint_best_transfer.pth")
        if score > best or not kept.is_file():
            with atomic_path(kept) as temporary:
                shutil.copyfile(checkpoint, temporary)
        interval = None if result.interval is None else list(result.interval)
        write_json([*curve, {"epoch": epoch, "score": score, "interval": interval}], curve_file)
        log(
            f"Transferability to {self._name} after epoch {epoch}: CC-FV {score:.4f}"
            f"{', the best so far' if score > best else f' (best {best:.4f})'}, in {result.seconds:.0f} s"
        )
