"""Small folders in TotalSegmentator's layout, and a plain importer to compare with."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np

from stunet.labels.annotations import AnnotationManifest, read_manifest

AFFINE = np.array([[-1.5, 0, 0, 90.0], [0, 1.5, 0, -120.5], [0, 0, 2.0, 33.25], [0, 0, 0, 1]])
SHAPE = (11, 9, 7)
STRUCTURES = ("aorta", "heart", "liver", "spleen")


def random_masks(seed: int, structures: tuple[str, ...] = STRUCTURES) -> dict[str, np.ndarray]:
    """Overlapping boxes; the last structure's mask is blank."""
    rng = np.random.default_rng(seed)
    masks = {}
    for name in structures:
        low = rng.integers(0, 4, 3)
        mask = np.zeros(SHAPE, np.uint8)
        mask[tuple(slice(a, a + int(n)) for a, n in zip(low, rng.integers(2, 6, 3), strict=True))] = 1
        masks[name] = mask
    masks[structures[-1]][:] = 0
    return masks


def save(volume: np.ndarray, path: Path, *, affine: np.ndarray = AFFINE, kind: Any = nib.Nifti1Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(volume, affine), path)


def write_case(source: Path, name: str, masks: Mapping[str, np.ndarray], seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    save(rng.integers(-1000, 1000, SHAPE).astype(np.int16), source / name / "ct.nii.gz")
    (source / name / "segmentations").mkdir(exist_ok=True)
    for structure, mask in masks.items():
        save(mask, source / name / "segmentations" / f"{structure}.nii.gz")
    return source / name


def write_meta(source: Path, splits: Mapping[str, str]) -> None:
    with (source / "meta.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["image_id", "age", "split"])
        writer.writerows([name, 60, split] for name, split in splits.items())


def write_source(source: Path) -> Path:
    """Three cases that annotate different structures, with overlaps; a0 and a1 to train on, a2 to validate."""
    masks = [random_masks(seed) for seed in range(3)]
    write_case(source, "a0", masks[0], 0)
    write_case(source, "a1", {name: masks[1][name] for name in ("aorta", "liver")}, 1)
    write_case(source, "a2", {"heart": masks[2]["heart"]}, 2)
    write_meta(source, {"a0": "train", "a1": "train", "a2": "val"})
    return source


def naive_label_map(case: Path, structures: list[str]) -> tuple[np.ndarray, dict[tuple[str, str], int]]:
    """Whole volumes, one after the other: label map and voxels lost, by (loser, winner)."""
    labels = np.zeros(nib.load(case / "ct.nii.gz").shape, int)
    lost: dict[tuple[str, str], int] = {}
    for value, name in enumerate(structures, start=1):
        path = case / "segmentations" / f"{name}.nii.gz"
        if path.exists():
            inside = np.asarray(nib.load(path).get_fdata()) > 0.5
            for other in np.unique(labels[inside]):
                if other:
                    lost[structures[other - 1], name] = int((labels[inside] == other).sum())
            labels[inside] = value
    return labels, lost


def bind_manifest(
    content: Any, *, labels: Mapping[str, Any], cases: Iterable[str] | None = None, source: str
) -> AnnotationManifest:
    """What ``read_manifest`` makes of this content in a file of this name."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / source
        path.write_text(json.dumps(content))
        return read_manifest(path, labels=labels, cases=cases)
