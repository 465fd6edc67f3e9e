"""A training from its arguments: in one process, or in each of those that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import distributed as dist
from torch.backends import cudnn

from stunet.errors import SettingsError, UsageError
from stunet.planning import find_dataset, find_plans, load_plans, nnunet_folder, resolve_configuration
from stunet.training.checkpointing import set_aside
from stunet.training.distributed import DistributedTrainer, seed_everything
from stunet.training.ranks import Ranks, check_agreement, check_shared_folder, process_group, share_of_batch
from stunet.training.trainer import BaseSTUNetTrainer
from stunet.weights.sharded import SHARDED_SUFFIX

__all__ = ["TrainRequest", "check_request", "train"]

#: Stands for an epoch before the first, when the network is initialised.
_BEFORE_TRAINING = 2**31


@dataclass(frozen=True)
class TrainRequest:
    """What ``stunet train`` is asked for; all but the last three as of ``nnUNetv2_train``.

    Attributes:
        dataset: Id or name.
        configuration: For example ``3d_fullres``.
        fold: 0 to 4, or ``all``.
        trainer: Name of the trainer.
        plans: Name of the plans.
        device: ``cuda``, ``cpu`` or ``mps``.
        pretrained_weights: A checkpoint of the same network to start from.
        continue_training: From the last checkpoint.
        only_validation: No training.
        validate_best: Validate with ``checkpoint_best.pth``.
        save_probabilities: Of the validation.
        disable_checkpointing: Write none.
        global_batch: Samples of all processes together; the plans' batch size where it is None.
        seed: See :class:`DistributedTrainer`.
        timeout: Seconds that the processes wait for each other.
    """

    dataset: str
    configuration: str
    fold: str
    trainer: str = "STUNetTrainer"
    plans: str = "nnUNetPlans"
    device: str = "cuda"
    pretrained_weights: str | None = None
    continue_training: bool = False
    only_validation: bool = False
    validate_best: bool = False
    save_probabilities: bool = False
    disable_checkpointing: bool = False
    global_batch: int | None = None
    seed: int | None = None
    timeout: float = 1800.0


def train(request: TrainRequest) -> None:
    """Train and validate, together with the other processes where there are any.

    After a restart by ``torchrun`` the training goes on from its last checkpoint without being told.

    Raises:
        UsageError: The processes are not all there, or would not train the same thing.
    """
    ranks = Ranks.from_environment()
    with _together(ranks, request):
        _use_device(ranks, request.device)
        if ranks.size > 1:
            check_agreement(_content(request))
        if request.seed is not None:
            seed_everything(request.seed, ranks.rank, _BEFORE_TRAINING)
            if request.device == "cpu":  # batches of other processes are not drawn from the seed
                os.environ.setdefault("nnUNet_n_proc_DA", "0")
        trainer = _make_trainer(ranks, request)
        goes_on = request.continue_training or (ranks.n_restarts > 0 and not request.only_validation)
        _load_weights(trainer, goes_on, request)
        if not goes_on and not request.only_validation:
            _set_aside(trainer, ranks)
        if not request.only_validation:
            trainer.run_training()
        if request.validate_best:
            trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_best.pth")))
        trainer.perform_actual_validation(request.save_probabilities)


@contextmanager
def _together(ranks: Ranks, request: TrainRequest) -> Iterator[None]:
    if ranks.size == 1:
        yield
        return
    with ExitStack() as stack:
        if ranks.rank > 0:  # nnU-Net prints in every process what is the same in all
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(process_group(ranks, request.device, request.timeout))
        yield


def _use_device(ranks: Ranks, device: str) -> None:
    if device != "cuda":
        # torchrun sets OMP_NUM_THREADS to 1 by itself; of one process it is what the user wants.
        if ranks.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // ranks.local_size))
        return
    _check_devices(ranks.local_rank)
    torch.cuda.set_device(ranks.local_rank)
    torch.set_num_threads(1)  # as nnU-Net does: more do not help a GPU
    cudnn.deterministic, cudnn.benchmark = False, True


def _check_devices(local_rank: int) -> None:
    if torch.cuda.device_count() <= local_rank:
        raise UsageError(
            "fewer GPUs than processes",
            got=f"{torch.cuda.device_count()} CUDA devices for local rank {local_rank}",
            expected="a device for each process of a machine",
            remedy="Start fewer with -num_gpus or --nproc-per-node, or choose the CPU with -device cpu.",
        )


def check_request(request: TrainRequest, n_processes: int) -> None:
    """Find what so many processes of this machine would refuse, before they are started, and started once more.

    Raises:
        STUNetError: No such dataset, plans or configuration, too small a batch, or too few GPUs.
    """
    plans = load_plans(find_plans(find_dataset(request.dataset), request.plans))
    configuration = resolve_configuration(plans, request.configuration)
    if request.device == "cuda":
        _check_devices(n_processes - 1)
    batch = configuration["batch_size"] if request.global_batch is None else request.global_batch
    share_of_batch(int(batch), Ranks(0, n_processes, 0, n_processes))


def _make_trainer(ranks: Ranks, request: TrainRequest) -> Any:
    trainer = get_trainer_from_args(
        request.dataset,
        request.configuration,
        request.fold if request.fold == "all" else int(request.fold),
        request.trainer,
        request.plans,
        request.continue_training or ranks.n_restarts > 0,
        torch.device(request.device),
    )
    if not isinstance(trainer, DistributedTrainer) and (ranks.size > 1 or request.seed is not None):
        raise UsageError(
            "a trainer that knows nothing of --seed or of several processes",
            got=type(trainer).__name__,
            expected="STUNetTrainer, or a trainer derived from it",
            remedy="Choose another -tr, or train with nnUNetv2_train.",
        )
    trainer.disable_checkpointing = request.disable_checkpointing
    if request.seed is not None:
        trainer.seed = request.seed
    if request.global_batch is not None:
        _set_batch_size(trainer, request)
    share_of_batch(int(trainer.configuration_manager.batch_size), ranks)  # before anything is written
    if ranks.size > 1:
        check_shared_folder(Path(trainer.output_folder), ranks)
    return trainer


def _load_weights(trainer: Any, goes_on: bool, request: TrainRequest) -> None:
    folder = Path(trainer.output_folder)
    # A restart before the first checkpoint begins once more.
    has_begun = any(path.suffix in (".pth", SHARDED_SUFFIX) for path in folder.glob("checkpoint_*"))
    goes_on = goes_on and has_begun
    weights = None if goes_on else request.pretrained_weights
    if isinstance(trainer, BaseSTUNetTrainer):
        # It goes on from what nnU-Net does not look for, when the training starts.
        goes_on = goes_on and not trainer.has_only_pieces()
        if weights is not None and not request.only_validation:
            trainer.load_pretrained_weights(weights)
            weights = None
    maybe_load_checkpoint(trainer, goes_on, request.only_validation, weights)


def _set_aside(trainer: Any, ranks: Ranks) -> None:
    """Rename checkpoints of an earlier training in this fold, which a restart would go on from otherwise."""
    if ranks.size > 1:
        dist.barrier()  # all have read their weights, which may be among them
    if ranks.rank == 0:
        set_aside(Path(trainer.output_folder))
    if ranks.size > 1:
        dist.barrier()


def _set_batch_size(trainer: Any, request: TrainRequest) -> None:
    if request.global_batch is None or request.global_batch < 1:
        raise SettingsError(
            "a batch without samples", got=request.global_batch, expected="1 at least", remedy="Correct --global-batch."
        )
    # In both, as the second is what is written beside the checkpoints.
    trainer.configuration_manager.configuration["batch_size"] = request.global_batch
    trainer.plans_manager.plans["configurations"][request.configuration]["batch_size"] = request.global_batch


def _content(request: TrainRequest) -> dict[str, Any]:
    """What must be the same for every process."""
    name = find_dataset(request.dataset)
    folder = nnunet_folder("nnUNet_preprocessed") / name
    plans = load_plans(find_plans(name, request.plans))
    cases = folder / str(resolve_configuration(plans, request.configuration)["data_identifier"])
    files = {
        file: path.read_text(encoding="utf-8") if (path := folder / file).is_file() else None
        for file in ("dataset.json", "splits_final.json", "annotated_labels.json")
    }
    listed = sorted((p.name, p.stat().st_size) for p in cases.glob("*")) if cases.is_dir() else []
    return {
        f"plans {request.plans}": plans,
        **files,
        "preprocessed cases": listed,
        "arguments": [
            request.configuration, request.fold, request.trainer, request.device, request.global_batch, request.seed,
        ],
        "versions": {package: version(package) for package in ("stunet", "nnunetv2", "torch")},
    }  # fmt: skip
