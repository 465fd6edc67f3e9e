"""``stunet demo``: pre-train, pick, fine-tune and predict, through the commands that a user types."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from stunet.cli.console import print_line, stdout
from stunet.cli.demo_workspace import Workspace
from stunet.cli.options import Device, Positive, Size, choose_device, choose_size
from stunet.files import read_json, write_json

if TYPE_CHECKING:
    from stunet.datasets import RawDataset
    from stunet.reports import StructureDice

_SOURCE, _TARGET = "Dataset001_Venous", "Dataset002_Arterial"
_PRETRAINED, _FINE_TUNED, _SCRATCH = "pretrained", "finetuned", "scratch"  # plans, and so models
_PRETRAINER, _TRAINER = "STUNetTrainer_pretrain", "STUNetTrainer"
_N_SOURCE, _N_FEW, _N_VALIDATION, _N_UNSEEN = 20, 3, 3, 4
_ITERATIONS_PER_EPOCH = 40
#: Of both trainings on the target; enough for the fine-tuned network.
_EPOCHS_ON_TARGET = 6
#: Patches larger than this take too long on a CPU; voxels. In the same time, more steps on small ones learn more.
_MAX_PATCH_ON_CPU = 16 * 32 * 32


def demo(
    output: Annotated[Path, Option("-o", "--output")] = Path("stunet_demo"),
    data: Path | None = None,
    size: Size = None,
    epochs: Positive = 16,
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
    network = ["--size", size] if size else ["--depth", "1", "--width", "8"]
    device = choose_device(device)
    raw = None if data is None else _read_own_data(data)
    commands = _Commands(Workspace(output), network, device, seed)
    if raw is None:
        _demonstrate_phantoms(commands, epochs)
    else:
        _demonstrate_own_data(commands, raw, epochs)
    print_line(f"Whole output: {commands.workspace.log}")
    stdout.print(f"Finished in {time.monotonic() - started:.0f} s.")


@dataclass(frozen=True)
class _Commands:
    """The commands that both demos run, and what these have in common."""

    workspace: Workspace
    network: Sequence[str]
    device: str
    seed: int
    configuration: str = "3d_fullres"

    def preprocess(self, dataset: str) -> None:
        dataset_id = str(int(dataset[7:10]))
        options = ["-c", self.configuration, "-npfp", "1", "-np", "1"]
        self.workspace.run("nnUNetv2_plan_and_preprocess", "-d", dataset_id, *options)

    def plan(self, dataset: str, name: str, settings: Sequence[str]) -> None:
        dataset_id = str(int(dataset[7:10]))
        options = ["-c", self.configuration, *self.network, "--name", name, "--set", *settings]
        self.workspace.run("stunet", "plan", "-d", dataset_id, *options)

    def train(self, dataset: str, plans: str, trainer: str, epochs: int) -> None:
        options = ["-p", plans, "-tr", trainer, "-device", self.device, "--seed", str(self.seed)]
        fold = (str(int(dataset[7:10])), self.configuration, "0")
        self.workspace.run("stunet", "train", *fold, *options, epochs=epochs)

    def predict(self, dataset: str, plans: str, trainer: str, predictions: Path) -> list[StructureDice]:
        """Predict a dataset's test cases with a model that was trained on it, and compare with their labels."""
        from stunet.reports import read_dice

        raw = self.workspace.raw(dataset)
        model = self.workspace.model(dataset, trainer, plans, self.configuration)
        options = ["-d", str(int(dataset[7:10])), "-c", self.configuration, "-f", "0", "-p", plans, "-tr", trainer]
        options += ["-device", self.device, "-npp", "0", "-nps", "0"]
        self.workspace.run("nnUNetv2_predict", "-i", raw / "imagesTs", "-o", predictions, *options)
        files = ["-djfile", model / "dataset.json", "-pfile", model / "plans.json"]
        self.workspace.run("nnUNetv2_evaluate_folder", raw / "labelsTs", predictions, *files, "-np", "2")
        return read_dice(predictions / "summary.json", self.workspace.dataset_json(dataset)["labels"])

    def settings(self, dataset: str, epochs: int, **more: int) -> list[str]:
        """Return the values of ``--set`` for a training this short, whether it starts from weights or from noise.

        Where nnU-Net's patch would take too long on a CPU, a smaller one is taken.
        """
        from stunet.network import total_stride
        from stunet.planning import fit_strides, load_plans, resolve_configuration

        plans = load_plans(self.workspace.preprocessed(dataset) / "nnUNetPlans.json")
        configuration = resolve_configuration(plans, self.configuration)
        patch = list(configuration["patch_size"])
        settings = {
            "num_epochs": epochs,
            "num_iterations_per_epoch": _ITERATIONS_PER_EPOCH,
            "num_val_iterations_per_epoch": 4,
            "oversample_foreground_percent": 0.5,
            # Higher than the default, as there are so few iterations; Dice over the batch, where more structures are.
            "initial_lr": 0.03,
            "batch_dice": "true",
            "mirroring": "none",  # an eighth of the passes in prediction
            "final_validation": "false",
            "batch_size": min(8, configuration["batch_size"]) if len(patch) == 2 else 2,
        }
        if len(patch) == 3 and self.device == "cpu" and math.prod(patch) > _MAX_PATCH_ON_CPU:
            step = total_stride(fit_strides(configuration["architecture"]["arch_kwargs"]["strides"]))
            while math.prod(patch) > _MAX_PATCH_ON_CPU and any(n > s for n, s in zip(patch, step, strict=True)):
                axis = max(range(3), key=lambda i: patch[i] / step[i])
                patch[axis] -= step[axis]
            settings["patch_size"] = ",".join(map(str, patch))
        return [f"{key}={value}" for key, value in (settings | more).items()]


