"""A training from its arguments: in one process, or in each of those that ``torchrun`` has started."""

from __future__ import annotations

import os
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import distributed as dist
from torch.backends import cudnn

from stunet.environment import find_dataset, find_plans, nnunet_folder
from stunet.errors import UsageError
from stunet.planning import load_plans, resolve_configuration
from stunet.training.checkpoints import set_aside
from stunet.training.distributed import (
    Ranks,
    check_agreement,
    check_shared_folder,
    process_group,
    seed_everything,
    share_of_batch,
)
from stunet.training.trainer import BaseSTUNetTrainer
from stunet.weights.sharded import SHARDED_SUFFIX

#: Stands for an epoch before the first, when the network is initialised.
_BEFORE_TRAINING = 2**31


def train(
    dataset: str,
    configuration: str,
    fold: str,
    *,
    trainer: str = "STUNetTrainer",
    plans: str = "nnUNetPlans",
    device: str = "cuda",
    pretrained_weights: str | None = None,
    continue_training: bool = False,
    only_validation: bool = False,
    validate_best: bool = False,
    save_probabilities: bool = False,
    disable_checkpointing: bool = False,
    global_batch: int | None = None,
    seed: int | None = None,
    timeout: float = 1800.0,
) -> None:
    """Train and validate, together with the other processes where there are any.

    After a restart by ``torchrun`` the training resumes from its last checkpoint without being told. The arguments are
    those of ``nnUNetv2_train``, and ``global_batch``, the samples of all processes together (the plans' batch size
    where it is None), ``seed`` (see :class:`BaseSTUNetTrainer`) and ``timeout``, the seconds that the processes wait
    for each other.

    Raises:
        UsageError: The processes are not all there, or would not train the same thing.
    """
    ranks = Ranks.from_environment()
    with ExitStack() as stack:
        if ranks.rank > 0:  # nnU-Net prints in every process what is the same in all
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        if ranks.size > 1:
            stack.enter_context(process_group(ranks, device, timeout))
        _use_device(ranks, device)
        if ranks.size > 1:
            arguments = [configuration, fold, trainer, device, global_batch, seed]
            check_agreement({**_content(dataset, configuration, plans), "arguments": arguments})
        if seed is not None:
            seed_everything(seed, ranks.rank, _BEFORE_TRAINING)
            if device == "cpu":  # batches of other processes are not drawn from the seed
                os.environ.setdefault("nnUNet_n_proc_DA", "0")
        resumes = continue_training or (ranks.n_restarts > 0 and not only_validation)
        fold_number = fold if fold == "all" else int(fold)
        made: Any = get_trainer_from_args(
            dataset, configuration, fold_number, trainer, plans, resumes, torch.device(device)
        )
        if not isinstance(made, BaseSTUNetTrainer) and (ranks.size > 1 or seed is not None):
            raise UsageError(f"-tr {trainer} knows neither --seed nor several processes: choose -tr STUNetTrainer")
        made.disable_checkpointing = disable_checkpointing
        if seed is not None:
            made.seed = seed
        if global_batch is not None:
            # In both, as the second is what is written beside the checkpoints.
            made.configuration_manager.configuration["batch_size"] = global_batch
            made.plans_manager.plans["configurations"][configuration]["batch_size"] = global_batch
        share_of_batch(int(made.configuration_manager.batch_size), ranks)  # before anything is written
        if ranks.size > 1:
            check_shared_folder(Path(made.output_folder), ranks)
        _load_weights(made, pretrained_weights, resumes=resumes, only_validation=only_validation)
        if not resumes and not only_validation:
            barrier = dist.barrier if ranks.size > 1 else lambda: None
            barrier()  # all have read their weights, which may be among what is renamed
            if ranks.rank == 0:
                set_aside(Path(made.output_folder))
            barrier()
        if not only_validation:
            made.run_training()
        if validate_best:
            made.load_checkpoint(str(Path(made.output_folder, "checkpoint_best.pth")))
        made.perform_actual_validation(save_probabilities)


def check_processes(
    number: int, dataset: str, configuration: str, *, plans: str, device: str, global_batch: int | None
) -> None:
    """Find what so many processes of this machine would refuse, before they are started, and started once more."""
    planned = resolve_configuration(load_plans(find_plans(find_dataset(dataset), plans)), configuration)
    if device == "cuda":
        _check_devices(number - 1)
    batch_size = planned["batch_size"] if global_batch is None else global_batch
    share_of_batch(int(batch_size), Ranks(0, number, 0, number))


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
        found = torch.cuda.device_count()
        raise UsageError(f"{found} CUDA devices for local rank {local_rank}: start fewer, or take -device cpu")


def _load_weights(trainer: Any, pretrained: str | None, *, resumes: bool, only_validation: bool) -> None:
    # A restart before the first checkpoint begins once more.
    written = Path(trainer.output_folder).glob("checkpoint_*")
    resumes = resumes and any(path.suffix in (".pth", SHARDED_SUFFIX) for path in written)
    weights = None if resumes else pretrained
    if isinstance(trainer, BaseSTUNetTrainer):
        # What nnU-Net does not look for is loaded when the training starts.
        resumes = resumes and not trainer.checkpoints.has_only_sharded()
        if weights is not None and not only_validation:
            trainer.load_pretrained_weights(weights)
            weights = None
    maybe_load_checkpoint(trainer, resumes, only_validation, weights)


def _content(dataset: str, configuration: str, plans_name: str) -> dict[str, Any]:
    """Read what must be the same for every process."""
    name = find_dataset(dataset)
    folder = nnunet_folder("nnUNet_preprocessed") / name
    plans = load_plans(find_plans(name, plans_name))
    cases = folder / str(resolve_configuration(plans, configuration)["data_identifier"])
    files = {
        file: path.read_text(encoding="utf-8") if (path := folder / file).is_file() else None
        for file in ("dataset.json", "splits_final.json", "annotated_labels.json")
    }
    listed = sorted((p.name, p.stat().st_size) for p in cases.glob("*")) if cases.is_dir() else []
    versions = {package: version(package) for package in ("stunet", "nnunetv2", "torch")}
    return {f"plans {plans_name}": plans, **files, "preprocessed cases": listed, "versions": versions}
