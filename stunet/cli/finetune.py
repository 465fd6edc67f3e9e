"""``stunet finetune``: plans, data and training from pre-trained weights, in one command."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stunet.cli.plan_steps import MadePlans

__all__ = ["finetune"]

_TRAINER = "STUNetTrainer"


def finetune(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    source: Annotated[
        Path, typer.Option("--from", help="Checkpoint, model folder, .model file or fetched name to start from.")
    ],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="A 3D configuration.")] = "3d_fullres",
    fold: Annotated[str, typer.Option("-f", "--fold", help="0 to 4, or all.")] = "0",
    strategy: Annotated[
        str | None, typer.Option(help="full (default), warmup, layerwise, frozen-encoder or head-only.")
    ] = None,
    plans: Annotated[str, typer.Option("--plans", "-p", help="The plans to start from.")] = "nnUNetPlans",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings, name=value. Takes several. See `stunet plan`.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new plans; STUNetPlans_SIZE_ft by default.")] = None,
    device: Annotated[str, typer.Option("-device", "--device", help="cuda, cpu or mps.")] = "cuda",
    num_gpus: Annotated[int, typer.Option("-num_gpus", "--num-gpus", help="GPUs of this machine.", min=1)] = 1,
    continue_training: Annotated[bool, typer.Option("--c", help="Continue a training that was interrupted.")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Keep the probabilities of the final validation.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace plans that differ, and an earlier training."),
    ] = False,
    num_processes: Annotated[int, typer.Option("-np", help="Processes for planning and preprocessing.", min=1)] = 8,
) -> None:
    """Train a STU-Net on a dataset, starting from weights of another one.

    Writes the plans, preprocesses what is not preprocessed yet and runs nnUNetv2_train: each step is a command that can
    be typed by itself, and is shown.
    """
    from stunet.cli.plan_steps import PlanRequest, make_plans_file, print_transfer
    from stunet.files import locked
    from stunet.planning import nnunet_folder, resolve_configuration

    _check_options(device, fold, num_gpus)
    results = nnunet_folder("nnUNet_results")
    made = make_plans_file(
        PlanRequest(
            dataset=dataset,
            configurations=[configuration],
            plans=plans,
            settings=settings or [],
            source=source,
            strategy=strategy,
            name=name,
            overwrite=overwrite,
            num_processes=num_processes,
        )
    )
    assert made.transfer is not None
    print_transfer(made.transfer)
    resolve_configuration(made.plans, configuration)
    model = results / made.dataset_name / f"{_TRAINER}__{made.path.stem}__{configuration}"
    command = ["nnUNetv2_train", str(int(made.dataset_name[7:10])), configuration, fold, "-tr", _TRAINER]
    command += ["-p", made.path.stem, "-device", device]
    command += ["-num_gpus", str(num_gpus)] if num_gpus > 1 else []
    command += ["--c"] if continue_training else []
    command += ["--npz"] if npz else []
    with locked(model / f".fold_{fold}.lock", "training of the same fold"):
        if not continue_training and not overwrite:
            _refuse_earlier_training(model / f"fold_{fold}")
        _preprocess(made, configuration, num_processes)
        _train(command)


def _check_options(device: str, fold: str, num_gpus: int) -> None:
    from stunet.errors import UsageError

    for option, value, allowed in (("-device", device, ("cuda", "cpu", "mps")), ("-f", fold, (*"01234", "all"))):
        if value not in allowed:
            raise UsageError(
                f"impossible value of {option}", got=value, expected=" or ".join(allowed), remedy=f"Correct {option}."
            )
    if num_gpus > 1 and device != "cuda":
        raise UsageError(
            "several GPUs without CUDA",
            got=f"-num_gpus {num_gpus} -device {device}",
            expected="-device cuda",
            remedy="Leave -num_gpus out, or train with CUDA.",
        )
    if device == "cuda":
        import torch

        if torch.cuda.device_count() < num_gpus:
            raise UsageError(
                "fewer GPUs than asked for",
                got=f"{torch.cuda.device_count()} CUDA devices",
                expected=f"{num_gpus}",
                remedy="Choose the CPU with -device cpu, or install the driver.",
            )


def _refuse_earlier_training(fold: Path) -> None:
    from stunet.errors import UsageError

    checkpoints = sorted(path.name for path in fold.glob("checkpoint_*.pth"))
    if checkpoints:
        raise UsageError(
            "an earlier training that would be overwritten",
            got=f"{fold} with {', '.join(checkpoints)}",
            expected="a fold that was not trained yet",
            remedy="Continue it with --c, keep it by giving this one a --name, or replace it with --overwrite.",
        )


def _preprocess(made: MadePlans, configuration: str, num_processes: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    from stunet.planning import missing_preprocessed_cases

    missing = missing_preprocessed_cases(made.dataset_name, made.plans, configuration)
    if not missing:
        return
    dataset_id = int(made.dataset_name[7:10])
    plans_name = made.path.stem
    _show(f"nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c {configuration} -np {num_processes}")
    preprocess([dataset_id], plans_name, [configuration], [num_processes])


def _train(command: list[str]) -> None:
    from stunet.cli.env import trainers_folder
    from stunet.processes import end_with_children

    end_with_children()
    # Before nnU-Net is asked for the trainer; its own parser then reads the command as it was shown.
    os.environ["nnUNet_extTrainer"] = str(trainers_folder())
    _show(shlex.join(command))
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = command
    run_training_entry()


def _show(line: str) -> None:
    from stunet.cli.console import stdout

    stdout.print(f"\n$ {line}", style="bold", highlight=False, soft_wrap=True)