def _demonstrate_phantoms(commands: _Commands, epochs: int) -> None:
    """Pre-train on partly annotated cases, pick a checkpoint, fine-tune it beside scratch, predict; ``report.html``."""
    from stunet.reports.story import conclude, write_story

    started = time.monotonic()
    workspace = commands.workspace
    chapters: list[tuple[str, str, list[tuple[str, float]]]] = []

    def close_chapter(title: str, text: str) -> None:
        n_told = sum(len(done) for _, _, done in chapters)
        chapters.append((title, text, workspace.commands[n_told:]))

    _pretrain(commands, epochs)
    close_chapter(
        "Pre-train on what is annotated",
        f"{_N_SOURCE * 4 // 5} training cases in TotalSegmentator's layout, with a third of the masks left out. A "
        "missing mask means that the structure is not annotated. It does not mean background, so the loss leaves open "
        "what those voxels are. Checkpoints are kept on the way.",
    )
    ranking = _rank(commands)
    winner = ranking["candidates"][0]
    close_chapter(
        "Pick the checkpoint to start from",
        f"The target is a small dataset: {_N_FEW} labelled cases of another contrast phase with more noise, and two "
        "structures that the pre-training had no labels for. stunet rank scores each checkpoint on the features of "
        "these cases, without training. LogME ranks here, as it does better than CC-FV on the checkpoints of one "
        f"training (docs/transferability.md). {ranking['verdict']}",
    )
    epochs_on_target = min(epochs, _EPOCHS_ON_TARGET)
    iterations = epochs_on_target * _ITERATIONS_PER_EPOCH
    _train_on_target(commands, workspace.root / winner["path"], epochs_on_target)
    close_chapter(
        "Fine-tune it, and train from scratch beside it",
        f"Both get the same {_N_FEW} cases, {iterations} iterations, settings and seed.",
    )
    models = {"from scratch": _SCRATCH, "fine-tuned": _FINE_TUNED}
    predictions = {title: workspace.root / f"predictions_{plans}" for title, plans in models.items()}
    dice = {title: commands.predict(_TARGET, plans, _TRAINER, predictions[title]) for title, plans in models.items()}
    _print_dice(dice)
    picture = _draw_cases(commands, _TARGET, predictions)
    close_chapter(
        "Predict unseen cases",
        f"{_N_UNSEEN} cases that no training and no ranking has seen, with nnU-Net's own commands.",
    )
    conclusion = conclude(dice, n_cases=_N_FEW, iterations=iterations)
    page = workspace.root / "report.html"
    write_story(
        page,
        conclusion=conclusion,
        chapters=chapters,
        exports=workspace.exports,
        ranking=ranking,
        curves={title: _curve(commands, _TARGET, _TRAINER, plans) for title, plans in models.items()},
        pretraining=_curve(commands, _SOURCE, _PRETRAINER, _PRETRAINED),
        dice=dice,
        picture=picture,
        seconds=time.monotonic() - started,
    )
    stdout.print(f"\n{conclusion}\n", style="bold")
    print_line(f"The whole story:  {page}")
    print_line(f"Ranking:          {workspace.root / 'ranking' / 'ranking.html'}")


