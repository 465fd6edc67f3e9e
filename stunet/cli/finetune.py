"""``stunet finetune``: plans, data and training from pre-trained weights, in one command."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stunet.cli.convert import find_fetched
from stunet.cli.options import Continue, Device, FoldName, Settings, StrategyOption, choose_device, complete_weights
from stunet.environment import find_dataset, nnunet_folder
from stunet.settings import parse_settings

if TYPE_CHECKING:
    from stunet.cli.plan_steps import MadePlans

__all__ = ["finetune"]

_TRAINER = "STUNetTrainer"


def finetune(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            help="Checkpoint, model folder, .model file or fetched name to start from.",
            autocompletion=complete_weights,
        ),
    ],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="A 3D configuration.")] = "3d_fullres",
    fold: Annotated[FoldName, typer.Option("-f", "--fold", help="Fold of the cross-validation, or all cases.")] = "0",
    strategy: StrategyOption = None,
    plans: Annotated[str, typer.Option("--plans", "-p", help="The plans to start from.")] = "nnUNetPlans",
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the new plans; STUNetPlans_SIZE_ft by default.")] = None,
    device: Device = "auto",
    num_gpus: Annotated[int, typer.Option("-num_gpus", "--num-gpus", help="GPUs of this machine.", min=1)] = 1,
    continue_training: Continue = False,
    npz: Annotated[bool, typer.Option("--npz", help="Keep the probabilities of the final validation.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of all random numbers; trains with `stunet train --seed`.", min=0)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace plans that differ, and an earlier training.")
    ] = False,
    trust: Annotated[
        list[str] | None, typer.Option("--trust", help="A network class of others' that may be imported. Repeatable.")
    ] = None,
    num_processes: Annotated[int, typer.Option("-np", help="Processes for planning and preprocessing.", min=1)] = 8,
) -> None:
    """Train a STU-Net on a dataset, starting from weights of another one.

    Writes the plans, preprocesses what is not preprocessed yet and runs nnUNetv2_train: each step is a command that can
    be typed by itself, and is shown.
    """
    # What needs no PyTorch is checked before it is imported.
    parse_settings(settings or [])
    results = nnunet_folder("nnUNet_results")
    find_dataset(dataset)
    find_fetched([source])
    from stunet.cli.preflight import preflight

    preflight(dataset, plans=plans, device=device, n_devices=num_gpus, writes=results)
    chosen_device = choose_device(device)
    from stunet.cli.plan_steps import PlanRequest, make_plans_file, print_transfer
    from stunet.files import locked
    from stunet.planning import resolve_configuration
    from stunet.processes import end_with_children

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
            trust=trust or [],
        )
    )
    assert made.transfer is not None
    print_transfer(made.transfer)
    resolve_configuration(made.plans, configuration)
    model = results / made.dataset_name / f"{_TRAINER}__{made.path.stem}__{configuration}"
    command = ["nnUNetv2_train"] if seed is None else ["stunet", "train", "--seed", str(seed)]
    command += [str(int(made.dataset_name[7:10])), configuration, fold, "-tr", _TRAINER, "-p", made.path.stem]
    command += ["-device", chosen_device]
    command += ["-num_gpus", str(num_gpus)] if num_gpus > 1 else []
    command += ["--c"] if continue_training else []
    command += ["--npz"] if npz else []
    end_with_children()
    with locked(model / f".fold_{fold}.lock", "training of the same fold"):
        _check_fold(model / f"fold_{fold}", continue_training=continue_training, overwrite=overwrite)
        _preprocess(made, configuration, num_processes)
        preflight(
            dataset, plans=made.path.stem, configuration=configuration, trainer=_TRAINER, writes=results, seconds=-1
        )
        _train(command)


def _check_fold(fold: Path, *, continue_training: bool, overwrite: bool) -> None:
    from stunet.errors import UsageError

    checkpoints = sorted(path.name for path in fold.glob("checkpoint_*"))
    if continue_training and not checkpoints:
        raise UsageError("nothing to continue", got=f"no checkpoint in {fold}",
                         expected="a training that was interrupted",
                         remedy="Leave --c out to start one, or correct --name, -c and -f.")  # fmt: skip
    if checkpoints and not continue_training and not overwrite:
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

    # Before nnU-Net is asked for the trainer; its own parser then reads the command as it was shown.
    os.environ["nnUNet_extTrainer"] = str(trainers_folder())
    _show(shlex.join(command))
    sys.argv = command
    if command[0] == "stunet":
        from stunet.cli.main import app

        app(command[1:])
    from nnunetv2.run.run_training import run_training_entry

    run_training_entry()


def _show(line: str) -> None:
    from stunet.cli.console import stdout

    stdout.print(f"\n$ {line}", style="bold", highlight=False, soft_wrap=True)
