"""nnU-Net's folders and the datasets in them, found without nnU-Net, whose import takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from stunet.errors import DatasetError, NnUNetPathError

__all__ = ["find_dataset", "nnunet_folder"]


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
            f"the environment variable {variable} is missing",
            got="nothing",
            expected="a folder",
            remedy=remedy,
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
        DatasetError: Not in ``nnUNet_raw`` or ``nnUNet_preprocessed``, or an id that stands for several datasets.
        NnUNetPathError: Neither ``nnUNet_raw`` nor ``nnUNet_preprocessed`` is set.
    """
    variables = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    raw, preprocessed, results = (_datasets(os.environ.get(variable)) for variable in variables)
    if not any(map(os.environ.get, variables[:2])):
        nnunet_folder("nnUNet_preprocessed")
    known, text = sorted(raw | preprocessed), str(dataset)
    named = {
        name
        for name in raw | preprocessed | results
        if name == text or (text.isascii() and text.isdecimal() and int(name[7:10]) == int(text))
    }
    if len(named) == 1 and named <= set(known):
        return named.pop()
    if len(named) > 1:
        raise DatasetError(
            "a dataset id that stands for several datasets",
            got=f"{text}: {', '.join(sorted(named))}",
            expected="one of them",
            remedy="Give the full name.",
        )
    raise DatasetError(
        "unknown dataset",
        got=text,
        expected=f"one of {', '.join(known)}" if known else "a dataset in nnUNet_raw or nnUNet_preprocessed",
        remedy="Check the name and the variables nnUNet_raw and nnUNet_preprocessed.",
    )


def _datasets(folder: str | None) -> set[str]:
    return {d.name for d in Path(folder).glob("Dataset[0-9][0-9][0-9]_*") if d.is_dir()} if folder else set()
