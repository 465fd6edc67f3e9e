"""Options that several commands share: their types, what they complete to in a shell, and what is checked of them.

Imports no PyTorch, whose import takes seconds, so that a mistyped value is reported at once.
"""

import os
import random
import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Context, Option

from stunet import environment
from stunet.cli.console import LIST_VALUES, human_bytes
from stunet.errors import DatasetError, LabelError, UsageError, reading
from stunet.files import read_json
from stunet.settings import SETTINGS, Strategy
from stunet.sizes import N_STAGES, SIZES, TRAINERS, STUNetSize, find_size, size_of
from stunet.weights.published import load_registry


def complete_presets() -> list[str]:
    """List the pre-training presets: the files that name no size."""
    names = (file.name.removesuffix(".json") for file in files("stunet.plans").iterdir() if file.name.endswith(".json"))
    return sorted(set(names) - set(SIZES))


def complete_weights() -> list[tuple[str, str]]:
    """List the published weights, each with its title."""
    return [(entry.name, entry.title or "") for entry in load_registry().values()]


def complete_label_systems() -> list[str]:
    """List the label systems of datasets."""
    from stunet.labels.mappings import list_label_systems

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


def _read_fold(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise BadParameter(f"{text!r} is neither the number of a fold nor all")
    return text


# The docstrings of the commands say what each option does.
FOLD: dict[str, Any] = {
    "parser": _read_fold, "metavar": "FOLD", "autocompletion": lambda: ["0", "1", "2", "3", "4", "all"]
}  # fmt: skip
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


def choose_device(device: str, n_devices: int = 1) -> DeviceName:
    """Return the device to compute on; ``auto`` takes the first of CUDA, MPS and CPU that there is.

    Raises:
        UsageError: A device that PyTorch does not find, or fewer CUDA devices than wanted.
    """
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available: list[DeviceName] = [name for name in ("cuda", "mps", "cpu") if found[name]]
    chosen = next((name for name in available if device in ("auto", name)), None)
    if chosen is None:
        raise UsageError(f"--device {device} is a device that PyTorch does not find: choose {' or '.join(available)}")
    if chosen == "cuda" and n_devices > 1 and (there := torch.cuda.device_count()) < n_devices:
        raise UsageError(f"-num_gpus {n_devices}, but there are {there} CUDA devices: ask for fewer")
    return chosen


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
    blocks = [int(n) if n.strip().isdecimal() else 0 for n in (depth or "1").split(",")]
    if len(blocks) == 1:
        blocks *= N_STAGES
    size = STUNetSize("custom", tuple(blocks), find_size("base").width if width is None else width)
    return size_of(size.features, size.depth)


# What is checked before work starts ----------------------------------------------------------------------------------


def preflight(dataset: str, plans: str, configuration: str | None = None) -> str:
    """Check of a dataset's files what would stop a command later; without PyTorch, and the cheap things first.

    Plans must be there where a configuration, which must be preprocessed with them, is given. For 5 seconds, label
    maps are searched for values that ``dataset.json`` does not declare: the same ones every time where not all fit in;
    ``stunet labels check`` looks at all of them.

    Returns:
        The dataset's full name.
    """
    name = environment.find_dataset(dataset)
    path = environment.find_plans(name, plans)
    if configuration is not None:
        environment.require_plans(path)
    # What is trained on, before what it was made from.
    variables = ("nnUNet_raw", "nnUNet_preprocessed")[:: -1 if configuration else 1]
    places = [Path(os.environ.get(variable) or os.devnull) / name / "dataset.json" for variable in variables]
    if described := next(filter(Path.is_file, places), None):
        with reading(described, "a description that cannot be read", DatasetError, "write it again"):
            content = read_json(described)
        if path.is_file():
            _check_plans(path, content, name, configuration)
        _check_label_maps(described.parent, content)
    return name


def check_training(dataset: str, plans: str, configuration: str, trainer: str) -> None:
    """Check that the preprocessed data are of these plans, and that there is room for the checkpoints.

    nnU-Net keeps two at a time, with momentum; their size is that of the network in the plans or the trainer's name.
    """
    from stunet.planning.plans import is_stunet, plans_size
    from stunet.planning.preprocessed import open_preprocessed
    from stunet.weights.convert import Architecture

    planned = open_preprocessed(dataset, plans, configuration).configuration
    named, _ = TRAINERS.get(trainer, (None, {}))
    size = plans_size(planned) if is_stunet(planned) else SIZES[named or "small"]
    network = Architecture(size, 1, 2, len(planned["patch_size"])).build_on_meta()
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    check_disk(environment.nnunet_folder("nnUNet_results"), 2 * 2 * 4 * n_parameters)


def _check_plans(path: Path, content: dict[str, Any], name: str, configuration: str | None) -> None:
    try:
        plans = read_json(path)
        n_planned, _ = len(plans["foreground_intensity_properties_per_channel"]), dict(plans["configurations"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # no plans: reading them says so
    if configuration is not None:
        environment.require_configuration(plans, configuration)
        environment.preprocessed_folder(name, plans, configuration)
    names = content.get("channel_names") or content.get("modality") or {}
    if names and len(names) != n_planned:
        got = f"{len(names)} in dataset.json ({', '.join(map(str, names.values()))})"
        raise DatasetError(f"channels differ: {got}, but {n_planned} in {path}: plan and preprocess the dataset again")


def _check_label_maps(folder: Path, content: dict[str, Any]) -> None:
    from stunet.labels.labels import Labels
    from stunet.volumes import count_labels

    declared = Labels(content, folder / "dataset.json").check()
    if int(os.environ.get("RANK") or 0) > 0:  # the first process of a training looks for all
        return
    copies, listed = folder / "gt_segmentations", content.get("dataset")
    maps = sorted((copies if copies.is_dir() else folder / "labelsTr").glob(f"*{content.get('file_ending', '')}"))
    if isinstance(listed, dict) and not copies.is_dir():
        maps = [folder / str(case.get("label")) for _, case in sorted(listed.items()) if isinstance(case, dict)]
    stop = time.monotonic() + 5
    for file in filter(Path.is_file, random.Random(0).sample(maps, len(maps))):  # reading the dataset says what is not
        if time.monotonic() > stop:
            return
        if undeclared := sorted(set(count_labels(file)) - set(declared)):
            raise LabelError(
                f"dataset.json does not declare {', '.join(map(str, undeclared[:8]))} in {file}, only 0 to "
                f"{declared[-1]}: correct it, or declare them (see stunet labels check -d {int(folder.name[7:10])})"
            )


def check_disk(folder: Path, needed: int = 10**7) -> None:
    """Check that files of so many bytes can be written there."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"{there} cannot be written: choose another folder, or change its permissions")
    if (free := shutil.disk_usage(there).free) < needed:
        need = f"{human_bytes(needed)} at least for checkpoints and results"
        raise UsageError(f"too little disk space: {human_bytes(free)} free in {there}, {need}: free some")
