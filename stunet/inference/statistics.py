"""Volume and mean intensity of each structure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stunet.errors import DatasetError
from stunet.inference.label_names import LabelNames

__all__ = ["collect_statistics", "find_structures", "measure"]

_MM3_PER_ML = 1000.0


def find_structures(
    labels: npt.NDArray[Any], names: LabelNames, spacing: Sequence[float] | None
) -> dict[str, dict[str, Any]]:
    """Voxels and volume of the structures that a case has.

    Args:
        labels: ``(Z, Y, X)``.
        names: The structures.
        spacing: mm between voxels along ``(Z, Y, X)``; None where the image is no volume.
    """
    counts = sum(np.bincount(plane.reshape(-1), minlength=np.iinfo(labels.dtype).max + 1) for plane in labels)
    voxel = None if spacing is None else math.prod(float(s) for s in spacing) / _MM3_PER_ML
    found = {}
    for name, values in names.structures.items():
        if n := int(np.asarray(counts)[list(values)].sum()):
            volume = None if voxel is None else round(n * voxel, 6)
            found[name] = {"labels": list(values), "voxels": n, "volume_ml": volume}
    return found


def measure(
    image: npt.NDArray[Any], labels: npt.NDArray[Any], names: LabelNames, spacing: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Measure the structures of a case.

    Args:
        image: Original intensities ``(C, Z, Y, X)``.
        labels: ``(Z, Y, X)``.
        names: The structures.
        spacing: mm between voxels along ``(Z, Y, X)``.

    Returns:
        For each structure ``voxels``, ``volume_ml`` and ``mean_intensity``: one number for each channel, None where the
        structure has no voxels.
    """
    n_labels = int(max(max(values) for values in names.structures.values())) + 1
    counts = np.zeros(n_labels, np.int64)
    sums = np.zeros((len(image), n_labels))
    for i, plane in enumerate(labels):  # counting whole volumes takes 8 bytes for each voxel
        flat = plane.reshape(-1).astype(np.intp)
        counts += np.bincount(flat, minlength=n_labels)[:n_labels]
        for channel, of_channel in zip(image, sums, strict=True):
            of_channel += np.bincount(flat, channel[i].reshape(-1), minlength=n_labels)[:n_labels]
    volume = math.prod(float(s) for s in spacing) / _MM3_PER_ML
    measured = {}
    for name, values in names.structures.items():
        n = int(counts[list(values)].sum())
        means = [round(float(of_channel[list(values)].sum() / n), 4) if n else None for of_channel in sums]
        measured[name] = {"voxels": n, "volume_ml": round(n * volume, 6), "mean_intensity": means}
    return measured


def collect_statistics(folder: Path, path: Path) -> None:
    """Write a table of all cases that were measured, one row for each case and structure.

    Args:
        folder: With one JSON file for each case.
        path: CSV file to write.

    Raises:
        DatasetError: A file in the folder that is no such file.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for name, measured in content.items():
                means = ["" if mean is None else mean for mean in measured["mean_intensity"]]
                rows.append([file.stem, name, measured["voxels"], measured["volume_ml"], *means])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                "statistics that were not written by this command",
                got=f"{file}: {type(error).__name__}: {error}",
                expected="volumes and mean intensities by structure",
                remedy="Remove the file, and predict its case again.",
            ) from error
    n_channels = max((len(row) for row in rows), default=5) - 4
    means = ["mean_intensity"] if n_channels == 1 else [f"mean_intensity_{c:04d}" for c in range(n_channels)]
    with path.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["case", "structure", "voxels", "volume_ml", *means])
        table.writerows(rows)
