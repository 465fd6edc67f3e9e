"""``stunet demo``: pre-train, pick, fine-tune and predict, through the commands that a user types."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from stunet.cli.console import print_line, stdout
from stunet.cli.demo_workspace import ITERATIONS_PER_EPOCH, Workspace
from stunet.cli.options import Device, Positive, Size, choose_device, choose_size
from stunet.files import read_json, write_json

if TYPE_CHECKING:
    from stunet.datasets import RawDataset
    from stunet.reports import StructureDice

_SOURCE, _TARGET = "Dataset001_Venous", "Dataset002_Arterial"
_PRETRAINED, _FINE_TUNED, _SCRATCH = "pretrained", "finetuned", "scratch"  # plans, and so models
_PRETRAINER, _TRAINER = "STUNetTrainer_pretrain", "STUNetTrainer"
_N_SOURCE, _N_FEW, _N_VALIDATION, _N_UNSEEN = 20, 3, 3, 4
#: Of both trainings on the target; enough for the fine-tuned network.
_EPOCHS_ON_TARGET = 4


def demo(
    output: Annotated[Path, Option("-o", "--output")] = Path("stunet_demo"),
    data: Path | None = None,
    size: Size = None,
    epochs: Positive = 24,
    device: Device = "auto",
    seed: Annotated[int, Option(min=0)] = 0,
) -> None:
    """Pre-train a STU-Net, pick the best checkpoint for another dataset, fine-tune it and predict unseen cases.

    On generated phantoms: in the first dataset a third of the masks is missing, not annotated and not background; the
    second one has three labelled cases, another contrast and new structures. Fine-tuning is compared with training
    from scratch. Every step is a command of nnU-Net or of this package, printed as you would type it, and one page
    shows the results.

    Options:
        output: Folder for everything; must not exist.
        data: Train on an nnU-Net raw dataset of your own instead, and predict unseen cases.
        size: small, base, large or huge; a narrow network by default, for speed.
        epochs: Epochs of 40 iterations of the first training.
        seed: Seed of all that is random; the same figures on one machine.
    """
    started = time.monotonic()
    if size is not None:
        choose_size(size, None, None)
    network = f"--size {size}" if size else "--depth 1 --width 8"
    device = choose_device(device)
    raw = None if data is None else _read_own_data(data)
    workspace = Workspace(output, network, device, seed, threads=1 if size is None and data is None else None)
    if raw is None:
        _demonstrate_phantoms(workspace, epochs)
    else:
        _demonstrate_own_data(workspace, raw, epochs)
    print_line(f"Whole output: {workspace.log}")
    stdout.print(f"Finished in {time.monotonic() - started:.0f} s.")


def _demonstrate_phantoms(workspace: Workspace, epochs: int) -> None:
    """Pre-train on partly annotated cases, pick a checkpoint, fine-tune it beside scratch, predict; ``report.html``."""
    from stunet.reports.story import conclude, write_story

    started = time.monotonic()
    ends: list[int] = []  # of the chapters, in the list of commands
    _pretrain(workspace, epochs)
    ends.append(len(workspace.commands))
    ranking = _rank(workspace)
    ends.append(len(workspace.commands))
    epochs = min(epochs, _EPOCHS_ON_TARGET)
    _train_on_target(workspace, workspace.root / ranking["candidates"][0]["path"], epochs)
    ends.append(len(workspace.commands))
    models = {"from scratch": _SCRATCH, "fine-tuned": _FINE_TUNED}
    predictions = {title: workspace.root / f"predictions_{plans}" for title, plans in models.items()}
    dice = workspace.predict(_TARGET, {models[title]: folder for title, folder in predictions.items()}, _TRAINER)
    dice = {title: dice[plans] for title, plans in models.items()}
    ends.append(len(workspace.commands))
    _print_dice(dice)
    counts = {"n_few": _N_FEW, "n_unseen": _N_UNSEEN, "iterations": epochs * ITERATIONS_PER_EPOCH}
    conclusion = conclude(dice, n_cases=counts["n_few"], iterations=counts["iterations"])
    page = workspace.root / "report.html"
    write_story(
        page,
        conclusion=conclusion,
        counts={"n_source": _N_SOURCE * 4 // 5, **counts},
        commands=[workspace.commands[start:end] for start, end in zip([0, *ends], ends, strict=False)],
        exports=workspace.exports,
        ranking=ranking,
        curves={title: _curve(workspace, _TARGET, _TRAINER, plans) for title, plans in models.items()},
        pretraining=_curve(workspace, _SOURCE, _PRETRAINER, _PRETRAINED),
        dice=dice,
        picture=_draw_cases(workspace, _TARGET, predictions),
        seconds=time.monotonic() - started,
    )
    stdout.print(f"\n{conclusion}\n", style="bold")
    print_line(f"The whole story:  {page}")
    print_line(f"Ranking:          {workspace.root / 'ranking' / 'ranking.html'}")


def _pretrain(workspace: Workspace, epochs: int) -> None:
    from stunet.datasets import PHANTOM_LABELS, write_phantom_masks

    workspace.print_exports()
    source, structures = workspace.root / "phantoms", workspace.root / "structures.json"
    stdout.print(f"\nMaking {_N_SOURCE} cases to pre-train on …")
    with stdout.status("making cases"):
        write_phantom_masks(source, n_training=_N_SOURCE, n_test=0, seed=workspace.seed)
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    options = f"-d 1 --name {_SOURCE[11:]} --task {structures} -np 2"
    workspace.run(f"stunet import totalsegmentator {source} {options}")
    workspace.run("stunet labels check -d 1 -np 2")
    workspace.preprocess(_SOURCE)
    workspace.plan(_SOURCE, _PRETRAINED, workspace.settings(_SOURCE, epochs, keep_every=max(1, epochs // 3)))
    workspace.run(workspace.training(_SOURCE, _PRETRAINED, _PRETRAINER), epochs=epochs)


def _rank(workspace: Workspace) -> dict[str, Any]:
    """Make the target, rank the checkpoints of the pre-training for it, and return ``ranking.json``."""
    from stunet.datasets import write_phantom_dataset

    n_labelled = _N_FEW + _N_VALIDATION
    stdout.print(f"\nMaking a target dataset with {_N_FEW} cases to train on …")
    with stdout.status("making cases"):
        # Other bodies than those of the pre-training: another seed.
        seed, raw = workspace.seed + 1000, workspace.raw(_TARGET)
        write_phantom_dataset(raw, n_training=n_labelled, n_test=_N_UNSEEN, seed=seed, contrast="arterial")
    workspace.preprocess(_TARGET)
    cases = [f"phantom_{case:03d}" for case in range(n_labelled)]
    split = [{"train": cases[:_N_FEW], "val": cases[_N_FEW:]}]
    write_json(split, workspace.preprocessed(_TARGET) / "splits_final.json")
    fold = workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED) / "fold_0"
    workspace.define("PRETRAINED", str(fold.relative_to(workspace.root)))
    checkpoints = [*sorted(fold.glob("checkpoint_epoch_*.pth")), fold / "checkpoint_final.pth"]
    output = workspace.root / "ranking"
    options = f"-f 0 -device {workspace.device} --seed {workspace.seed} -o {output}"
    options += " --metrics logme,ccfv,transrate,leep,gbc,zero-shot --checkpoints " + " ".join(map(str, checkpoints))
    workspace.run(f"stunet rank -d 2 {options}")
    ranking = read_json(output / "ranking.json")
    for candidate in ranking["candidates"]:
        stdout.print(f"  LogME {candidate['scores']['logme']:7.3f}  {candidate['name']}")
    stdout.print(f"  {ranking['verdict']}")
    return ranking


def _train_on_target(workspace: Workspace, winner: Path, epochs: int) -> None:
    """Fine-tune the checkpoint, and train from scratch beside it."""
    settings = workspace.settings(_TARGET, epochs)
    workspace.define("SETTINGS", settings)
    options = f"-c {workspace.configuration} -f 0 --from {winner} --name {_FINE_TUNED} -device {workspace.device}"
    workspace.plan(_TARGET, _SCRATCH, settings)
    fine_tuning = f"stunet finetune -d 2 {options} --seed {workspace.seed} --set {settings}"
    trainings = (fine_tuning, workspace.training(_TARGET, _SCRATCH, _TRAINER))
    # At once where each takes one core; large networks want all of them, or all of a GPU's memory.
    for lines in [trainings] if workspace.threads else [(line,) for line in trainings]:
        workspace.run(*lines, epochs=epochs)


def _curve(workspace: Workspace, dataset: str, trainer: str, plans: str) -> list[float]:
    """Read the mean Dice on validation patches, epoch by epoch, as nnU-Net's checkpoints keep it."""
    from stunet.weights.read import read_checkpoint

    checkpoint = workspace.model(dataset, trainer, plans) / "fold_0" / "checkpoint_final.pth"
    logged = read_checkpoint(checkpoint)["logging"]
    return [float(value) for value in logged["mean_fg_dice"]]


