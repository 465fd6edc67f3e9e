"""``stunet env``: the shell line that lets nnU-Net find the trainers."""

import os
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Literal

import typer

_VARIABLE = "nnUNet_extTrainer"


def env(shell: Literal["bash", "fish", "powershell"] | None = None) -> None:
    """Print the line that makes nnUNetv2_train find STUNetTrainer: eval "$(stunet env)".

    Folders that nnUNet_extTrainer already lists stay in it.

    Options:
        shell: Syntax to print; bash, which zsh shares, or powershell on Windows by default.
    """
    listed = filter(None, os.environ.get(_VARIABLE, "").split(os.pathsep))
    value = os.pathsep.join(dict.fromkeys([str(trainers_folder()), *listed]))
    # $SHELL is the login shell, not the one that runs a script; and fish understands bash's line too.
    shell = shell or ("powershell" if os.name == "nt" else "bash")
    if shell == "bash":
        typer.echo(f"export {_VARIABLE}={shlex.quote(value)}")
    elif shell == "fish":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        typer.echo(f"set -gx {_VARIABLE} '{escaped}'")
    else:
        doubled = value.replace("'", "''")
        typer.echo(f"$env:{_VARIABLE} = '{doubled}'")


def trainers_folder() -> Path:
    """Return the folder with the trainers, in an editable install and in a wheel alike."""
    return Path(str(files("stunet.trainers"))).resolve()
