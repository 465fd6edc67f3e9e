"""The steps of ``stunet train``, in one process or in each of those that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch.backends import cudnn

from stunet.environment import find_dataset, find_plans, nnunet_folder
from stunet.errors import UsageError
from stunet.planning import load_plans, resolve_configuration
from stunet.training.distributed import Ranks, check_agreement, check_shared_folder, process_group
from stunet.training.trainer import BaseSTUNetTrainer
from stunet.weights.sharded import SHARDED_SUFFIX


@contextmanager
def join_others(device: str, timeout: float) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, where there are any; they wait ``timeout`` seconds for all."""
    ranks = Ranks.from_environment()
    with ExitStack() as stack:
        if ranks.rank > 0:  # nnU-Net prints in every process what is the same in all
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        if ranks.size > 1:
            stack.enter_context(process_group(ranks, device, timeout))
        _use_device(ranks, device)
        yield ranks


def _use_device(ranks: Ranks, device: str) -> None:
    if device != "cuda":
        # torchrun sets OMP_NUM_THREADS to 1 by itself; of one process it is what the user wants.
        if ranks.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // ranks.local_size))
        return
    if (found := torch.cuda.device_count()) <= ranks.local_rank:
        raise UsageError(f"{found} CUDA devices for local rank {ranks.local_rank}: start fewer, or take -device cpu")
    torch.cuda.set_device(ranks.local_rank)
    torch.set_num_threads(1)  # as nnU-Net does: more do not help a GPU
    cudnn.deterministic, cudnn.benchmark = False, True


def load_weights(trainer: Any, ranks: Ranks, pretrained: Path | None, *, resumes: bool, only_validation: bool) -> None:
    """Load the checkpoint to resume from or to validate, or else the weights to start from."""
    folder = Path(trainer.output_folder)
    if ranks.size > 1:
        check_shared_folder(folder, ranks)
    # A restart before the first checkpoint begins once more.
    resumes = resumes and any(path.suffix in (".pth", SHARDED_SUFFIX) for path in folder.glob("checkpoint_*"))
    weights = None if resumes or pretrained is None else str(pretrained)
    if isinstance(trainer, BaseSTUNetTrainer):
        # What nnU-Net does not look for is loaded when the training starts.
        resumes = resumes and not trainer.checkpoints.has_only_sharded()
        if weights is not None and not only_validation:
            trainer.load_pretrained_weights(weights)
            weights = None
    maybe_load_checkpoint(trainer, resumes, only_validation, weights)


def check_same(ranks: Ranks, dataset: str, configuration: str, plans_name: str, arguments: list[Any]) -> None:
    """Check that all processes would train the same thing: arguments, plans, data and versions.

    Raises:
        UsageError: They would not.
    """
    if ranks.size == 1:
        return
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
    content = {f"plans {plans_name}": plans, **files, "preprocessed cases": listed, "versions": versions}
    check_agreement({**content, "arguments": [configuration, *arguments]})
