"""nnU-Net's folders, datasets and plans, found without nnU-Net, whose import takes seconds."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stunet.errors import DatasetError, NnUNetPathError, PlansError

__all__ = [
    "did_you_mean",
    "find_dataset",
    "find_plans",
    "nnunet_folder",
    "preprocessed_folder",
    "require_configuration",
    "require_plans",
]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean …? `` with the names that are like it, or nothing.

    >>> did_you_mean("small_ep4", ["small_ep4k", "huge"])
    'Did you mean small_ep4k? '
    """
    close = difflib.get_close_matches(name, list(known), 3)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Args:
        variable: ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        NnUNetPathError: The variable is not set, or names no folder.
    """
    value = os.environ.get(variable)
    remedy = f"Set it, for example: export {variable}=/path/to/{variable}"
    if not value:
        raise NnUNetPathError(
            f"the environment variable {variable} is missing", got="nothing", expected="a folder", remedy=remedy
        )
    if not Path(value).is_dir():
        raise NnUNetPathError(
            f"the environment variable {variable} names no folder",
            got=value,
            expected="a folder that exists",
            remedy=f"Create it (mkdir -p {value}), or set the variable to another folder.",
        )
    return Path(value)


def find_dataset(dataset: str | int) -> str:
    """The full name of a dataset.

    Args:
        dataset: An id such as ``4``, or a name such as ``Dataset004_Hippocampus``.

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
    if len(found) == 1 and found[0] in known:
        return found[0]
    if len(found) > 1:
        raise DatasetError("a dataset id that stands for several datasets", got=text,
                           expected=f"one of {', '.join(found)}", remedy="Give the full name.")  # fmt: skip
    raise DatasetError(
        "unknown dataset",
        got=text,
        expected=f"one of {', '.join(known)}" if known else "a dataset in nnUNet_raw or nnUNet_preprocessed",
        remedy=f"{did_you_mean(text, known)}Check the dataset and the variables nnUNet_raw and nnUNet_preprocessed.",
    )


def find_plans(dataset_name: str, identifier: str) -> Path:
    """Where the plans with this identifier are or will be, for example ``…/Dataset004_X/nnUNetPlans.json``.

    Raises:
        PlansError: The identifier is no file name that nnU-Net could use, or names plans of nnU-Net v1.
        NnUNetPathError: ``nnUNet_preprocessed`` is not set.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name
    identifier = identifier.removesuffix(".json")
    if identifier.endswith(".pkl") or (folder / f"{identifier}.pkl").is_file():
        raise PlansError(
            "plans of nnU-Net v1",
            got=f"{identifier.removesuffix('.pkl')}.pkl",
            expected="plans of nnU-Net v2, a JSON file",
            remedy="Plan the dataset again with nnUNetv2_plan_experiment.",
        )
    # nnU-Net joins trainer, plans and configuration with two underscores and takes folder names apart there.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", identifier) or "__" in identifier:
        raise PlansError(
            "a name that plans cannot have",
            got=identifier,
            expected="letters, digits, single underscores, dots and hyphens",
            remedy="Choose another name.",
        )
    return folder / f"{identifier}.json"


def require_plans(path: Path) -> Path:
    """The same path, if there is a file.

    Raises:
        PlansError: There is none; names the plans that are there.
    """
    if path.is_file():
        return path
    present = sorted(p.stem for p in path.parent.glob("*Plans*.json"))
    dataset = path.parent.name
    plan = f"nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}" if dataset[7:10].isdecimal() else "nnU-Net's planner"
    raise PlansError(
        "missing plans file",
        got=path,
        expected=f"one of {', '.join(present)}" if present else "a plans file",
        remedy=f"{did_you_mean(path.stem, present)}Name one of these with -p." if present else f"Run `{plan}` first.",
    )


def require_configuration(plans: Mapping[str, Any], name: str) -> None:
    """Check that plans have a configuration.

    Raises:
        PlansError: They have not; names those that they have.
    """
    if name not in (known := plans["configurations"]):
        raise PlansError(
            f"unknown configuration in {plans.get('plans_name', 'the plans')}",
            got=name,
            expected=f"one of {', '.join(known)}",
            remedy=f"{did_you_mean(name, known)}Choose one of these.",
        )


def preprocessed_folder(dataset_name: str, plans: Mapping[str, Any], configuration: str) -> Path:
    """The folder of the preprocessed cases of a configuration.

    Raises:
        DatasetError: There are none; names the command that makes them.
    """
    place: str | None = configuration
    while place and "data_identifier" not in plans["configurations"][place]:
        place = plans["configurations"][place].get("inherits_from")
    identifier = plans["configurations"][place]["data_identifier"] if place else configuration
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name / identifier
    if not any(folder.glob("*.pkl")):  # the last file of a case that nnU-Net writes
        name = plans.get("plans_name", "nnUNetPlans")
        raise DatasetError(
            "a dataset that is not preprocessed",
            got=f"no cases in {folder}",
            expected=f"preprocessed cases of configuration {configuration}",
            remedy=f"Run `nnUNetv2_preprocess -d {int(dataset_name[7:10])} -plans_name {name} -c {configuration}`.",
        )
    return folder
