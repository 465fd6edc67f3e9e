"""``stunet demo``: pre-train, pick, fine-tune and predict, through the commands that a user types."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from os import cpu_count, environ, pathsep, sep
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option

from stunet.cli.console import print_line, print_table, stdout
from stunet.cli.options import Device, Positive, Size, choose_device, choose_size
from stunet.errors import CommandError, UsageError
from stunet.files import read_json, write_json

if TYPE_CHECKING:
    from stunet.datasets.raw import RawDataset
    from stunet.reports.figures import StructureDice

_SOURCE, _TARGET = "Dataset001_Venous", "Dataset002_Arterial"
_PRETRAINED, _FINE_TUNED, _SCRATCH = "pretrained", "finetuned", "scratch"  # plans, and so models
_PRETRAINER, _TRAINER = "STUNetTrainer_pretrain", "STUNetTrainer"
_N_SOURCE, _N_FEW, _N_LABELLED, _N_UNSEEN = 20, 3, 6, 4  # the few are labelled, too; the others validate
#: Of both trainings on the target; enough for the fine-tuned network.
_EPOCHS_ON_TARGET = 5
#: Each patch of the few there are shows some structure.
_SMALL_STRUCTURES = {"oversample_foreground_percent": 1}
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Patches larger than this take too long on a CPU; voxels. In the same time, more steps on small ones learn more.
_MAX_PATCH_ON_CPU = 16 * 32 * 32
_ITERATIONS_PER_EPOCH = 50
_HEARTBEAT = 15.0  # seconds between two signs of life where the terminal cannot show a bar


def demo(
    output: Annotated[Path, Option("-o", "--output")] = Path("stunet_demo"),
    data: Path | None = None,
    size: Size = None,
    epochs: Positive = 13,
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
        epochs: Epochs of 50 iterations of the first training.
        seed: Seed of all that is random; the same figures on one machine.
    """
    started = time.monotonic()
    if size is not None:
        choose_size(size, None, None)
    network = f"--size {size}" if size else "--depth 1 --width 8"
    device = choose_device(device)
    raw = None
    if data is not None:
        from stunet.datasets.raw import check_hold_out, read_raw_dataset

        raw = read_raw_dataset(data)
        check_hold_out(raw, _n_held_out(raw))
    workspace = Workspace(output, network, device, seed, threads=1 if size is None and data is None else None)
    if raw is None:
        _demonstrate_phantoms(workspace, epochs)
    else:
        _demonstrate_own_data(workspace, raw, epochs)
    print_line(f"Whole output: {workspace.log}")
    stdout.print(f"Finished in {time.monotonic() - started:.0f} s.")


