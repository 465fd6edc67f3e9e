"""``stunet train``: nnU-Net's training on any number of machines."""

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from stunet.cli.console import print_line
from stunet.cli.env import trainers_folder
from stunet.cli.options import FOLD, Continue, Device, check_training, choose_device, preflight
from stunet.environment import did_you_mean, find_dataset, find_plans
from stunet.errors import UsageError
from stunet.sizes import TRAINERS

#: Stands for an epoch before the first, when the network is initialised.
_BEFORE_TRAINING = 2**31
_WEIGHTS_HELP = "Checkpoint of the same network to start from."
_SEED_HELP = "Of all random numbers; on the CPU two trainings with one seed are equal."


def train(
    dataset: Annotated[str, Argument(help="Dataset id or name.")],
    configuration: Annotated[str, Argument(help="For example 3d_fullres.")],
    fold: Annotated[str, Argument(help="Fold of the cross-validation, or all cases.", **FOLD)],
    trainer: Annotated[str, Option("-tr", help="Trainer.")] = "STUNetTrainer",
    plans: Annotated[str, Option("-p", help="Plans.")] = "nnUNetPlans",
    pretrained_weights: Annotated[Path | None, Option("-pretrained_weights", help=_WEIGHTS_HELP)] = None,
    num_gpus: Annotated[int, Option("-num_gpus", help="Processes on this machine; for several see below.", min=1)] = 1,
    npz: Annotated[bool, Option(help="Keep the probabilities of the final validation.")] = False,
    continue_training: Continue = False,
    only_validation: Annotated[bool, Option("--val", help="Validate, and do not train.")] = False,
    validate_best: Annotated[bool, Option("--val_best", help="Validate with checkpoint_best.pth.")] = False,
    disable_checkpointing: Annotated[bool, Option("--disable_checkpointing", help="Write none.")] = False,
    device: Device = "auto",
    global_batch: Annotated[int | None, Option(help="Batch of all processes; that of the plans by default.")] = None,
    seed: Annotated[int | None, Option(help=_SEED_HELP, min=0)] = None,
    timeout: Annotated[float, Option(help="Seconds that processes wait for each other.", min=1)] = 1800.0,
) -> None:
    """Train as nnUNetv2_train does, in one process or in all those of torchrun.

    The arguments are nnUNetv2_train's. On several machines, on each of them:

    torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29500
    --no-python stunet train 4 3d_fullres 0

    The batch is divided among the processes. When one is lost, torchrun starts all of them again, and the training goes
    on from its last checkpoint.
    """
    if continue_training and (pretrained_weights or only_validation):
        other = "-pretrained_weights" if pretrained_weights else "--val"
        raise UsageError(f"--c and {other} are both given, but only one can be done: leave one out")
    _check_trainer(trainer)
    preflight(dataset, plans, configuration)
    check_training(dataset, plans, configuration, trainer)
    device = choose_device(device, num_gpus)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))  # before nnU-Net is asked for the trainer
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from stunet.planning.plans import load_plans, resolve_configuration
    from stunet.processes import end_with_children
    from stunet.training import BaseSTUNetTrainer, distributed
    from stunet.training.checkpoints import set_aside
    from stunet.weights.sharded import SHARDED_SUFFIX

    if num_gpus > 1 and "RANK" not in os.environ:
        # What they would refuse, before they are started, and started once more.
        planned = resolve_configuration(load_plans(find_plans(find_dataset(dataset), plans)), configuration)
        batch = int(planned["batch_size"] if global_batch is None else global_batch)
        distributed.share_of_batch(batch, distributed.Ranks(0, num_gpus))
        _start_processes(num_gpus)
    end_with_children()
    with distributed.join_others(device, timeout) as ranks:
        distributed.check_same(ranks, dataset, configuration, plans, [fold, trainer, device, global_batch, seed])
        if seed is not None:
            distributed.seed_everything(seed, ranks.rank, _BEFORE_TRAINING)
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
        distributed.share_of_batch(int(made.configuration_manager.batch_size), ranks)  # before anything is written
        folder = Path(made.output_folder)
        if ranks.size > 1:
            distributed.check_shared_folder(folder, ranks)
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


def _check_trainer(name: str) -> None:
    """Look for the name in the files that nnU-Net would import one after the other, which takes seconds."""
    external = (os.environ.get("nnUNet_extTrainer") or str(trainers_folder())).split(os.pathsep)
    spec = importlib.util.find_spec("nnunetv2")
    stock = [f"{place}/training/nnUNetTrainer" for place in (spec and spec.submodule_search_locations) or []]
    folders = [*stock, *filter(None, external)]
    sources = [file.read_text("utf-8", errors="ignore") for folder in folders for file in Path(folder).rglob("*.py")]
    known = {word for source in sources for word in re.findall(r"\w+", source)}
    known |= {*TRAINERS} if str(trainers_folder()) in external else set()
    if name not in known:
        places, hint = ", ".join(external), did_you_mean(name, sorted(word for word in known if "Trainer" in word))
        raise UsageError(f"unknown trainer {name}: -tr names one of nnU-Net's or of {places}. {hint}")


def _start_processes(number: int) -> None:
    """Become torchrun, which runs this command so many times; there it has a rank, and starts no others."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    command += ["--nproc-per-node", str(number), "-m", "stunet", *sys.argv[1:]]
    print_line(f"$ torchrun {shlex.join(command[3:])}", style="bold")
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - this very command, no shell
