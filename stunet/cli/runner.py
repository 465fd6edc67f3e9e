"""Running other commands for the user, with their progress shown and their output kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stunet.cli.console import stdout
from stunet.errors import CommandError

__all__ = ["run_command"]

_HEARTBEAT = 15.0  # seconds between two signs of life where the terminal cannot show a bar


def run_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    shown: str | None = None,
    epochs: int | None = None,
) -> None:
    """Run a console script of an installed package, such as ``nnUNetv2_train``, as a process of its own.

    The command is shown as a user would type it, the script's epochs and progress while it runs; its whole output goes
    to the log.

    Args:
        command: The script's name and its arguments.
        environment: Variables to add to the process's environment, from which nnU-Net's own are taken out.
        folder: Where it runs.
        log: File that the output is appended to.
        shown: The command line as the user would type it, where that is shorter.
        epochs: Epochs of a training, for the progress bar.

    Raises:
        CommandError: There is no such script, or it ended with another status than 0.
    """
    line = shown or shlex.join(command)
    stdout.print(f"\n$ {line}", style="bold", highlight=False, markup=False, soft_wrap=True)
    started = time.monotonic()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    process = subprocess.Popen(  # noqa: S603 - a script of an installed package, no shell
        [sys.executable, "-c", _launcher(command[0]), *command[1:]],
        cwd=folder,
        env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        bufsize=1,
    )
    last_lines: deque[str] = deque(maxlen=15)
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(command)}\n")
            _follow(process, file, last_lines, started, epochs)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        raise CommandError(
            f"{command[0]} failed",
            got=f"exit status {process.returncode}; its last lines:\n    " + "\n    ".join(last_lines),
            expected="exit status 0",
            remedy=f"See {log} for all of its output.",
        )
    stdout.print(f"  done in {time.monotonic() - started:.0f} s", style="dim", highlight=False)


def _launcher(script: str) -> str:
    """Python code that runs a console script, wherever the environment keeps its executables."""
    found = list(entry_points(group="console_scripts", name=script))
    if not found:
        raise CommandError(
            "missing command",
            got=script,
            expected="a command of this Python environment",
            remedy="Install nnunetv2 into this environment.",
        )
    module, function = found[0].value.split(":")
    # Spawned workers do not import the code given to -c again, so it needs no guard.
    # -c puts the working folder on the path, where a folder of the package's name would be imported instead.
    prepare = f"import sys; sys.path[:] = [p for p in sys.path if p]; sys.argv[0] = {script!r}"
    return f"{prepare}; from {module} import {function}; sys.exit({function}())"


def _follow(
    process: subprocess.Popen[str], file: TextIO, last_lines: deque[str], started: float, epochs: int | None
) -> None:
    assert process.stdout is not None
    lines = _EpochLines()
    columns = (BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    # The bar has a thread of its own: it moves, and the clock runs, while the command prints nothing.
    with (
        Progress(*columns, console=stdout, transient=True, disable=not stdout.is_terminal) as progress,
        _Heartbeat(started) as heartbeat,
    ):
        task = progress.add_task("starting", total=None)
        for line in process.stdout:
            file.write(line)
            text = line.rstrip().rsplit("\r", 1)[-1]
            if not text:
                continue
            last_lines.append(text)
            progress.update(task, description=text[: max(20, stdout.width - 40)])
            if (message := lines.read(text)) is not None:
                progress.update(task, total=epochs, completed=lines.finished)
                stdout.print(f"  {message}", highlight=False)
                heartbeat.postpone()


class _Heartbeat:
    """Prints the time now and then where nothing else was printed and the terminal cannot show a spinner."""

    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self._finished = Event()

    def postpone(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> _Heartbeat:
        if not stdout.is_terminal:
            Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()

    def _beat(self) -> None:
        while not self._finished.wait(1.0):
            if time.monotonic() - self._last >= _HEARTBEAT:
                self.postpone()
                stdout.print(f"  … {time.monotonic() - self._started:.0f} s", style="dim", highlight=False)


class _EpochLines:
    """Condenses what nnU-Net prints about an epoch to one line."""

    def __init__(self) -> None:
        self._epoch = self._loss = ""
        self.finished = 0

    def read(self, line: str) -> str | None:
        if match := re.search(r": Epoch (\d+)\s*$", line):
            self._epoch = match[1]
        elif match := re.search(r": train_loss (\S+)", line):
            self._loss = match[1]
        elif match := re.search(r": Pseudo dice (.*)", line):
            dice = " ".join(f"{float(score):.2f}" for score in re.findall(r"(?<![\w.])(\d\.\d+|nan)", match[1]))
            self.finished = int(self._epoch) + 1
            return f"epoch {self._epoch:>3}  loss {self._loss:>8}  Dice on validation patches {dice}"
        return None
