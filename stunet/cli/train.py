"""``stunet train``: nnU-Net's training on any number of machines."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from stunet.cli.options import Continue, Device, FoldName, choose_device

#: Stands for an epoch before the first, when the network is initialised.
_BEFORE_TRAINING = 2**31


def train(
    dataset: Annotated[str, typer.Argument(help="Dataset id or name.")],
    configuration: Annotated[str, typer.Argument(help="For example 3d_fullres.")],
    fold: Annotated[FoldName, typer.Argument(help="Fold of the cross-validation, or all cases.")],
    trainer: Annotated[str, typer.Option("-tr", help="Trainer.")] = "STUNetTrainer",
    plans: Annotated[str, typer.Option("-p", help="Plans.")] = "nnUNetPlans",
    pretrained_weights: Annotated[
        Path | None, typer.Option("-pretrained_weights", help="Checkpoint of the same network to start from.")
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("-num_gpus", help="Processes to start on this machine; see below for several.", min=1)
    ] = 1,
    npz: Annotated[bool, typer.Option("--npz", help="Keep the probabilities of the final validation.")] = False,
    continue_training: Continue = False,
    only_validation: Annotated[bool, typer.Option("--val", help="Validate, and do not train.")] = False,
    validate_best: Annotated[bool, typer.Option("--val_best", help="Validate with checkpoint_best.pth.")] = False,
    disable_checkpointing: Annotated[bool, typer.Option("--disable_checkpointing", help="Write none.")] = False,
    device: Device = "auto",
    global_batch: Annotated[
        int | None, typer.Option(help="Samples of all processes together, in place of the plans' batch size.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all random numbers; on the CPU two trainings with one seed are equal.", min=0)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that processes wait for each other.", min=1)] = 1800.0,
) -> None:
    """Train as nnUNetv2_train does, in one process or in all those of torchrun.

    The arguments are nnUNetv2_train's. On several machines, on each of them:

    torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29500
    --no-python stunet train 4 3d_fullres 0

    The batch is divided among the processes. When one is lost, torchrun starts all of them again, and the training goes
    on from its last checkpoint.
    """
    from stunet.cli.env import trainers_folder
    from stunet.cli.preflight import preflight
    from stunet.environment import find_dataset, find_plans, nnunet_folder
    from stunet.errors import UsageError

    if continue_training and pretrained_weights:
        raise UsageError("--c and -pretrained_weights are both given, but a training starts from one: leave one out")
    if continue_training and only_validation:
        raise UsageError("--c and --val are both given, but only one can be done: leave one out")
    preflight(dataset, plans=plans, configuration=configuration, trainer=trainer, device=device, n_devices=num_gpus,
              writes=nnunet_folder("nnUNet_results"))  # fmt: skip
    device = choose_device(device)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))  # before nnU-Net is asked for the trainer
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from stunet.planning import load_plans, resolve_configuration
    from stunet.processes import end_with_children
    from stunet.training import BaseSTUNetTrainer
    from stunet.training.checkpoints import set_aside
    from stunet.training.distributed import (
        Ranks,
        check_same,
        check_shared_folder,
        join_others,
        seed_everything,
        share_of_batch,
    )
    from stunet.weights.sharded import SHARDED_SUFFIX

    if num_gpus > 1 and "RANK" not in os.environ:
        # What they would refuse, before they are started, and started once more.
        planned = resolve_configuration(load_plans(find_plans(find_dataset(dataset), plans)), configuration)
        share_of_batch(int(planned["batch_size"] if global_batch is None else global_batch), Ranks(0, num_gpus))
        _start_processes(num_gpus)
    end_with_children()
    with join_others(device, timeout) as ranks:
        check_same(ranks, dataset, configuration, plans, [fold, trainer, device, global_batch, seed])
        if seed is not None:
            seed_everything(seed, ranks.rank, _BEFORE_TRAINING)
            if device == "cpu":  # batches of other processes are not drawn from the seed
                os.environ.setdefault("nnUNet_n_proc_DA", "0")
        # After a restart by torchrun without being told.
        resumes = continue_training or (ranks.n_restarts > 0 and not only_validation)
        number = fold if fold == "all" else int(fold)
        made = get_trainer_from_args(dataset, configuration, number, trainer, plans, resumes, torch.device(device))
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
        folder = Path(made.output_folder)
        if ranks.size > 1:
            check_shared_folder(folder, ranks)
        # A restart before the first checkpoint begins once more.
        resumes = resumes and any(path.suffix in (".pth", SHARDED_SUFFIX) for path in folder.glob("checkpoint_*"))
        weights, nnunet_finds = None if resumes or pretrained_weights is None else str(pretrained_weights), resumes
        if isinstance(made, BaseSTUNetTrainer):
            nnunet_finds = resumes and not made.checkpoints.has_only_sharded()  # others, once the training starts
            if weights is not None and not only_validation:
                made.load_pretrained_weights(weights)
                weights = None
        maybe_load_checkpoint(made, nnunet_finds, only_validation, weights)
        if not only_validation:
            if not resumes:
                set_aside(folder, ranks)
            made.run_training()
        if validate_best:
            made.load_checkpoint(str(folder / "checkpoint_best.pth"))
        made.perform_actual_validation(npz)


def _start_processes(number: int) -> None:
    """Become torchrun, which runs this command so many times; there it has a rank, and starts no others."""
    from stunet.cli.console import stdout

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    command += ["--nproc-per-node", str(number), "-m", "stunet", *sys.argv[1:]]
    stdout.print(f"$ torchrun {shlex.join(command[3:])}", style="bold", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - this very command, no shell
