"""Options that several commands share: their types, what they complete to in a shell, and their checks.

Imports no PyTorch, whose import takes seconds, so that a mistyped value is reported at once.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import typer

from stunet.cli.console import LIST_VALUES
from stunet.errors import UsageError
from stunet.settings import SETTINGS, Strategy
from stunet.sizes import N_STAGES, SIZES, STUNetSize, find_size, size_of

__all__ = [
    "Continue",
    "Device",
    "FoldName",
    "Settings",
    "StrategyOption",
    "choose_device",
    "choose_size",
    "complete_label_systems",
    "complete_presets",
    "complete_sizes",
    "complete_weights",
]


def complete_sizes() -> list[str]:
    """The published sizes."""
    return list(SIZES)


def complete_presets() -> list[str]:
    """Pre-training presets: the files that name no size."""
    names = (file.name.removesuffix(".json") for file in files("stunet.plans").iterdir() if file.name.endswith(".json"))
    return sorted(set(names) - set(SIZES))


def complete_weights() -> list[tuple[str, str]]:
    """Names of published weights."""
    from stunet.weights import load_registry

    return [(entry.name, entry.title or "") for entry in load_registry().values()]


def complete_label_systems() -> list[str]:
    """Names of published label systems."""
    from stunet.labels import list_label_systems

    return list_label_systems()


def complete_settings(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of settings, and after ``name=`` the values of those that have few."""
    split = [word for word in ctx.meta.get(LIST_VALUES, ())[-2:] if word in SETTINGS]  # bash splits words at "="
    if split:
        return [(value, "") for value in SETTINGS[split[0]].choices]
    name, separator, _ = incomplete.partition("=")
    names = [known for known in SETTINGS if (known == name if separator else known.startswith(name))]
    if len(names) == 1 and SETTINGS[names[0]].choices:
        return [(f"{names[0]}={value}", "") for value in SETTINGS[names[0]].choices]
    return [(f"{known}=", SETTINGS[known].help) for known in names]


Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"],
    typer.Option("-device", "--device", help="auto takes CUDA where there is a GPU, else MPS, else the CPU."),
]

FoldName = Literal["0", "1", "2", "3", "4", "all"]

Continue = Annotated[bool, typer.Option("--c", "--continue", help="Continue a training that was interrupted.")]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE ...",
        help="Training settings, several after one --set; `stunet plan --list-settings` shows them.",
        autocompletion=complete_settings,
    ),
]

StrategyOption = Annotated[
    Strategy | None, typer.Option("--strategy", help="With --from: what is fine-tuned, and how fast; full by default.")
]


def choose_device(device: str) -> str:
    """The device to compute on.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``; ``auto`` takes the first of CUDA, MPS and CPU that there is.

    Raises:
        UsageError: A device that PyTorch does not find.
    """
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, there in found.items() if there]
    if device == "auto":
        return available[0]
    if device not in available:
        raise UsageError(
            "a device that PyTorch does not find",
            got=device,
            expected=f"one of {', '.join(available)}",
            remedy="Choose another one with --device, or leave it out.",
        )
    return device


def choose_size(name: str | None, depth: str | None, width: int | None) -> STUNetSize:
    """The size that the options stand for.

    Args:
        name: Value of ``--size``; ``base`` where nothing is given.
        depth: Value of ``--depth``: six comma-separated numbers, or one for all stages; 1 by default.
        width: Value of ``--width``; that of ``base`` by default.

    Raises:
        ArchitectureError: An unknown name, or an impossible depth or width.
        UsageError: A name together with a depth or width.
    """
    if depth is None and width is None:
        return find_size(name or "base")
    if name is not None:
        typed = [f"--{option} {value}" for option, value in (("depth", depth), ("width", width)) if value is not None]
        raise UsageError(
            "a size with a name and another one of your own",
            got=" ".join([f"--size {name}", *typed]),
            expected="--size alone, or --depth and --width",
            remedy="Leave --size out for a size of your own.",
        )
    try:
        blocks = [int(n) for n in (depth or "1").split(",")]
    except ValueError:
        blocks = []
    if len(blocks) == 1:
        blocks *= N_STAGES
    size = STUNetSize("custom", tuple(blocks), find_size("base").width if width is None else width)
    return size_of(size.features, size.depth)
