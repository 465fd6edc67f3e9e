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
#: Patches larger than this take too long on a CPU; voxels. For the same time, small ones learn faster: the cases in a
#: batch of four differ more than the places of one patch.
_MAX_PATCH_ON_CPU = 32**3


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
        commands: What was run so far.
    """

    root: Path
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
        """Variables that the commands need."""
        from stunet.cli.env import trainers_folder

        return {
            **{name: str(self.root / name) for name in _FOLDERS},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "2",
            "nnUNet_compile": "f",  # on CUDA, compiling would take longer than the training
        }

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
        for name, value in self.environment.items():
            stdout.print(f"$ export {name}={shlex.quote(value)}", style="bold", highlight=False, soft_wrap=True)

    def run(self, *command: str | Path) -> None:
        """Run a command of nnU-Net or of this package.

        Raises:
            CommandError: It failed.
        """
        from stunet.cli.runner import run_command

        typed = [str(part) for part in command]
        started = time.monotonic()
        run_command(typed, environment=self.environment, log=self.log)
        self.commands.append(DoneCommand(shlex.join(typed), time.monotonic() - started))


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
        return {"batch_size": 4}
    step = total_stride(fit_strides(configuration["architecture"]["arch_kwargs"]["strides"]))
    while math.prod(patch) > _MAX_PATCH_ON_CPU and any(n > s for n, s in zip(patch, step, strict=True)):
        axis = max(range(len(patch)), key=lambda i: patch[i] / step[i])
        patch[axis] -= step[axis]
    return {"batch_size": 4, "patch_size": str(patch).replace(" ", "")}
