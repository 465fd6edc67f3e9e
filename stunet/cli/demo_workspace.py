"""Where a demo works: nnU-Net's three folders under one output folder, and the commands it runs there."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

__all__ = ["DoneCommand", "Workspace", "batch_settings"]

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Patches larger than this take too long on a CPU; voxels. In the same time, more steps on small ones learn more.
_MAX_PATCH_ON_CPU = 16 * 32 * 32


@dataclass(frozen=True)
class DoneCommand:
    """A command that was run.

    Attributes:
        line: As a user would type it.
        seconds: That it took.
    """

    line: str
    seconds: float


@dataclass
class Workspace:
    """One output folder.

    Attributes:
        root: The folder.
        variables: Long arguments by the name of a shell variable, under which commands show them.
        commands: What was run so far.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    commands: list[DoneCommand] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path) -> Workspace:
        """Make the folders.

        Raises:
            UsageError: The folder holds something already.
        """
        from stunet.errors import UsageError

        root = root.resolve()
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UsageError(
                "the output folder is in use",
                got=root,
                expected="a folder that does not exist, or an empty one",
                remedy="Remove it, or choose another one with -o.",
            )
        for folder in _FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        return cls(root)

    @property
    def log(self) -> Path:
        """Whole output of all commands."""
        return self.root / "output.log"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the commands need; their training must not depend on how many processes prepare batches."""
        return {**{name: str(self.root / name) for name in _FOLDERS}, "nnUNet_def_n_proc": "2", "nnUNet_compile": "f"}

    @property
    def exports(self) -> list[str]:
        """Lines that make the commands work in a shell of the user's."""
        return [
            f"cd {shlex.quote(str(self.root))}",
            *(f"export {name}=$PWD/{name}" for name in _FOLDERS),
            "export nnUNet_def_n_proc=2 nnUNet_compile=f",
            *(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()),
        ]

    def raw(self, dataset: str) -> Path:
        """A dataset's folder in ``nnUNet_raw``."""
        return self.root / "nnUNet_raw" / dataset

    def preprocessed(self, dataset: str) -> Path:
        """A dataset's folder in ``nnUNet_preprocessed``."""
        return self.root / "nnUNet_preprocessed" / dataset

    def model(self, dataset: str, trainer: str, plans: str, configuration: str) -> Path:
        """The folder of a trained model."""
        return self.root / "nnUNet_results" / dataset / f"{trainer}__{plans}__{configuration}"

    def dataset_json(self, dataset: str) -> dict[str, Any]:
        """A dataset's description."""
        return cast("dict[str, Any]", json.loads((self.raw(dataset) / "dataset.json").read_text(encoding="utf-8")))

    def print_exports(self) -> None:
        """Show what makes the commands that follow work in a shell of the user's."""
        from stunet.cli.console import stdout

        stdout.print()
        for line in self.exports:
            stdout.print(f"$ {line}", style="bold", highlight=False, markup=False, soft_wrap=True)

    def define(self, name: str, value: str) -> None:
        """Set a shell variable, for the commands that follow."""
        from stunet.cli.console import stdout

        self.variables[name] = value
        stdout.print(f"\n$ {name}={shlex.quote(value)}", style="bold", highlight=False, markup=False, soft_wrap=True)

    def run(self, *command: str | Path, epochs: int | None = None) -> None:
        """Run a command of nnU-Net or of this package in the folder.

        Args:
            command: Its words; paths within the folder become relative.
            epochs: Epochs of a training.

        Raises:
            CommandError: It failed.
        """
        from stunet.cli.runner import run_command

        typed = [
            str(part.relative_to(self.root)) if isinstance(part, Path) and part.is_relative_to(self.root) else str(part)
            for part in command
        ]
        shown = shlex.join(typed)
        for name, value in self.variables.items():
            shown = shown.replace(value, f"${name}")
        started = time.monotonic()
        run_command(typed, environment=self.environment, folder=self.root, log=self.log, shown=shown, epochs=epochs)
        self.commands.append(DoneCommand(shown, time.monotonic() - started))


def batch_settings(workspace: Workspace, dataset: str, configuration_name: str, device: str) -> dict[str, Any]:
    """A batch, and where nnU-Net's patch would take too long on a CPU a smaller one."""
    import math

    from stunet.network import total_stride
    from stunet.planning import fit_strides, load_plans, resolve_configuration

    plans = load_plans(workspace.preprocessed(dataset) / "nnUNetPlans.json")
    configuration = resolve_configuration(plans, configuration_name)
    patch = list(configuration["patch_size"])
    if len(patch) == 2:
        return {"batch_size": min(8, configuration["batch_size"])}
    if device != "cpu" or math.prod(patch) <= _MAX_PATCH_ON_CPU:
        return {"batch_size": 2}
    step = total_stride(fit_strides(configuration["architecture"]["arch_kwargs"]["strides"]))
    while math.prod(patch) > _MAX_PATCH_ON_CPU and any(n > s for n, s in zip(patch, step, strict=True)):
        axis = max(range(len(patch)), key=lambda i: patch[i] / step[i])
        patch[axis] -= step[axis]
    return {"batch_size": 2, "patch_size": ",".join(map(str, patch))}
