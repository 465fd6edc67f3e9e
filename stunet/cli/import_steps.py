"""What the subcommands of ``stunet import`` share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from stunet.cli.console import print_error, stderr, stdout
from stunet.errors import STUNetError

__all__ = ["PREPROCESSED", "new_dataset", "print_failures", "print_line", "print_stale", "shorten"]

PREPROCESSED = "nnUNet_preprocessed"


def new_dataset(dataset_id: int, name: str) -> Path:
    """The folder of a dataset to be made, or to be continued.

    Raises:
        DatasetError: The id belongs to another dataset.
        UsageError: An impossible id or name.
    """
    from stunet.datasets import dataset_folder
    from stunet.environment import nnunet_folder

    others = [Path(v) for v in map(os.environ.get, (PREPROCESSED, "nnUNet_results")) if v]
    return dataset_folder(dataset_id, name, raw=nnunet_folder("nnUNet_raw"), others=others)


def shorten(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def print_failures(failed: Mapping[str, STUNetError]) -> None:
    """Print the errors of cases that could not be imported."""
    for case, error in failed.items():
        print_line(f"case {case}:", error=True)
        print_error(error)
    if failed:
        print_line(f"{len(failed)} cases could not be imported; the dataset is complete without them.", error=True)


def print_stale(paths: Sequence[Path], dataset: str) -> None:
    """Print which files of the preprocessed folder were left alone."""
    for path in paths:
        print_line(f"Left alone, as it differs: {path}. Preprocess again, then: stunet labels carry -d {dataset}")


def print_line(line: str, *, error: bool = False) -> None:
    """Print a line as it is, on either stream."""
    (stderr if error else stdout).print(line, soft_wrap=True, highlight=False, markup=False)
