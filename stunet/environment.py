"""nnU-Net's folders, datasets and plans, found without nnU-Net, whose import takes seconds."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stunet.errors import DatasetError, NnUNetPathError, PlansError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``Did you mean …? `` with the names that are like it, or nothing.

    >>> did_you_mean("small_ep4", ["small_ep4k", "huge"])
    'Did you mean small_ep4k? '
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, 3) or [k for k in known if k.casefold() == name.casefold()]
    return f"Did you mean {' or '.join(close)}? " if close else ""


def nnunet_folder(variable: str) -> Path:
    """Return the folder that one of nnU-Net's environment variables names."""
    value = os.environ.get(variable)
    if not value:
        raise NnUNetPathError(f"{variable} is not set: set it to a folder, export {variable}=/path/to/{variable}")
    if not Path(value).is_dir():
        raise NnUNetPathError(f"{variable} names no folder: create it (mkdir -p {value}), or set it to another one")
    return Path(value)


def find_dataset(dataset: str | int) -> str:
    """Return the full name of a dataset from its id, such as ``4``, or its name.

    Raises:
        DatasetError: Not known to nnU-Net, or known by several names.
        NnUNetPathError: Neither ``nnUNet_raw`` nor ``nnUNet_preprocessed`` is set.
    """
    folders = [Path(v) for v in map(os.environ.get, ("nnUNet_raw", "nnUNet_preprocessed")) if v]
    if not folders:
        nnunet_folder("nnUNet_preprocessed")

    def names_in(folders: list[Path]) -> set[str]:
        return {d.name for folder in folders for d in folder.glob("Dataset[0-9][0-9][0-9]_*") if d.is_dir()}

    known, text = sorted(names_in(folders)), str(dataset)
    # nnU-Net refuses an id under which nnUNet_results has another name, too.
    everywhere = {*known, *names_in([Path(os.environ.get("nnUNet_results") or os.devnull)])}
    if text.isdecimal():
        found = sorted(name for name in everywhere if int(name[7:10]) == int(text))
    else:
        found = [name for name in known if name == text]
    if len(found) > 1:
        raise DatasetError(f"dataset id {text} stands for {', '.join(found)}: give the full name")
    if found and found[0] in known:
        return found[0]
    close, listed = did_you_mean(text, known), ", ".join(known) or "none"
    raise DatasetError(f"unknown dataset {text}. {close}nnUNet_raw and nnUNet_preprocessed have: {listed}")


def find_plans(dataset_name: str, identifier: str) -> Path:
    """Return where the plans with this identifier are or will be, for example ``…/Dataset004_X/nnUNetPlans.json``."""
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name
    identifier = identifier.removesuffix(".json")
    if identifier.endswith(".pkl") or (folder / f"{identifier}.pkl").is_file():
        name = identifier.removesuffix(".pkl")
        raise PlansError(f"{name}.pkl are plans of nnU-Net v1: plan the dataset again with nnUNetv2_plan_experiment")
    # nnU-Net joins trainer, plans and configuration with two underscores and takes folder names apart there.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", identifier) or "__" in identifier:
        raise PlansError(f"plans cannot be named {identifier}: use letters, digits, single underscores, dots, hyphens")
    return folder / f"{identifier}.json"


def require_plans(path: Path) -> Path:
    """Return the same path, if there is a file."""
    if path.is_file():
        return path
    present = sorted(p.stem for p in path.parent.glob("*Plans*.json"))
    dataset = path.parent.name
    plan = f"nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}" if dataset[7:10].isdecimal() else "nnU-Net's planner"
    if present:
        remedy = f"{did_you_mean(path.stem, present)}Name one of {', '.join(present)} with -p"
    else:
        remedy = f"Run `{plan}` first"
    raise PlansError(f"missing plans file {path}. {remedy}")


def require_configuration(plans: Mapping[str, Any], name: str) -> None:
    """Check that plans have a configuration."""
    if name not in (known := plans["configurations"]):
        where, close = plans.get("plans_name", "the plans"), did_you_mean(name, known)
        raise PlansError(f"unknown configuration in {where}: {name}. {close}Choose one of {', '.join(known)}")


def preprocessed_folder(dataset_name: str, plans: Mapping[str, Any], configuration: str) -> Path:
    """Return the folder of the preprocessed cases of a configuration."""
    place: str | None = configuration
    while place and "data_identifier" not in plans["configurations"][place]:
        place = plans["configurations"][place].get("inherits_from")
    identifier = plans["configurations"][place]["data_identifier"] if place else configuration
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name / identifier
    if not any(folder.glob("*.pkl")):  # the last file of a case that nnU-Net writes
        name = plans.get("plans_name", "nnUNetPlans")
        command = f"nnUNetv2_preprocess -d {int(dataset_name[7:10])} -plans_name {name} -c {configuration}"
        raise DatasetError(f"a dataset that is not preprocessed: no cases in {folder}: run `{command}`")
    return folder
