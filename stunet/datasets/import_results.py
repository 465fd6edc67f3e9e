"""What every kind of import says and writes once its cases are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stunet.datasets.side_files import SPLITS_NAME
from stunet.errors import STUNetError
from stunet.files import write_json

__all__ = ["list_some", "mention_failures", "write_fold"]


def list_some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def mention_failures(failed: Mapping[str, STUNetError]) -> str:
    """The end of a sentence about what is missing: cases that failed may be why. Empty where none did."""
    if not failed:
        return ""
    name, error = next(iter(failed.items()))
    return f"; {len(failed)} cases failed, {name} first: {error.problem}, {error.got}"


def write_fold(folder: Path, fold: Mapping[str, Sequence[str]]) -> bool:
    """Write nnU-Net's only fold, if it has cases to train and to validate on; nnU-Net makes five of its own otherwise.

    Returns:
        Whether it was written.
    """
    if fold.get("train") and fold.get("val"):
        write_json([fold], folder / SPLITS_NAME)
        return True
    (folder / SPLITS_NAME).unlink(missing_ok=True)
    return False