def _demonstrate_phantoms(workspace: Workspace, epochs: int) -> None:
    """Pre-train on partly annotated cases, pick a checkpoint, fine-tune it beside scratch, predict; ``report.html``."""
    from stunet.reports.figures import conclude, draw_story, inline_png, mean_dice, write_page

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
    counts = {"n_few": _N_FEW, "n_unseen": _N_UNSEEN, "iterations": epochs * _ITERATIONS_PER_EPOCH}
    conclusion = conclude(dice, n_cases=counts["n_few"], iterations=counts["iterations"])
    page = workspace.root / "report.html"
    pretraining = _curve(workspace, _SOURCE, _PRETRAINER, _PRETRAINED)
    curves = {title: _curve(workspace, _TARGET, _TRAINER, plans) for title, plans in models.items()}
    picture = _draw_cases(workspace, _TARGET, predictions)
    write_page(
        "story.html",
        page,
        title="Pre-train, pick, fine-tune",
        lead=conclusion,
        picture=inline_png(picture, "image, truth and predictions of three unseen cases"),
        counts={"n_source": _N_SOURCE * 4 // 5, **counts},
        verdict=ranking["verdict"],
        exports=workspace.exports,
        commands=[workspace.commands[start:end] for start, end in zip([0, *ends], ends, strict=False)],
        figures=draw_story(ranking, pretraining, curves),
        candidates=ranking["candidates"],
        models=list(dice),
        structures=list(zip(*dice.values(), strict=True)),
        means=[mean_dice(rows) for rows in dice.values()],
        total=f"{(time.monotonic() - started) / 60:.1f}",
        versions=[(name, version(name)) for name in ("stunet", "nnunetv2", "torch")],
        cores=cpu_count(),
    )
    stdout.print(f"\n{conclusion}\n", style="bold")
    print_line(f"The whole story:  {page}")
    print_line(f"Ranking:          {workspace.root / 'ranking' / 'ranking.html'}")


def _pretrain(workspace: Workspace, epochs: int) -> None:
    from stunet.datasets.phantoms import PHANTOM_LABELS, write_phantom_dataset, write_phantom_masks

    workspace.print_exports()
    source, structures = workspace.root / "phantoms", workspace.root / "structures.json"
    few = f"of another contrast, {_N_FEW} of them to train on"
    stdout.print(f"\nMaking {_N_SOURCE} cases to pre-train on, and {_N_LABELLED + _N_UNSEEN} {few} …")
    with stdout.status("making cases"):
        write_phantom_masks(source, n_training=_N_SOURCE, n_test=0, seed=workspace.seed)
        # Other bodies: another seed.
        seed, raw = workspace.seed + 1000, workspace.raw(_TARGET)
        write_phantom_dataset(raw, n_training=_N_LABELLED, n_test=_N_UNSEEN, seed=seed, contrast="arterial")
    write_json([name for name in PHANTOM_LABELS if name != "background"], structures)
    options = f"-d 1 --name {_SOURCE[11:]} --task {structures} -np 2"
    workspace.run(f"stunet import totalsegmentator {source} {options}")
    workspace.run("stunet labels check -d 1 -np 2")
    workspace.preprocess(_SOURCE, _TARGET)
    # At the higher rate of the other trainings, some seeds learn the smaller structures late.
    more = {**_SMALL_STRUCTURES, "initial_lr": 0.015, "keep_every": -(-epochs // 3)}
    settings = workspace.settings(_SOURCE, epochs, **more)
    of_target = workspace.settings(_TARGET, min(epochs, _EPOCHS_ON_TARGET), **_SMALL_STRUCTURES)
    of_target += " head=fresh"  # or what drawn heads cost would pass for what pre-training is worth
    workspace.run(workspace.planning(_SOURCE, _PRETRAINED, settings), workspace.planning(_TARGET, _SCRATCH, of_target))
    workspace.run(workspace.training(_SOURCE, _PRETRAINED, _PRETRAINER), epochs=epochs)


def _rank(workspace: Workspace) -> dict[str, Any]:
    """Rank the checkpoints of the pre-training for the target, and return ``ranking.json``."""
    cases = [f"phantom_{case:03d}" for case in range(_N_LABELLED)]
    split = [{"train": cases[:_N_FEW], "val": cases[_N_FEW:]}]
    write_json(split, workspace.preprocessed(_TARGET) / "splits_final.json")
    fold = workspace.model(_SOURCE, _PRETRAINER, _PRETRAINED) / "fold_0"
    workspace.define("PRETRAINED", str(fold.relative_to(workspace.root)))
    checkpoints = [*sorted(fold.glob("checkpoint_epoch_*.pth")), fold / "checkpoint_final.pth"]
    output = workspace.root / "ranking"
    options = f"-f 0 -device {workspace.device} --seed {workspace.seed} -o {output}"
    options += " --checkpoints " + " ".join(map(str, checkpoints))
    workspace.run(f"stunet rank -d 2 {options}")
    ranking = read_json(output / "ranking.json")
    for candidate in ranking["candidates"]:
        stdout.print(f"  LogME {candidate['scores']['logme']:7.3f}  {candidate['name']}")
    stdout.print(f"  {ranking['verdict']}")
    return ranking


def _train_on_target(workspace: Workspace, winner: Path, epochs: int) -> None:
    """Fine-tune the checkpoint, and train from scratch beside it."""
    settings = workspace.settings(_TARGET, epochs, **_SMALL_STRUCTURES)
    workspace.define("SETTINGS", settings)
    options = f"-c {workspace.configuration} -f 0 --from {winner} --name {_FINE_TUNED} -device {workspace.device}"
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


def _n_held_out(raw: RawDataset) -> int:
    return min(4, max(1, len(raw.cases) // 5))


def _demonstrate_own_data(workspace: Workspace, raw: RawDataset, epochs: int) -> None:
    """Train on a dataset in nnU-Net's raw layout, hold cases out, predict and score them."""
    from stunet.datasets.raw import hold_out, read_image

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
    workspace.run(workspace.planning(dataset, plans, workspace.settings(dataset, epochs)))
    workspace.run(workspace.training(dataset, plans, _PRETRAINER), epochs=epochs)
    predictions = workspace.root / "predictions"
    _print_dice({"mean Dice": workspace.predict(dataset, {plans: predictions}, _PRETRAINER)[plans]})
    print_line(f"Figure:       {_draw_cases(workspace, dataset, {'prediction': predictions})}")
    print_line(f"Predictions:  {predictions}")


def _print_dice(columns: Mapping[str, Sequence[StructureDice]]) -> None:
    """Show Dice by structure, of models beside each other; of one model alone, its lowest and highest too."""
    from stunet.reports.figures import mean_dice

    alone = len(columns) == 1
    spread = ("lowest", "highest", "cases") if alone else ()
    table: list[list[object]] = []
    for rows in zip(*columns.values(), strict=True):
        cells = [f"{rows[0].lowest:.3f}", f"{rows[0].highest:.3f}", rows[0].n_cases] if alone else []
        table.append([rows[0].name, *(f"{row.mean:.3f}" for row in rows), *cells])
    table += [], ["mean", *(f"{mean_dice(rows):.3f}" for rows in columns.values()), *("" for _ in spread)]
    numbers = [*columns, *spread]
    print_table(table, "structure", *numbers, title="\nUnseen cases", numbers=numbers)


def _draw_cases(workspace: Workspace, dataset: str, predictions: Mapping[str, Path]) -> Path:
    """Draw three test cases with truth and predictions side by side."""
    from stunet.datasets.raw import plane_names, read_image
    from stunet.labels.labels import Labels
    from stunet.reports.figures import side_by_side

    raw = workspace.raw(dataset)
    description = read_json(raw / "dataset.json")
    ending, path = description["file_ending"], workspace.root / "demo.png"
    labels = Labels(description)
    cases: list[Any] = []
    for truth in sorted((raw / "labelsTs").glob(f"*{ending}"))[:3]:
        name = truth.name.removesuffix(ending)
        image, properties = read_image(raw / "imagesTs" / f"{name}_0000{ending}")
        predicted = {title: read_image(folder / truth.name)[0] for title, folder in predictions.items()}
        cases.append((name, image, {"truth": labels.as_predicted(read_image(truth)[0]), **predicted}))
    plane = plane_names(properties)[0]
    side_by_side(cases, labels.predicted, path, spacing=properties["spacing"], plane_name=plane)
    return path


@dataclass
class Workspace:
    """One output folder, and the commands that are run in it."""

    root: Path  # must not exist, or be empty
    network: str  # the options of `stunet plan` that choose the network
    device: str
    seed: int  # of all trainings
    # Of PyTorch in trainings; all cores where it is None. A small network is not faster with more, and its figures then
    # do not depend on the number of cores.
    threads: int | None = None
    configuration: str = "3d_fullres"  # that both are planned and trained with
    variables: dict[str, str] = field(default_factory=dict)  # long arguments by the shell variables that show them
    commands: list[tuple[str, float]] = field(default_factory=list)  # as a user would type them, and their seconds

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UsageError(f"the output folder {self.root} is in use: remove it, or choose another one with -o")
        for folder in _FOLDERS:
            (self.root / folder).mkdir(parents=True)
        self.log = self.root / "output.log"  # whole output of all commands

    @property
    def exports(self) -> list[str]:
        """Lines that make the commands work in a shell of the user's."""
        return [
            f"cd {shlex.quote(str(self.root))}",
            *(f"export {name}=$PWD/{name}" for name in _FOLDERS),
            "export nnUNet_def_n_proc=2 nnUNet_compile=f" + (f" OMP_NUM_THREADS={n}" if (n := self.threads) else ""),
            *(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()),
        ]

    def raw(self, dataset: str) -> Path:
        """Return a dataset's folder in ``nnUNet_raw``."""
        return self.root / "nnUNet_raw" / dataset

    def preprocessed(self, dataset: str) -> Path:
        """Return a dataset's folder in ``nnUNet_preprocessed``."""
        return self.root / "nnUNet_preprocessed" / dataset

    def model(self, dataset: str, trainer: str, plans: str) -> Path:
        """Return the folder of a trained model."""
        return self.root / "nnUNet_results" / dataset / f"{trainer}__{plans}__{self.configuration}"

    def print_exports(self) -> None:
        """Show what makes the commands that follow work in a shell of the user's."""
        stdout.print()
        for line in self.exports:
            print_line(f"$ {line}", style="bold")

    def define(self, name: str, value: str) -> None:
        """Set a shell variable, for the commands that follow."""
        self.variables[name] = value
        print_line(f"\n$ {name}={shlex.quote(value)}", style="bold")

    def preprocess(self, *datasets: str) -> None:
        """Plan and preprocess datasets with nnU-Net."""
        numbers = " ".join(str(int(dataset[7:10])) for dataset in datasets)
        self.run(f"nnUNetv2_plan_and_preprocess -d {numbers} -c {self.configuration} -npfp 1 -np 1")

    def planning(self, dataset: str, name: str, settings: str) -> str:
        """Return the command that writes plans with the network and the settings."""
        options = f"-d {int(dataset[7:10])} -c {self.configuration} {self.network} --name {name}"
        return f"stunet plan {options} --set {settings}"

    def training(self, dataset: str, plans: str, trainer: str) -> str:
        """Return the command that trains on fold 0, with all random numbers from the seed."""
        options = f"-p {plans} -tr {trainer} -device {self.device} --seed {self.seed}"
        return f"stunet train {int(dataset[7:10])} {self.configuration} 0 {options}"

    def predict(self, dataset: str, folders: Mapping[str, Path], trainer: str) -> dict[str, list[StructureDice]]:
        """Predict a dataset's test cases into folders by the plans of the model, and return the Dice of each."""
        from stunet.reports.figures import read_dice

        raw = self.raw(dataset)
        options = f"-d {int(dataset[7:10])} -c {self.configuration} -f 0 -tr {trainer} -device {self.device}"
        options += f" -npp 0 -nps 0 -i {raw}/imagesTs"
        for plans, folder in folders.items():  # not at once, as nnU-Net gives each as many threads as there are cores
            self.run(f"nnUNetv2_predict {options} -o {folder} -p {plans}")
        models = [self.model(dataset, trainer, plans) for plans in folders]
        self.run(
            *(
                f"nnUNetv2_evaluate_folder {raw}/labelsTs {folder} -np 1 "
                f"-djfile {model}/dataset.json -pfile {model}/plans.json"
                for model, folder in zip(models, folders.values(), strict=True)
            )
        )
        labels = read_json(raw / "dataset.json")["labels"]
        return {plans: read_dice(folder / "summary.json", labels) for plans, folder in folders.items()}

    def settings(self, dataset: str, epochs: int, **more: float) -> str:
        """Return the values of ``--set`` for a training this short, whether it starts from weights or from noise.

        Where nnU-Net's patch would take too long on a CPU, a smaller one is taken.
        """
        from stunet.network import total_stride
        from stunet.planning.plans import fit_strides, load_plans, resolve_configuration

        plans = load_plans(self.preprocessed(dataset) / "nnUNetPlans.json")
        configuration = resolve_configuration(plans, self.configuration)
        patch = list(configuration["patch_size"])
        settings = {
            "num_epochs": epochs,
            "num_iterations_per_epoch": _ITERATIONS_PER_EPOCH,
            "num_val_iterations_per_epoch": 2,
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
        return " ".join(f"{key}={value}" for key, value in (settings | more).items())

    def run(self, *lines: str, epochs: int | None = None) -> None:
        """Run console scripts of installed packages, such as ``nnUNetv2_train``, at once, each in a process of its own.

        They are shown as a user would type them, with epochs and progress while they run; their whole output goes to
        the log. Paths in the folder become relative, and have no spaces then.

        Raises:
            CommandError: There is no such script, or one ended with another status than 0.
        """
        started = time.monotonic()
        lines = tuple(line.replace(f"{self.root}{sep}", "") for line in lines)
        shown = list(lines)
        for name, value in self.variables.items():
            shown = [line.replace(value, f"${name}") for line in shown]
        stdout.print()
        for line in shown:
            print_line(f"$ {line}", style="bold")
        # Of several commands, what they print is marked with the second word, as that of stunet finetune.
        marks = [f"{line.split()[1]}: " if len(lines) > 1 else "" for line in lines]
        columns = (BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        # The bars have a thread of their own: they move, and the clock runs, while the commands print nothing.
        bars = Progress(*columns, console=stdout, transient=True, disable=not stdout.is_terminal)
        processes: list[subprocess.Popen[str]] = []
        with bars, ThreadPoolExecutor(len(lines)) as pool:
            try:
                running = []
                for line, mark in zip(lines, marks, strict=True):
                    processes.append(self._start(line))
                    running.append(pool.submit(self._follow, processes[-1], line, mark, bars, epochs))
                while wait(running, _HEARTBEAT).not_done:
                    if not stdout.is_terminal:
                        stdout.print(f"  … {time.monotonic() - started:.0f} s", style="dim")
                last_lines = [one.result() for one in running]
            except BaseException:
                for process in processes:
                    process.terminate()
                raise
        seconds = time.monotonic() - started
        for process, line, last in zip(processes, lines, last_lines, strict=True):
            if status := process.wait():
                end = "\n    ".join(last)
                raise CommandError(f"{line.split()[0]} failed with exit status {status}; see {self.log}:\n    {end}")
        stdout.print(f"  {'' if len(lines) == 1 else 'at once, '}done in {seconds:.0f} s", style="dim")
        self.commands += [(line, seconds) for line in shown]

    def _start(self, line: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in environ.items() if not name.startswith("nnUNet_")}
        kept |= {name: str(self.root / name) for name in _FOLDERS}
        # What is trained must not depend on how many processes prepare batches.
        kept |= {"nnUNet_def_n_proc": "2", "nnUNet_compile": "f", "PYTHONUNBUFFERED": "1"}
        if self.threads is not None:
            kept["OMP_NUM_THREADS"] = str(self.threads)
        script, *arguments = line.split()
        # This environment's, activated or not.
        found = shutil.which(script, path=f"{sysconfig.get_path('scripts')}{pathsep}{environ.get('PATH', '')}")
        if found is None:
            raise CommandError(f"no command {script} in this Python environment: install nnunetv2 into it")
        return subprocess.Popen(  # noqa: S603 - a script of an installed package, no shell
            [found, *arguments],
            cwd=self.root,
            env=kept,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            bufsize=1,
        )

    def _follow(
        self, process: subprocess.Popen[str], line: str, mark: str, bars: Progress, epochs: int | None
    ) -> deque[str]:
        """Log what a process prints, show its progress, and return its last lines."""
        last_lines: deque[str] = deque(maxlen=15)
        epoch: dict[str, str] = {}
        task = bars.add_task("starting", total=None)
        with self.log.open("a", buffering=1, encoding="utf-8") as log:
            log.write(f"\n$ {line}\n")
            for printed in process.stdout or ():
                log.write(mark + printed)
                if text := printed.rstrip().rsplit("\r", 1)[-1]:
                    last_lines.append(text)
                    bars.update(task, description=text[: max(20, stdout.width - 40)])
                    if message := _epoch_message(text, epoch):
                        bars.update(task, total=epochs, completed=int(epoch["Epoch"]) + 1)
                        print_line(f"  {mark}{message}")
        return last_lines


def _epoch_message(line: str, epoch: dict[str, str]) -> str | None:
    """Condense what nnU-Net prints about an epoch, which ``epoch`` collects, to one line at its end."""
    if match := re.search(r": (Epoch|train_loss|Pseudo dice) (?!time)(.*)", line):
        epoch[match[1]] = match[2].strip()
        if match[1] == "Pseudo dice":
            dice = " ".join(f"{float(score):.2f}" for score in re.findall(r"(?<![\w.])(\d\.\d+|nan)", match[2]))
            loss = epoch["train_loss"]
            return f"epoch {epoch['Epoch']:>3}  loss {loss:>8}  Dice on validation patches {dice}"
    return None
