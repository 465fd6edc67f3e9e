"""``stunet finetune``: plans, data and training from pre-trained weights, in one command."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from stunet.cli import options
from stunet.cli.console import print_line
from stunet.cli.env import trainers_folder
from stunet.cli.plan import plan
from stunet.environment import find_dataset, nnunet_folder
from stunet.errors import UsageError
from stunet.files import locked
from stunet.processes import end_with_children
from stunet.settings import parse_settings

_TRAINER = "STUNetTrainer"


def finetune(
    context: Context,
    dataset: options.Dataset,
    source: Annotated[Path, Option("--from", autocompletion=options.complete_weights)],
    configuration: Annotated[str, Option("-c", "--configuration")] = "3d_fullres",
    fold: Annotated[str, Option("-f", "--fold", **options.FOLD)] = "0",
    strategy: options.StrategyOption = None,
    plans: options.Plans = "nnUNetPlans",
    settings: options.Settings = None,
    name: str | None = None,
    device: options.Device = "auto",
    num_gpus: Annotated[int, Option("-num_gpus", "--num-gpus", min=1)] = 1,
    continue_training: options.Continue = False,
    npz: bool = False,
    seed: options.Seed = None,
    overwrite: bool = False,
    trust: options.Trust = None,
    num_processes: options.Processes = 8,
) -> None:
    """Train a STU-Net on a dataset, starting from weights of another one.

    Writes the plans, preprocesses what is not preprocessed yet and runs nnUNetv2_train: each step is a command that can
    be typed by itself, and is shown.

    Options:
        source: Checkpoint, model folder, .model file or fetched name to start from.
        configuration: A 3D configuration.
        fold: Fold of the cross-validation, or all cases.
        name: Name of the new plans; STUNetPlans_SIZE_ft by default.
        num_gpus: GPUs of this machine.
        npz: Keep the probabilities of the final validation.
        seed: Of all random numbers; trains with `stunet train --seed`.
        overwrite: Replace plans that differ, and an earlier training.
        num_processes: Processes for planning and preprocessing.
    """
    parse_settings(settings or [])  # before PyTorch is imported
    dataset_name, results = find_dataset(dataset), nnunet_folder("nnUNet_results")
    options.check_disk(results)
    device = options.choose_device(device, num_gpus)
    path = plan(
        context,
        dataset,
        configurations=[configuration],
        plans=plans,
        settings=settings,
        source=source,
        strategy=strategy,
        name=name,
        overwrite=overwrite,
        trust=trust,
        num_processes=num_processes,
    )
    plans_name, dataset_id = path.stem, str(int(dataset_name[7:10]))
    model = results / dataset_name / f"{_TRAINER}__{plans_name}__{configuration}"
    command = ["nnUNetv2_train"] if seed is None else ["stunet", "train", "--seed", str(seed)]
    command += [dataset_id, configuration, fold, "-tr", _TRAINER, "-p", plans_name, "-device", device]
    command += ["-num_gpus", str(num_gpus)] if num_gpus > 1 else []
    command += ["--c"] * continue_training + ["--npz"] * npz
    end_with_children()
    with locked(model / f".fold_{fold}.lock", "training of the same fold"):
        _check_fold(model / f"fold_{fold}", continue_training=continue_training, overwrite=overwrite)
        _preprocess(path, configuration, num_processes)
        options.check_training(dataset, plans_name, configuration, _TRAINER)
        # Before nnU-Net is asked for the trainer; its own parser then reads the command as it was shown.
        os.environ["nnUNet_extTrainer"] = str(trainers_folder())
        print_line(f"\n$ {shlex.join(command)}", style="bold")
        sys.argv = command
        if seed is None:
            from nnunetv2.run.run_training import run_training_entry as run
        else:
            from stunet.cli.main import main as run
        run()


def _check_fold(fold: Path, *, continue_training: bool, overwrite: bool) -> None:
    checkpoints = sorted(path.name for path in fold.glob("checkpoint_*"))
    if continue_training and not checkpoints:
        raise UsageError(f"nothing to continue: no checkpoint in {fold}. Leave --c out, or correct --name, -c and -f.")
    if checkpoints and not continue_training and not overwrite:
        remedy = "continue it with --c, keep it by giving this one a --name, or replace it with --overwrite"
        raise UsageError(f"{fold} has an earlier training, {', '.join(checkpoints)}: {remedy}")


def _preprocess(plans: Path, configuration: str, num_processes: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    from stunet.planning.plans import load_plans, missing_preprocessed_cases

    dataset_id = int(plans.parent.name[7:10])
    if missing_preprocessed_cases(plans.parent.name, load_plans(plans), configuration):
        options = f"-plans_name {plans.stem} -c {configuration} -np {num_processes}"
        print_line(f"\n$ nnUNetv2_preprocess -d {dataset_id} {options}", style="bold")
        preprocess([dataset_id], plans.stem, [configuration], [num_processes])
