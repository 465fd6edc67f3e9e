"""Generated cases with many structures, preprocessed and written as nnU-Net does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from numpy.typing import NDArray

__all__ = ["structures", "write_preprocessed"]


def structures(shape: Sequence[int], count: int, *, seed: int = 0) -> NDArray[np.int16]:
    """Label map of ``shape`` in which ``count`` ellipsoids of many sizes touch each other, as organs do.

    Radii go from a 25th to a 6th of the longest side. Where two overlap, a voxel belongs to the one whose centre is
    nearer, measured in radii.
    """
    random = np.random.default_rng(seed)
    labels, nearest = np.zeros(shape, np.int16), np.ones(shape, np.float32)
    for label in range(1, count + 1):
        radii = max(shape) * np.exp(random.uniform(np.log(1 / 25), np.log(1 / 6), 3))
        centre = random.uniform(0.05, 0.95, 3) * shape
        box = tuple(
            slice(max(0, int(c - r)), min(n, int(c + r) + 1)) for c, r, n in zip(centre, radii, shape, strict=True)
        )
        axes = (((np.arange(cut.start, cut.stop) - c) / r) ** 2 for cut, c, r in zip(box, centre, radii, strict=True))
        distance = sum(np.ix_(*axes)).astype(np.float32)
        inside = distance < nearest[box]
        nearest[box][inside] = distance[inside]
        labels[box][inside] = label
    return labels


def write_preprocessed(
    folder: Path, plans: dict[str, Any], segmentation: NDArray[np.int16], *, cases: int = 1, seed: int = 0
) -> None:
    """Write cases with this segmentation, an image of it, and what nnU-Net's trainers look for beside them.

    Args:
        folder: The dataset's folder in ``nnUNet_preprocessed``.
        plans: nnU-Net's plans; the cases are those of ``3d_fullres``.
        segmentation: Label map, ``(X, Y, Z)``.
        cases: How many equal cases there are.
        seed: Of the image's noise.
    """
    configuration = plans["configurations"]["3d_fullres"]
    data_folder = folder / configuration["data_identifier"]
    data_folder.mkdir(parents=True)
    count = int(segmentation.max())
    random = np.random.default_rng(seed)
    image = random.uniform(-1, 1, count + 1).astype(np.float32)[segmentation]
    image += 0.1 * random.standard_normal(segmentation.shape, np.float32)
    places = DefaultPreprocessor._sample_foreground_locations(segmentation[None], list(range(1, count + 1)))
    blocks, chunks = comp_blosc2_params((1, *segmentation.shape), configuration["patch_size"])
    names = [f"case_{number}" for number in range(cases)]
    for name in names:
        nnUNetDatasetBlosc2.save_case(
            image[None], segmentation[None], {"class_locations": places}, str(data_folder / name),
            chunks=chunks, blocks=blocks,
        )  # fmt: skip
    (folder / "splits_final.json").write_text(json.dumps([{"train": names, "val": names}]))