def _read_own_data(data: Path) -> RawDataset:
    from stunet.datasets import check_hold_out, read_raw_dataset

    raw = read_raw_dataset(data)
    check_hold_out(raw, _n_held_out(raw))
    return raw


def _n_held_out(raw: RawDataset) -> int:
    return min(4, max(1, len(raw.cases) // 5))


def _demonstrate_own_data(workspace: Workspace, raw: RawDataset, epochs: int) -> None:
    """Train on a dataset in nnU-Net's raw layout, hold cases out, predict and score them."""
    from stunet.datasets import hold_out, read_image

    plans = "demo"
    name = raw.folder.name.partition("_")[2] or raw.folder.name
    dataset = f"Dataset001_{name.replace(' ', '_')}"
    first_image = next(iter(raw.cases.values()))[0][0]
    if read_image(first_image)[0].shape[0] == 1:
        workspace.configuration = "2d"
    cases = hold_out(raw, workspace.raw(dataset), n_held_out=_n_held_out(raw), seed=workspace.seed)
    stdout.print(f"Holding out {', '.join(cases)} to test on.")
    workspace.print_exports()
    workspace.preprocess(dataset)
    workspace.plan(dataset, plans, workspace.settings(dataset, epochs))
    workspace.run(workspace.training(dataset, plans, _PRETRAINER), epochs=epochs)
    predictions = workspace.root / "predictions"
    _print_dice({"mean Dice": workspace.predict(dataset, {plans: predictions}, _PRETRAINER)[plans]})
    print_line(f"Figure:       {_draw_cases(workspace, dataset, {'prediction': predictions})}")
    print_line(f"Predictions:  {predictions}")


def _print_dice(columns: Mapping[str, Sequence[StructureDice]]) -> None:
    """Show Dice by structure, of models beside each other; of one model alone, its lowest and highest too."""
    from stunet.reports import mean_dice

    alone = len(columns) == 1
    spread = ("lowest", "highest", "cases") if alone else ()
    table = Table("structure", *columns, *spread, title="Unseen cases", title_justify="left")
    for rows in zip(*columns.values(), strict=True):
        cells = [f"{rows[0].lowest:.3f}", f"{rows[0].highest:.3f}", str(rows[0].n_cases)] if alone else []
        table.add_row(rows[0].name, *[f"{row.mean:.3f}" for row in rows], *cells)
    table.add_section()
    table.add_row("mean", *[f"{mean_dice(rows):.3f}" for rows in columns.values()], *("" for _ in spread))
    stdout.print("", table, sep="\n")


def _draw_cases(workspace: Workspace, dataset: str, predictions: Mapping[str, Path]) -> Path:
    """Draw three test cases with truth and predictions side by side."""
    from stunet.datasets import read_image, read_plane_names
    from stunet.labels import Labels
    from stunet.reports import side_by_side

    description, raw = workspace.dataset_json(dataset), workspace.raw(dataset)
    ending, path = description["file_ending"], workspace.root / "demo.png"
    labels = Labels(description)
    cases: list[Any] = []
    for truth in sorted((raw / "labelsTs").glob(f"*{ending}"))[:3]:
        name = truth.name.removesuffix(ending)
        image, spacing = read_image(raw / "imagesTs" / f"{name}_0000{ending}")
        predicted = {title: read_image(folder / truth.name)[0] for title, folder in predictions.items()}
        cases.append((name, image, {"truth": labels.as_predicted(read_image(truth)[0]), **predicted}))
    side_by_side(cases, labels.predicted, path, spacing=spacing, plane_name=read_plane_names(truth)[0])
    return path
