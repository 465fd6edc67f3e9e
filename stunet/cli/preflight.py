"""What ``plan``, ``labels check``, ``train``, ``finetune`` and ``rank`` check before they start to work."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

from stunet import environment
from stunet.cli.console import human_bytes
from stunet.cli.env import trainers_folder
from stunet.cli.options import choose_device
from stunet.errors import DatasetError, LabelError, UsageError, reading
from stunet.files import read_json
from stunet.sizes import SIZES, TRAINERS


def preflight(
    dataset: str,
    *,
    plans: str | None = None,
    configuration: str | None = None,
    trainer: str | None = None,
    device: str | None = None,
    n_devices: int = 1,
    writes: Path | None = None,
    seconds: float = 5.0,
) -> str:
    """Check all that would stop a command later, and the cheap things first: PyTorch is imported for the last ones.

    Plans must be there where a configuration, which must be preprocessed with them, is given. For ``seconds``, label
    maps are searched for values that ``dataset.json`` does not declare: the same ones every time where not all fit in;
    ``stunet labels check`` looks at all of them.

    Returns:
        The dataset's full name.

    Raises:
        STUNetError: What is wrong, what would be right, what to do.
    """
    name = environment.find_dataset(dataset)
    path = None if plans is None else environment.find_plans(name, plans)
    if path is not None and configuration is not None:
        environment.require_plans(path)
    if trainer is not None:
        _check_trainer(trainer)
    # What is trained on, before what it was made from.
    variables = ("nnUNet_raw", "nnUNet_preprocessed")[:: -1 if configuration else 1]
    places = [Path(os.environ.get(variable) or os.devnull) / name / "dataset.json" for variable in variables]
    for described in filter(Path.is_file, places):
        with reading(described, "a description that cannot be read", DatasetError, "write it again"):
            content = read_json(described)
        if path is not None and path.is_file():
            _check_plans(path, content, name, configuration)
        _check_label_maps(described.parent, content, seconds)
        break
    disk = 10**7
    if plans is not None and configuration is not None:
        from stunet.planning import open_preprocessed

        found = open_preprocessed(dataset, plans, configuration)
        found.check_origin()
        disk = _checkpoint_bytes(found.configuration, trainer) if trainer else disk
    if device is not None and choose_device(device) == "cuda" and n_devices > 1:
        import torch

        if (there := torch.cuda.device_count()) < n_devices:
            raise UsageError(f"-num_gpus {n_devices}, but there are {there} CUDA devices: ask for fewer")
    if writes is not None:
        _check_disk(writes, disk)
    return name


def _check_trainer(name: str) -> None:
    """Look for the name in the files that nnU-Net would import one after the other, which takes seconds."""
    spec = importlib.util.find_spec("nnunetv2")
    stock = [f"{place}/training/nnUNetTrainer" for place in (spec and spec.submodule_search_locations) or []]
    external = (os.environ.get("nnUNet_extTrainer") or str(trainers_folder())).split(os.pathsep)
    files = [file for folder in (*stock, *filter(None, external)) for file in Path(folder).rglob("*.py")]
    source = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    known = {*re.findall(r"^class (\w+)\(", source, re.MULTILINE)}
    known |= {*TRAINERS} if str(trainers_folder()) in external else set()
    if name not in known and not re.search(rf"\b{re.escape(name)}\b", source):
        places, hint = ", ".join(external), environment.did_you_mean(name, sorted(known))
        raise UsageError(f"unknown trainer {name}: -tr names one of nnU-Net's or of {places}. {hint}")


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
        raise DatasetError(
            f"another number of channels: {got}, but {n_planned} in {path}: plan and preprocess the dataset again"
        )


def _check_label_maps(folder: Path, content: dict[str, Any], seconds: float) -> None:
    from stunet.labels.labels import Labels
    from stunet.volumes import count_labels

    declared = Labels(content, folder / "dataset.json").check()
    if int(os.environ.get("RANK") or 0) > 0:  # the first process of a training looks for all
        return
    copies, listed = folder / "gt_segmentations", content.get("dataset")
    files = sorted((copies if copies.is_dir() else folder / "labelsTr").glob(f"*{content.get('file_ending', '')}"))
    if isinstance(listed, dict) and not copies.is_dir():
        files = [folder / str(case.get("label")) for _, case in sorted(listed.items()) if isinstance(case, dict)]
    stop = time.monotonic() + seconds
    for file in random.Random(0).sample(files, len(files)):
        if time.monotonic() > stop:
            return
        if not file.is_file():
            continue  # reading the dataset says so
        if undeclared := sorted(set(count_labels(file)) - set(declared)):
            raise LabelError(
                f"dataset.json does not declare {', '.join(map(str, undeclared[:8]))} in {file}, only 0 to "
                f"{declared[-1]}: correct it, or declare them (see stunet labels check -d {int(folder.name[7:10])})"
            )


def _checkpoint_bytes(configuration: dict[str, Any], trainer: str) -> int:
    """Two checkpoints with momentum, which nnU-Net keeps at a time; of the size in the plans or the trainer's name."""
    import torch

    from stunet.network import build_stunet
    from stunet.planning import is_stunet, plans_size

    named, _ = TRAINERS.get(trainer, (None, {}))
    size = plans_size(configuration) if is_stunet(configuration) else SIZES[named or "small"]
    with torch.device("meta"):
        network = build_stunet(size, 1, 2, [[1] * len(configuration["patch_size"])] * 6)
    return 2 * 2 * 4 * sum(parameter.numel() for parameter in network.parameters())


def _check_disk(folder: Path, needed: int) -> None:
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise UsageError(f"{there} cannot be written: choose another folder, or change its permissions")
    if (free := shutil.disk_usage(there).free) < needed:
        need = f"{human_bytes(needed)} at least for checkpoints and results"
        raise UsageError(f"too little disk space: {human_bytes(free)} free in {there}, {need}: free some")
