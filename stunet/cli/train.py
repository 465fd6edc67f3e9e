"""``stunet train``: nnU-Net's training on any number of machines."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["train"]


def train(
    dataset: Annotated[str, typer.Argument(help="Dataset id or name.")],
    configuration: Annotated[str, typer.Argument(help="For example 3d_fullres.")],
    fold: Annotated[str, typer.Argument(help="0 to 4, or all.")],
    trainer: Annotated[str, typer.Option("-tr", help="Trainer.")] = "STUNetTrainer",
    plans: Annotated[str, typer.Option("-p", help="Plans.")] = "nnUNetPlans",
    pretrained_weights: Annotated[
        Path | None, typer.Option("-pretrained_weights", help="Checkpoint of the same network to start from.")
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("-num_gpus", help="Processes to start on this machine; see below for several.", min=1)
    ] = 1,
    npz: Annotated[bool, typer.Option("--npz", help="Keep the probabilities of the final validation.")] = False,
    continue_training: Annotated[bool, typer.Option("--c", help="Continue from the last checkpoint.")] = False,
    only_validation: Annotated[bool, typer.Option("--val", help="Validate, and do not train.")] = False,
    validate_best: Annotated[bool, typer.Option("--val_best", help="Validate with checkpoint_best.pth.")] = False,
    disable_checkpointing: Annotated[bool, typer.Option("--disable_checkpointing", help="Write none.")] = False,
    device: Annotated[str, typer.Option("-device", "--device", help="cuda, cpu or mps.")] = "cuda",
    global_batch: Annotated[
        int | None, typer.Option(help="Samples of all processes together, in place of the plans' batch size.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all random numbers; exact with nnUNet_n_proc_DA=0 on the CPU.", min=0)
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
    from stunet.cli.devices import choose_device
    from stunet.cli.env import trainers_folder

    _check(fold, pretrained_weights, continue_training=continue_training, only_validation=only_validation)
    choose_device(device)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))  # before nnU-Net is asked for the trainer
    from stunet.processes import end_with_children
    from stunet.training import TrainRequest, check_request
    from stunet.training import train as run

    request = TrainRequest(
        dataset=dataset,
        configuration=configuration,
        fold=fold,
        trainer=trainer,
        plans=plans,
        device=device,
        pretrained_weights=None if pretrained_weights is None else str(pretrained_weights),
        continue_training=continue_training,
        only_validation=only_validation,
        validate_best=validate_best,
        save_probabilities=npz,
        disable_checkpointing=disable_checkpointing,
        global_batch=global_batch,
        seed=seed,
        timeout=timeout,
    )
    if num_gpus > 1 and "RANK" not in os.environ:
        check_request(request, num_gpus)
        _start_processes(num_gpus)
    end_with_children()
    run(request)


def _check(fold: str, pretrained_weights: Path | None, *, continue_training: bool, only_validation: bool) -> None:
    from stunet.errors import UsageError

    if fold not in (*"01234", "all"):
        raise UsageError("impossible fold", got=fold, expected="0 to 4, or all", remedy="Correct the third argument.")
    if continue_training and pretrained_weights:
        raise UsageError(
            "two things to start from", got="--c and -pretrained_weights", expected="one of them",
            remedy="Leave one of them out.",
        )  # fmt: skip
    if continue_training and only_validation:
        raise UsageError(
            "two things to do", got="--c and --val", expected="one of them", remedy="Leave one of them out."
        )


def _start_processes(number: int) -> None:
    """Become torchrun, which runs this command so many times; there it has a rank, and starts no others."""
    from stunet.cli.console import stdout

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    command += ["--nproc-per-node", str(number), "-m", "stunet", *sys.argv[1:]]
    stdout.print(f"$ torchrun {shlex.join(command[3:])}", style="bold", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - this very command, no shell
