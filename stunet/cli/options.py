"""Options that several commands share: their types, what they complete to in a shell, and their checks.

Imports no PyTorch, whose import takes seconds, so that a mistyped value is reported at once.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

from typer import Context, Option

from stunet.cli.console import LIST_VALUES
from stunet.errors import UsageError
from stunet.settings import SETTINGS, Strategy
from stunet.sizes import N_STAGES, SIZES, STUNetSize, find_size, size_of


def complete_presets() -> list[str]:
    """List the pre-training presets: the files that name no size."""
    names = (file.name.removesuffix(".json") for file in files("stunet.plans").iterdir() if file.name.endswith(".json"))
    return sorted(set(names) - set(SIZES))


def complete_weights() -> list[tuple[str, str]]:
    """List the published weights, each with its title."""
    from stunet.weights.published import load_registry

    return [(entry.name, entry.title or "") for entry in load_registry().values()]


def complete_label_systems() -> list[str]:
    """List the published label systems."""
    from stunet.labels.comparisons import list_label_systems

    return list_label_systems()


def _complete_settings(ctx: Context, incomplete: str) -> list[tuple[str, str]]:
    """List the settings, and after ``name=`` the values of those that have few."""
    for word in ctx.meta.get(LIST_VALUES, ())[-2:]:  # bash splits words at "="
        if word in SETTINGS:
            return [(value, "") for value in SETTINGS[word].choices]
    name, separator, _ = incomplete.partition("=")
    names = [known for known in SETTINGS if (known == name if separator else known.startswith(name))]
    if len(names) == 1 and (choices := SETTINGS[names[0]].choices):
        return [(f"{names[0]}={value}", "") for value in choices]
    return [(f"{known}=", SETTINGS[known].help) for known in names]


# The docstrings of the commands say what each option does.
FoldName = Literal["0", "1", "2", "3", "4", "all"]
DeviceName = Literal["auto", "cuda", "mps", "cpu"]
Positive = Annotated[int, Option(min=1)]
Processes = Annotated[int, Option("-np", "--np", min=1)]
Dataset = Annotated[str, Option("-d", "--dataset", help="Dataset id or name.")]
Plans = Annotated[str, Option("--plans", "-p", help="The plans to start from.")]
Size = Annotated[str | None, Option(autocompletion=lambda: list(SIZES))]
Seed = Annotated[int | None, Option(min=0)]
Continue = Annotated[bool, Option("--c", "--continue", help="Continue a training that was interrupted.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
Trust = Annotated[list[str] | None, Option(help="A network class of others' that may be imported. Repeatable.")]
_DEVICE_HELP = "auto takes CUDA where there is a GPU, else MPS, else the CPU."
Device = Annotated[DeviceName, Option("-device", "--device", help=_DEVICE_HELP)]
_SETTINGS_HELP = "Training settings, several after one --set; `stunet plan --list-settings` shows them."
Settings = Annotated[
    list[str] | None, Option("--set", metavar="NAME=VALUE ...", help=_SETTINGS_HELP, autocompletion=_complete_settings)
]
_STRATEGY_HELP = "With --from: what is fine-tuned, and how fast; full by default."
StrategyOption = Annotated[Strategy | None, Option("--strategy", help=_STRATEGY_HELP)]


def split_names(*texts: str) -> list[str]:
    """Return the names in texts with commas between."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def choose_device(device: str) -> DeviceName:
    """Return the device to compute on; ``auto`` takes the first of CUDA, MPS and CPU that there is.

    Raises:
        UsageError: A device that PyTorch does not find.
    """
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available: list[DeviceName] = [name for name in ("cuda", "mps", "cpu") if found[name]]
    for name in available:
        if device in ("auto", name):
            return name
    raise UsageError(f"--device {device} is a device that PyTorch does not find: choose {' or '.join(available)}")


def choose_size(name: str | None, depth: str | None, width: int | None) -> STUNetSize:
    """Return the size that ``--size``, or else ``--depth`` and ``--width``, stand for; ``base`` by default.

    A depth is six comma-separated numbers, or one for all stages.

    Raises:
        ArchitectureError: An unknown name, or an impossible depth or width.
        UsageError: A name together with a depth or width.
    """
    if depth is None and width is None:
        return find_size(name or "base")
    if name is not None:
        own = f" --depth {depth}" * (depth is not None) + f" --width {width}" * (width is not None)
        raise UsageError(f"--size {name}{own}: give a published size, or leave --size out for a size of your own")
    try:
        blocks = [int(n) for n in (depth or "1").split(",")]
    except ValueError:
        blocks = []
    if len(blocks) == 1:
        blocks *= N_STAGES
    size = STUNetSize("custom", tuple(blocks), find_size("base").width if width is None else width)
    return size_of(size.features, size.depth)
