"""What every kind of import says and writes once its cases are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stunet.datasets.import_state import REPORT_NAME
from stunet.datasets.side_files import SPLITS_NAME
from stunet.errors import STUNetError
from stunet.files import write_json_files
from stunet.labels import MANIFEST_NAME
from stunet.labels.manifest_format import order_manifest

__all__ = ["list_some", "mention_failures", "write_results"]


def list_some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def mention_failures(failed: Mapping[str, STUNetError]) -> str:
    """The end of a sentence about what is missing: cases that failed may be why. Empty where none did."""
    if not failed:
        return ""
    name, error = next(iter(failed.items()))
    return f"; {len(failed)} cases failed, {name} first: {error.problem}, {error.got}"


def write_results(
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    fold: Mapping[str, Sequence[str]],
    report: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
) -> bool:
    """Write the files of a dataset that are no cases, ``dataset.json`` last, since it makes them one.

    Args:
        folder: The dataset's folder.
        manifest: What the cases annotate.
        fold: Cases to train and to validate on. Where either is missing nnU-Net makes five folds of its own.
        report: What the import has found.
        dataset_json: Content of ``dataset.json``.

    Returns:
        Whether there is a fold.

    Raises:
        LabelError: The manifest is malformed.
    """
    path = folder / MANIFEST_NAME
    has_fold = bool(fold.get("train") and fold.get("val"))
    if not has_fold:
        (folder / SPLITS_NAME).unlink(missing_ok=True)
    files: dict[Path, Any] = {path: order_manifest(manifest, source=str(path))}
    files |= {folder / SPLITS_NAME: [fold]} if has_fold else {}
    write_json_files({**files, folder / REPORT_NAME: report, folder / "dataset.json": dataset_json})
    return has_fold
