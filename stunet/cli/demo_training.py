"""Steps of the demo: training, prediction and scoring, with nnU-Net's commands; and the demo on a user's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stunet.cli.demo_workspace import Workspace
    from stunet.reports import StructureDice

__all__ = [
    "ITERATIONS_PER_EPOCH",
    "as_options",
    "draw_cases",
    "predict_and_score",
    "print_dice",
    "train",
    "train_on_data",
    "training_settings",
]

ITERATIONS_PER_EPOCH = 40

_PLANS = "demo"
_TRAINER = "STUNetTrainer_pretrain"


def training_settings(epochs: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a training this short, whether it starts from weights or from noise."""
    return {
        "num_epochs": epochs,
        "num_iterations_per_epoch": ITERATIONS_PER_EPOCH,
        "num_val_iterations_per_epoch": 4,
        "oversample_foreground_percent": 0.5,
        # Higher than the defaults, as there are so few iterations; Dice over the batch, where more structures occur.
        "initial_lr": 0.03,
        "batch_dice": "true",
        "mirroring": "none",  # an eighth of the passes in prediction
        "final_validation": "false",
        **batch,
    }


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Values of ``--set``."""
    return [f"{key}={value}" for key, value in settings.items()]


def train_on_data(
    data: Path, output: Path, *, network: Sequence[str], epochs: int, device: str, seed: int
) -> Workspace:
    """Train on a dataset in nnU-Net's raw layout, hold cases out, predict and score them."""
    from stunet.cli.console import stdout
    from stunet.cli.demo_workspace import Workspace, batch_settings
    from stunet.datasets import check_hold_out, hold_out, read_image, read_raw_dataset

    raw = read_raw_dataset(data)
    n_held_out = min(4, max(1, len(raw.cases) // 5))
    check_hold_out(raw, n_held_out)
    dataset = f"Dataset001_{raw.folder.name.partition('_')[2] or raw.folder.name}"
    first_image = next(iter(raw.cases.values()))[0][0]
    c = "2d" if read_image(first_image)[0].shape[0] == 1 else "3d_fullres"
    workspace = Workspace.make(output)
    cases = hold_out(raw, workspace.raw(dataset), n_held_out=n_held_out, seed=seed)
    stdout.print(f"Holding out {', '.join(cases)} to test on.", highlight=False)
    workspace.print_exports()
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", c, "-npfp", "1", "-np", "1")
    settings = training_settings(epochs, batch_settings(workspace, dataset, c, device))
    workspace.run("stunet", "plan", "-d", "1", "-c", c, *network, "--name", _PLANS, "--set", *as_options(settings))
    train(workspace, "1", _PLANS, _TRAINER, configuration=c, device=device, seed=seed, epochs=epochs)
    predictions = workspace.root / "predictions"
    rows = predict_and_score(
        workspace, dataset, _TRAINER, _PLANS, configuration=c, device=device, predictions=predictions
    )
    print_dice({"mean Dice": rows})
    figure = draw_cases(workspace, dataset, {"prediction": predictions}, workspace.root / "demo.png")
    stdout.print(f"Figure:       {figure}", highlight=False, soft_wrap=True)
    stdout.print(f"Predictions:  {predictions}", highlight=False, soft_wrap=True)
    return workspace


def train(
    workspace: Workspace, dataset: str, plans: str, trainer: str, *,
    configuration: str, device: str, seed: int, epochs: int,
) -> None:  # fmt: skip
    """Train on fold 0, with all random numbers from the seed."""
    workspace.run(
        "stunet", "train", dataset, configuration, "0", "-p", plans, "-tr", trainer, "-device", device,
        "--seed", str(seed), epochs=epochs,
    )  # fmt: skip


def predict_and_score(
    workspace: Workspace, dataset: str, trainer: str, plans: str, *, configuration: str, device: str, predictions: Path
) -> list[StructureDice]:
    """Predict a dataset's test cases with a model that was trained on it, and compare with their labels."""
    from stunet.reports import read_dice

    raw, model = workspace.raw(dataset), workspace.model(dataset, trainer, plans, configuration)
    workspace.run(
        "nnUNetv2_predict", "-i", raw / "imagesTs", "-o", predictions, "-d", str(int(dataset[7:10])),
        "-c", configuration, "-f", "0", "-p", plans, "-tr", trainer, "-device", device, "-npp", "0", "-nps", "0",
    )  # fmt: skip
    workspace.run(
        "nnUNetv2_evaluate_folder", raw / "labelsTs", predictions,
        "-djfile", model / "dataset.json", "-pfile", model / "plans.json", "-np", "2",
    )  # fmt: skip
    return read_dice(predictions / "summary.json", workspace.dataset_json(dataset)["labels"])


def print_dice(columns: Mapping[str, Sequence[StructureDice]]) -> None:
    """A table of Dice by structure, of models beside each other; of one model alone, its lowest and highest too."""
    from rich.table import Table

    from stunet.cli.console import stdout
    from stunet.reports import mean_dice

    alone = len(columns) == 1
    table = Table("structure", *columns, title="Unseen cases", title_justify="left")
    for name in ("lowest", "highest", "cases") if alone else ():
        table.add_column(name)
    for rows in zip(*columns.values(), strict=True):
        spread = [f"{rows[0].lowest:.3f}", f"{rows[0].highest:.3f}", str(rows[0].n_cases)] if alone else []
        table.add_row(rows[0].name, *[f"{row.mean:.3f}" for row in rows], *spread)
    table.add_section()
    table.add_row("mean", *[f"{mean_dice(rows):.3f}" for rows in columns.values()], *([""] * 3 if alone else []))
    stdout.print()
    stdout.print(table)


def draw_cases(workspace: Workspace, dataset: str, predictions: Mapping[str, Path], path: Path) -> Path:
    """Three test cases with truth and predictions side by side."""
    from stunet.datasets import read_image, read_plane_names
    from stunet.labels import Labels
    from stunet.reports import side_by_side

    description, raw = workspace.dataset_json(dataset), workspace.raw(dataset)
    ending = description["file_ending"]
    labels = Labels(description)
    cases: list[Any] = []
    for truth in sorted((raw / "labelsTs").glob(f"*{ending}"))[:3]:
        name = truth.name.removesuffix(ending)
        image, spacing = read_image(raw / "imagesTs" / f"{name}_0000{ending}")
        predicted = {title: read_image(folder / truth.name)[0] for title, folder in predictions.items()}
        cases.append((name, image, {"truth": labels.as_predicted(read_image(truth)[0]), **predicted}))
    side_by_side(cases, labels.predicted, path, spacing=spacing, plane_name=read_plane_names(truth)[0])
    return path