def _pretrain(commands: _Commands, epochs: int) -> None:
    from stunet.datasets import PHANTOM_LABELS, write_phantom_masks

    workspace = commands.workspace
    workspace.print_exports()
    source, structures = workspace.root / "phantoms", workspace.root / "structures.json"
    stdout.print(f"\nMaking {_N_SOURCE} cases to pre-train on …")
    with stdout.status("making cases"):
        write_phantom_masks(source, n_training=_N_SOURCE, n_test=0, seed=commands.seed)
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    options = ["-d", "1", "--name", _SOURCE[11:], "--task", structures, "-np", "2"]
    workspace.run("stunet", "import", "totalsegmentator", source, *options)
    workspace.run("stunet", "labels", "check", "-d", "1", "-np", "2")
    commands.preprocess(_SOURCE)
    commands.plan(_SOURCE, _PRETRAINED, commands.settings(_SOURCE, epochs, keep_every=max(1, epochs // 3)))
    commands.train(_SOURCE, _PRETRAINED, _PRETRAINER, epochs)


def _rank(commands: _Commands) -> dict[str, Any]:
    """Make the target, rank the checkpoints of the pre-training for it, and return ``ranking.json``."""
    from stunet.datasets import write_phantom_dataset

    workspace, seed = commands.workspace, commands.seed
    n_labelled = _N_FEW + _N_VALIDATION
    stdout.print(f"\nMaking a target dataset with {_N_FEW} cases to train on …")
    with stdout.status("making cases"):
        # Other bodies than those of the pre-training: another seed.
        write_phantom_dataset(
            workspace.raw(_TARGET), n_training=n_labelled, n_test=_N_UNSEEN, seed=seed + 1000, contrast="arterial"
        )
    commands.preprocess(_TARGET)
    cases = [f"phantom_{case:03d}" for case in range(n_labelled)]
    split = [{"train": cases[:_N_FEW], "val": cases[_N_FEW:]}]
    write_json(split, workspace.preprocessed(_TARGET) / "splits_final.json")
    fold = workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED, commands.configuration) / "fold_0"
    workspace.define("PRETRAINED", str(fold.relative_to(workspace.root)))
    checkpoints = [*sorted(fold.glob("checkpoint_epoch_*.pth")), fold / "checkpoint_final.pth"]
    output = workspace.root / "ranking"
    options = ["-f", "0", "-device", commands.device, "--seed", str(seed), "-o", output]
    options += ["--metrics", "logme,ccfv,transrate,leep,gbc,zero-shot", "--checkpoints", *checkpoints]
    workspace.run("stunet", "rank", "-d", "2", *options)
    ranking = read_json(output / "ranking.json")
    for candidate in ranking["candidates"]:
        stdout.print(f"  LogME {candidate['scores']['logme']:7.3f}  {candidate['name']}")
    stdout.print(f"  {ranking['verdict']}")
    return ranking


def _train_on_target(commands: _Commands, winner: Path, epochs: int) -> None:
    settings = commands.settings(_TARGET, epochs)
    commands.workspace.define("SETTINGS", " ".join(settings))
    options = ["-c", commands.configuration, "-f", "0", "--from", winner, "--name", _FINE_TUNED]
    options += ["-device", commands.device, "--seed", str(commands.seed), "--set", *settings]
    commands.workspace.run("stunet", "finetune", "-d", "2", *options, epochs=epochs)
    commands.plan(_TARGET, _SCRATCH, settings)
    commands.train(_TARGET, _SCRATCH, _TRAINER, epochs)


def _curve(commands: _Commands, dataset: str, trainer: str, plans: str) -> list[float]:
    """Read the mean Dice on validation patches, epoch by epoch, as nnU-Net's checkpoints keep it."""
    from stunet.weights import read_checkpoint

    model = commands.workspace.model(dataset, trainer, plans, commands.configuration)
    logged = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["logging"]
    return [float(value) for value in logged["mean_fg_dice"]]


def _read_own_data(data: Path) -> RawDataset:
    from stunet.datasets import check_hold_out, read_raw_dataset

    raw = read_raw_dataset(data)
    check_hold_out(raw, _n_held_out(raw))
    return raw


def _n_held_out(raw: RawDataset) -> int:
    return min(4, max(1, len(raw.cases) // 5))


def _demonstrate_own_data(commands: _Commands, raw: RawDataset, epochs: int) -> None:
    """Train on a dataset in nnU-Net's raw layout, hold cases out, predict and score them."""
    from stunet.datasets import hold_out, read_image

    workspace, plans = commands.workspace, "demo"
    dataset = f"Dataset001_{raw.folder.name.partition('_')[2] or raw.folder.name}"
    first_image = next(iter(raw.cases.values()))[0][0]
    if read_image(first_image)[0].shape[0] == 1:
        commands = replace(commands, configuration="2d")
    cases = hold_out(raw, workspace.raw(dataset), n_held_out=_n_held_out(raw), seed=commands.seed)
    stdout.print(f"Holding out {', '.join(cases)} to test on.")
    workspace.print_exports()
    commands.preprocess(dataset)
    commands.plan(dataset, plans, commands.settings(dataset, epochs))
    commands.train(dataset, plans, _PRETRAINER, epochs)
    predictions = workspace.root / "predictions"
    _print_dice({"mean Dice": commands.predict(dataset, plans, _PRETRAINER, predictions)})
    print_line(f"Figure:       {_draw_cases(commands, dataset, {'prediction': predictions})}")
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


def _draw_cases(commands: _Commands, dataset: str, predictions: Mapping[str, Path]) -> Path:
    """Draw three test cases with truth and predictions side by side."""
    from stunet.datasets import exclusive_labels, read_image, read_plane_names
    from stunet.reports import side_by_side

    description, raw = commands.workspace.dataset_json(dataset), commands.workspace.raw(dataset)
    ending, path = description["file_ending"], commands.workspace.root / "demo.png"
    names, merge = exclusive_labels(description)
    cases: list[Any] = []
    for truth in sorted((raw / "labelsTs").glob(f"*{ending}"))[:3]:
        name = truth.name.removesuffix(ending)
        image, spacing = read_image(raw / "imagesTs" / f"{name}_0000{ending}")
        predicted = {title: read_image(folder / truth.name)[0] for title, folder in predictions.items()}
        cases.append((name, image, {"truth": merge(read_image(truth)[0]), **predicted}))
    side_by_side(cases, names, path, spacing=spacing, plane_name=read_plane_names(truth)[0])
    return path
