"""Small datasets in nnU-Net's raw layout with random label maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

AFFINE = np.array([[-1.2, 0.6, 0, 90.0], [0.9, 0.8, 0, -120.5], [0, 0, 2.0, 33.25], [0, 0, 0, 1]])
SHAPE = (6, 5, 4)


def write_raw(
    folder: Path,
    labels: Mapping[str, Any],
    cases: Sequence[str],
    *,
    manifest: Mapping[str, Any] | None = None,
    dtype: Any = np.uint8,
    unit: str = "mm",
    **details: Any,
) -> Path:
    """Each case has random voxels of all label values. The same arguments give the same voxels.

    ``dataset.json`` lists the files: nnU-Net would look for them with a dozen processes.
    """
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    dataset = {"channel_names": {"0": "CT"}, "labels": dict(labels), "file_ending": ".nii.gz", **details}
    ending = dataset["file_ending"]
    values = [value for value in labels.values() if isinstance(value, int)]
    files = {}
    for i, case in enumerate(cases):
        rng = np.random.default_rng([len(folder.name), i])
        images = [f"imagesTr/{case}_{channel:04d}{ending}" for channel in range(len(dataset["channel_names"]))]
        files[case] = {"images": images, "label": f"labelsTr/{case}{ending}"}
        for path in images:
            _save(rng.normal(size=SHAPE).astype(np.float32), folder / path, unit)
        _save(rng.choice(values, SHAPE).astype(dtype), folder / "labelsTr" / f"{case}{ending}", unit)
    content = {**dataset, "numTraining": len(cases), "dataset": files}
    (folder / "dataset.json").write_text(json.dumps(content))
    if manifest is not None:
        (folder / "annotated_labels.json").write_text(json.dumps({"version": 1, **manifest}))
    return folder


def _save(array: np.ndarray, path: Path, unit: str) -> None:
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)
