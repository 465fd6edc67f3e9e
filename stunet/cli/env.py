"""``stunet env``: the shell line that lets nnU-Net find the trainers."""

from __future__ import annotations

import importlib.util
import os
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Shell", "env", "trainers_folder"]

_VARIABLE = "nnUNet_extTrainer"


class Shell(str, Enum):
    """Shells whose syntax ``stunet env`` knows."""

    bash = "bash"
    fish = "fish"
    powershell = "powershell"


def env(
    shell: Annotated[
        Shell | None, typer.Option(help="Syntax to print; bash, which zsh shares, or powershell on Windows by default.")
    ] = None,
) -> None:
    """Print the line that makes nnUNetv2_train find STUNetTrainer: eval "$(stunet env)".

    Folders that nnUNet_extTrainer already lists stay in it.
    """
    folders = [folder for folder in os.environ.get(_VARIABLE, "").split(os.pathsep) if folder]
    ours = str(trainers_folder())
    value = os.pathsep.join([ours, *(folder for folder in folders if folder != ours)])
    typer.echo(_LINES[shell or _default_shell()](value))


def trainers_folder() -> Path:
    """The folder with the trainers, in an editable install and in a wheel alike."""
    spec = importlib.util.find_spec("stunet.trainers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).resolve().parent


def _default_shell() -> Shell:
    # $SHELL is the login shell, not the one that runs a script; and fish understands bash's line too.
    return Shell.powershell if os.name == "nt" else Shell.bash


def _powershell_quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _fish_quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


_LINES = {
    Shell.bash: lambda value: f"export {_VARIABLE}={shlex.quote(value)}",
    Shell.fish: lambda value: f"set -gx {_VARIABLE} {_fish_quote(value)}",
    Shell.powershell: lambda value: f"$env:{_VARIABLE} = {_powershell_quote(value)}",
}
