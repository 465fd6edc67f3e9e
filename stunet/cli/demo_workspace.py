"""Where a demo works: nnU-Net's three folders under one output folder, and the commands it runs there."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from os import environ, sep
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stunet.cli.console import print_line, stdout
from stunet.errors import CommandError, UsageError
from stunet.files import read_json

if TYPE_CHECKING:
    from stunet.reports import StructureDice

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Patches larger than this take too long on a CPU; voxels. In the same time, more steps on small ones learn more.
_MAX_PATCH_ON_CPU = 16 * 32 * 32
ITERATIONS_PER_EPOCH = 40
_HEARTBEAT = 15.0  # seconds between two signs of life where the terminal cannot show a bar


@dataclass
class Workspace:
    """One output folder, and the commands that are run in it.

    Attributes:
        root: The folder; must not exist, or be empty.
        network: The options of ``stunet plan`` that choose the network.
        device: For the networks.
        seed: Of all trainings.
        threads: Of PyTorch in trainings; all cores where it is None. A small network is not faster with more, and its
            figures then do not depend on the number of cores.
        configuration: That both are planned and trained with.
        variables: Long arguments by the name of a shell variable, under which commands show them.
        commands: Each command that was run so far, as a user would type it, and the seconds that it took.
    """

    root: Path
    network: str
    device: str
    seed: int
    threads: int | None = None
    configuration: str = "3d_fullres"
    variables: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UsageError(f"the output folder {self.root} is in use: remove it, or choose another one with -o")
        for folder in _FOLDERS:
            (self.root / folder).mkdir(parents=True)

    @property
    def log(self) -> Path:
        """Whole output of all commands."""
        return self.root / "output.log"

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

    def dataset_json(self, dataset: str) -> dict[str, Any]:
        """Read a dataset's description."""
        return read_json(self.raw(dataset) / "dataset.json")

    def print_exports(self) -> None:
        """Show what makes the commands that follow work in a shell of the user's."""
        stdout.print()
        for line in self.exports:
            print_line(f"$ {line}", style="bold")

    def define(self, name: str, value: str) -> None:
        """Set a shell variable, for the commands that follow."""
        self.variables[name] = value
        print_line(f"\n$ {name}={shlex.quote(value)}", style="bold")

    def preprocess(self, dataset: str) -> None:
        """Plan and preprocess a dataset with nnU-Net."""
        self.run(f"nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])} -c {self.configuration} -npfp 1 -np 1")

    def plan(self, dataset: str, name: str, settings: str) -> None:
        """Write plans with the network and the settings."""
        options = f"-d {int(dataset[7:10])} -c {self.configuration} {self.network} --name {name}"
        self.run(f"stunet plan {options} --set {settings}")

    def training(self, dataset: str, plans: str, trainer: str) -> str:
        """Return the command that trains on fold 0, with all random numbers from the seed."""
        options = f"-p {plans} -tr {trainer} -device {self.device} --seed {self.seed}"
        return f"stunet train {int(dataset[7:10])} {self.configuration} 0 {options}"

    def predict(self, dataset: str, folders: Mapping[str, Path], trainer: str) -> dict[str, list[StructureDice]]:
        """Predict a dataset's test cases with models that were trained on it, and compare with their labels.

        Args:
            dataset: Name.
            folders: Where the predictions go, by the plans of the model.
            trainer: Of all models.

        Returns:
            Dice by the plans of the model.
        """
        from stunet.reports import read_dice

        raw, model = self.raw(dataset), partial(self.model, dataset, trainer)
        options = f"-d {int(dataset[7:10])} -c {self.configuration} -f 0 -tr {trainer} -device {self.device}"
        options += f" -npp 0 -nps 0 -i {raw}/imagesTs"
        for plans, folder in folders.items():  # not at once, as nnU-Net gives each as many threads as there are cores
            self.run(f"nnUNetv2_predict {options} -o {folder} -p {plans}")
        commands = (
            f"nnUNetv2_evaluate_folder {raw}/labelsTs {folder} -np 1 "
            f"-djfile {model(plans)}/dataset.json -pfile {model(plans)}/plans.json"
            for plans, folder in folders.items()
        )
        self.run(*commands)
        labels = self.dataset_json(dataset)["labels"]
        return {plans: read_dice(folder / "summary.json", labels) for plans, folder in folders.items()}

    def settings(self, dataset: str, epochs: int, **more: float) -> str:
        """Return the values of ``--set`` for a training this short, whether it starts from weights or from noise.

        Where nnU-Net's patch would take too long on a CPU, a smaller one is taken.
        """
        from stunet.network import total_stride
        from stunet.planning import fit_strides, load_plans, resolve_configuration

        plans = load_plans(self.preprocessed(dataset) / "nnUNetPlans.json")
        configuration = resolve_configuration(plans, self.configuration)
        patch = list(configuration["patch_size"])
        settings = {
            "num_epochs": epochs,
            "num_iterations_per_epoch": ITERATIONS_PER_EPOCH,
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
        processes: list[subprocess.Popen[str]] = []
        try:
            for line in lines:
                processes.append(self._start(line))
            last_lines = self._follow(processes, started, lines, epochs)
        except BaseException:
            for process in processes:
                process.terminate()
                process.wait()
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
        return subprocess.Popen(  # noqa: S603 - a script of an installed package, no shell
            [sys.executable, "-c", _launcher(script), *arguments],
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
        self, processes: Sequence[subprocess.Popen[str]], started: float, lines: Sequence[str], epochs: int | None
    ) -> list[deque[str]]:
        """Log what processes print, show their progress, and return the last lines of each."""
        output: SimpleQueue[tuple[int, str | None]] = SimpleQueue()

        def read(index: int) -> None:
            for text in processes[index].stdout or ():
                output.put((index, text))
            output.put((index, None))

        for index in range(len(processes)):
            Thread(target=read, args=(index,), daemon=True).start()
        last_lines: list[deque[str]] = [deque(maxlen=15) for _ in processes]
        epoch: list[dict[str, str]] = [{} for _ in processes]
        # Of several commands, what they print is marked with the second word, as that of stunet finetune.
        marks = [f"{line.split()[1]}: " if len(processes) > 1 else "" for line in lines]
        n_running, said = len(processes), started
        columns = (BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        # The bars have a thread of their own: they move, and the clock runs, while the commands print nothing.
        bars = Progress(*columns, console=stdout, transient=True, disable=not stdout.is_terminal)
        with bars, self.log.open("a", encoding="utf-8") as log:
            log.write("".join(f"\n$ {line}\n" for line in lines))
            tasks = [bars.add_task("starting", total=None) for _ in processes]
            while n_running:
                if not stdout.is_terminal and time.monotonic() - said >= _HEARTBEAT:
                    said = time.monotonic()
                    stdout.print(f"  … {said - started:.0f} s", style="dim")
                try:
                    index, printed = output.get(timeout=1.0)
                except Empty:
                    continue
                if printed is None:
                    n_running -= 1
                    continue
                log.write(marks[index] + printed)
                text = printed.rstrip().rsplit("\r", 1)[-1]
                if not text:
                    continue
                last_lines[index].append(text)
                bars.update(tasks[index], description=text[: max(20, stdout.width - 40)])
                if message := _epoch_message(text, epoch[index]):
                    bars.update(tasks[index], total=epochs, completed=int(epoch[index]["Epoch"]) + 1)
                    print_line(f"  {marks[index]}{message}")
                    said = time.monotonic()
        return last_lines


def _launcher(script: str) -> str:
    """Write Python code that runs a console script, wherever the environment keeps its executables."""
    found = list(entry_points(group="console_scripts", name=script))
    if not found:
        raise CommandError(f"no command {script} in this Python environment: install nnunetv2 into it")
    module, function = found[0].value.split(":")
    # Spawned workers do not import the code given to -c again, so it needs no guard.
    # -c puts the working folder on the path, where a folder of the package's name would be imported instead.
    prepare = f"import sys; sys.path[:] = [p for p in sys.path if p]; sys.argv[0] = {script!r}"
    return f"{prepare}; from {module} import {function}; sys.exit({function}())"


def _epoch_message(line: str, epoch: dict[str, str]) -> str | None:
    """Condense what nnU-Net prints about an epoch, which ``epoch`` collects, to one line at its end."""
    if match := re.search(r": (Epoch|train_loss|Pseudo dice) (?!time)(.*)", line):
        epoch[match[1]] = match[2].strip()
        if match[1] == "Pseudo dice":
            dice = " ".join(f"{float(score):.2f}" for score in re.findall(r"(?<![\w.])(\d\.\d+|nan)", match[2]))
            loss = epoch["train_loss"]
            return f"epoch {epoch['Epoch']:>3}  loss {loss:>8}  Dice on validation patches {dice}"
    return None
