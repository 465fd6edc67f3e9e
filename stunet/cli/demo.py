"""``stunet demo``: from partially annotated data to scores and a figure, through the commands that a user types."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stunet.reports import StructureDice

__all__ = ["demo"]

_DATASET_ID = 1
_PLANS = "STUNetPlans_demo"
_TRAINER = "STUNetTrainer_pretrain"
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Patches larger than this take too long on a CPU; voxels.
_MAX_PATCH_ON_CPU = 64**3


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything; must not exist.")] = Path(
        "stunet_demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="An nnU-Net raw dataset of your own; generated phantoms by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="small, base, large or huge; a narrow network by default, for speed.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of 20 iterations.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the phantoms and of the choice of unseen cases.", min=0)] = 0,
) -> None:
    """Pre-train a STU-Net, predict cases it has not seen and score them: on phantoms, or on a dataset of yours.

    The phantoms come in TotalSegmentator's layout with a third of the masks missing: not annotated, and not background.
    Every step is a command of nnU-Net or of this package, printed as you would type it.
    """
    from stunet.cli.console import stdout
    from stunet.cli.devices import choose_device
    from stunet.cli.sizes import choose_size

    started = time.monotonic()
    if size is not None:
        choose_size(size, None, None)
    chosen_device = choose_device(device)
    workspace = _Workspace.make(output, data, seed)
    workspace.print_exports()
    if data is None:
        _import(workspace)
    _train(workspace, size, epochs, chosen_device)
    predictions = _predict(workspace, chosen_device)
    summary = _evaluate(workspace, predictions)
    _print_dice(summary)
    figure = _draw(workspace, predictions)
    stdout.print(f"Figure:       {figure}", highlight=False, soft_wrap=True)
    stdout.print(f"Predictions:  {predictions}", highlight=False, soft_wrap=True)
    stdout.print(f"Whole output: {workspace.log}", highlight=False, soft_wrap=True)
    stdout.print(f"Finished in {time.monotonic() - started:.0f} s.", highlight=False)


@dataclass(frozen=True)
class _Workspace:
    """nnU-Net's three folders and what the demo adds, under one output folder.

    Attributes:
        root: The output folder.
        dataset_name: For example ``Dataset001_Phantoms``.
        configuration: ``3d_fullres``, or ``2d`` where the images are flat.
    """

    root: Path
    dataset_name: str
    configuration: str

    @property
    def dataset(self) -> Path:
        return self.root / "nnUNet_raw" / self.dataset_name

    @property
    def source(self) -> Path:
        """The phantoms as TotalSegmentator's cases would lie."""
        return self.root / "phantoms"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset_name

    @property
    def model(self) -> Path:
        return self.root / "nnUNet_results" / self.dataset_name / f"{_TRAINER}__{_PLANS}__{self.configuration}"

    @property
    def dataset_json(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self.dataset / "dataset.json").read_text(encoding="utf-8")))

    @property
    def log(self) -> Path:
        return self.root / "output.log"

    @property
    def environment(self) -> dict[str, str]:
        from stunet.cli.env import trainers_folder

        return {
            **{name: str(self.root / name) for name in _FOLDERS},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "2",
            "nnUNet_compile": "f",  # on CUDA, compiling would take longer than the training
        }

    @classmethod
    def make(cls, output: Path, data: Path | None, seed: int) -> _Workspace:
        from stunet.cli.console import stdout
        from stunet.datasets import check_hold_out, hold_out, read_image, read_raw_dataset, write_phantom_masks
        from stunet.errors import UsageError

        root, name, configuration = output.resolve(), "Phantoms", "3d_fullres"
        if data is not None:
            dataset = read_raw_dataset(data)
            n_held_out = min(4, max(1, len(dataset.cases) // 5))
            check_hold_out(dataset, n_held_out)
            name = dataset.folder.name.partition("_")[2] or dataset.folder.name
            first_image = next(iter(dataset.cases.values()))[0][0]
            configuration = "2d" if read_image(first_image)[0].shape[0] == 1 else "3d_fullres"
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UsageError(
                "the output folder is in use",
                got=root,
                expected="a folder that does not exist, or an empty one",
                remedy="Remove it, or choose another one with -o.",
            )
        workspace = cls(root, f"Dataset{_DATASET_ID:03d}_{name}", configuration)
        for folder in _FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        if data is None:
            stdout.print("Making 20 phantoms to train on and 4 to test on …", highlight=False)
            write_phantom_masks(workspace.source, n_training=20, n_test=4, seed=seed)
        else:
            cases = hold_out(dataset, workspace.dataset, n_held_out=n_held_out, seed=seed)
            stdout.print(f"Holding out {', '.join(cases)} to test on.", highlight=False)
        return workspace

    def print_exports(self) -> None:
        """Show what makes the commands that follow work in a shell of the user's."""
        from stunet.cli.console import stdout

        stdout.print()
        for name, value in self.environment.items():
            stdout.print(f"$ export {name}={shlex.quote(value)}", style="bold", highlight=False, soft_wrap=True)

    def run(self, *command: str | Path) -> None:
        from stunet.cli.runner import run_command

        run_command([str(part) for part in command], environment=self.environment, log=self.log)


def _import(workspace: _Workspace) -> None:
    from stunet.datasets import PHANTOM_LABELS
    from stunet.files import write_json

    structures = workspace.root / "structures.json"
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    workspace.run(
        "stunet", "import", "totalsegmentator", workspace.source, "-d", str(_DATASET_ID), "--name", "Phantoms",
        "--task", structures, "-np", "2",
    )  # fmt: skip
    workspace.run("stunet", "labels", "check", "-d", str(_DATASET_ID), "-np", "2")


def _train(workspace: _Workspace, size: str | None, epochs: int, device: str) -> None:
    d, c = str(_DATASET_ID), workspace.configuration
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", d, "-c", c, "-npfp", "2", "-np", "2")
    network = ["--size", size] if size else ["--depth", "1", "--width", "8"]
    settings = {
        "num_epochs": epochs,
        "num_iterations_per_epoch": 20,
        "num_val_iterations_per_epoch": 2,
        "oversample_foreground_percent": 0.5,
        # For a training this short: faster, and with a Dice loss that small structures do not drop out of.
        "initial_lr": 0.03,
        "batch_dice": "true",
        **_batch_for(workspace, device),
    }
    assignments = [f"{key}={value}" for key, value in settings.items()]
    workspace.run("stunet", "plan", "-d", d, "-c", c, *network, "--name", _PLANS, "--set", *assignments)
    workspace.run("nnUNetv2_train", d, c, "0", "-p", _PLANS, "-tr", _TRAINER, "-device", device)


def _predict(workspace: _Workspace, device: str) -> Path:
    predictions = workspace.root / "predictions"
    workspace.run(
        "nnUNetv2_predict", "-i", workspace.dataset / "imagesTs", "-o", predictions, "-d", str(_DATASET_ID),
        "-c", workspace.configuration, "-f", "0", "-p", _PLANS, "-tr", _TRAINER, "-device", device,
        "-npp", "1", "-nps", "1",
    )  # fmt: skip
    return predictions


def _evaluate(workspace: _Workspace, predictions: Path) -> list[StructureDice]:
    from stunet.reports import read_dice

    workspace.run(
        "nnUNetv2_evaluate_folder", workspace.dataset / "labelsTs", predictions,
        "-djfile", workspace.model / "dataset.json", "-pfile", workspace.model / "plans.json", "-np", "2",
    )  # fmt: skip
    return read_dice(predictions / "summary.json", workspace.dataset_json["labels"])


def _print_dice(rows: Sequence[StructureDice]) -> None:
    from math import isnan

    from rich.table import Table

    from stunet.cli.console import stdout

    table = Table("structure", "mean Dice", "lowest", "highest", "cases", title="Unseen cases", title_justify="left")
    for row in rows:
        table.add_row(row.name, f"{row.mean:.3f}", f"{row.lowest:.3f}", f"{row.highest:.3f}", str(row.n_cases))
    means = [row.mean for row in rows if not isnan(row.mean)]
    table.add_section()
    table.add_row("mean", f"{sum(means) / len(means):.3f}" if means else "nan", "", "", "")
    stdout.print()
    stdout.print(table)


def _draw(workspace: _Workspace, predictions: Path) -> Path:
    from stunet.datasets import exclusive_labels, read_image
    from stunet.reports import side_by_side

    ending = workspace.dataset_json["file_ending"]
    names, merge = exclusive_labels(workspace.dataset_json)
    cases: list[Any] = []
    for truth in sorted((workspace.dataset / "labelsTs").glob(f"*{ending}"))[:3]:
        name = truth.name.removesuffix(ending)
        image, spacing = read_image(workspace.dataset / "imagesTs" / f"{name}_0000{ending}")
        cases.append((name, image, merge(read_image(truth)[0]), read_image(predictions / truth.name)[0]))
    path = workspace.root / "demo.png"
    side_by_side(cases, names, path, spacing=spacing)
    return path


def _batch_for(workspace: _Workspace, device: str) -> dict[str, Any]:
    """A batch, and where nnU-Net's patch would take too long on a CPU a smaller one."""
    import math

    from stunet.network import total_stride
    from stunet.planning import fit_strides, load_plans, resolve_configuration

    plans = load_plans(workspace.preprocessed / "nnUNetPlans.json")
    configuration = resolve_configuration(plans, workspace.configuration)
    patch = list(configuration["patch_size"])
    if len(patch) == 2:
        return {"batch_size": min(8, configuration["batch_size"])}
    if device != "cpu" or math.prod(patch) <= _MAX_PATCH_ON_CPU:
        return {"batch_size": 2}
    step = total_stride(fit_strides(configuration["architecture"]["arch_kwargs"]["strides"]))
    while math.prod(patch) > _MAX_PATCH_ON_CPU and any(n > s for n, s in zip(patch, step, strict=True)):
        axis = max(range(len(patch)), key=lambda i: patch[i] / step[i])
        patch[axis] -= step[axis]
    return {"batch_size": 2, "patch_size": str(patch).replace(" ", "")}
