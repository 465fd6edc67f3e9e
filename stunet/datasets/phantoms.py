"""Generated abdomens that look a little like CT or MR: data for demonstrations and tests that needs no download."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stunet.files import write_json

__all__ = [
    "PHANTOM_LABELS",
    "Modality",
    "Phantom",
    "make_phantom",
    "phantom_labels",
    "write_phantom_dataset",
    "write_phantom_masks",
]

Volume = npt.NDArray[np.float32]

_SHAPE = (26, 56, 68)  # voxels, z y x
_SPACING = (5.0, 3.0, 3.0)  # mm, z y x: thick slices, as abdominal CT often has


@dataclass(frozen=True)
class _Organ:
    """An ellipsoid before its surface and place are varied."""

    name: str
    intensity: float  # HU, or what the scanner calls it
    centre: tuple[float, float, float]  # fraction of the body's half axes from its centre, z y x
    radii: tuple[float, float, float]  # mm, z y x
    is_labelled: bool = True


@dataclass(frozen=True)
class _Anatomy:
    """What is in a body, and how bright it is. Later organs are painted over earlier ones."""

    air: float
    fat: float
    soft_tissue: float
    noise: float  # standard deviation before smoothing
    variation: float  # standard deviation of an organ's intensity from case to case
    organs: tuple[_Organ, ...]  # x runs from the patient's right to the left, y from front to back

    @property
    def labels(self) -> dict[str, int]:
        names = dict.fromkeys(organ.name for organ in self.organs if organ.is_labelled)
        return {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}


_CT = _Anatomy(
    air=-1000.0,
    fat=-100.0,
    soft_tissue=40.0,
    noise=25.0,
    variation=10.0,
    organs=(
        _Organ("liver", 120.0, (0.15, -0.15, -0.42), (42.0, 36.0, 38.0)),
        _Organ("spleen", 200.0, (0.20, 0.30, 0.62), (28.0, 18.0, 15.0)),
        _Organ("kidneys", 290.0, (-0.25, 0.42, 0.36), (24.0, 14.0, 13.0)),
        _Organ("kidneys", 290.0, (-0.30, 0.42, -0.36), (24.0, 14.0, 13.0)),
        _Organ("spine", 560.0, (0.0, 0.55, 0.0), (400.0, 13.0, 14.0)),
        _Organ("aorta", 390.0, (0.0, 0.20, 0.10), (400.0, 9.0, 9.0)),
    ),
)
# Another contrast, where fat is suppressed and bone as dark, and other structures: only the kidneys are in both.
_MR = _Anatomy(
    air=0.0,
    fat=110.0,
    soft_tissue=240.0,
    noise=30.0,
    variation=20.0,
    organs=(
        _Organ("liver", 340.0, (0.15, -0.15, -0.42), (42.0, 36.0, 38.0), is_labelled=False),
        _Organ("stomach", 560.0, (0.15, -0.30, 0.38), (26.0, 20.0, 22.0)),
        _Organ("kidneys", 450.0, (-0.25, 0.42, 0.36), (24.0, 14.0, 13.0)),
        _Organ("kidneys", 450.0, (-0.30, 0.42, -0.36), (24.0, 14.0, 13.0)),
        _Organ("spine", 110.0, (0.0, 0.55, 0.0), (400.0, 13.0, 14.0), is_labelled=False),
        _Organ("vena cava", 880.0, (0.0, 0.20, -0.12), (400.0, 9.0, 10.0)),
    ),
)
_ANATOMIES = {"CT": _CT, "MR": _MR}

Modality = Literal["CT", "MR"]
"""Which phantoms: with what contrast, and which structures."""

PHANTOM_LABELS: dict[str, int] = _CT.labels
"""Label value of each structure in a phantom that looks like CT."""


def phantom_labels(modality: Modality) -> dict[str, int]:
    """Label value of each structure, with background."""
    return _ANATOMIES[modality].labels


@dataclass(frozen=True)
class Phantom:
    """One generated case.

    Attributes:
        image: Intensity (HU in CT), float32 of shape ``(Z, Y, X)``.
        segmentation: Labels as in :func:`phantom_labels`, uint8 of the same shape.
        spacing: mm along ``(z, y, x)``.
    """

    image: Volume
    segmentation: npt.NDArray[np.uint8]
    spacing: tuple[float, float, float]


def make_phantom(seed: int, case: int, modality: Modality = "CT") -> Phantom:
    """Make one phantom: a body with organs whose surface, place, size and contrast vary from case to case.

    Args:
        seed: Seed of the dataset.
        case: Number of the case. Equal arguments give equal voxels.
        modality: Contrast and structures.
    """
    anatomy, labels = _ANATOMIES[modality], phantom_labels(modality)
    rng = np.random.default_rng([seed, case])
    shape = tuple(int(n + rng.integers(-2, 3)) for n in _SHAPE)
    spacing = tuple(float(np.round(s * rng.uniform(0.95, 1.05), 3)) for s in _SPACING)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, Z, Y, X) in mm from the centre
    half_axes = np.array([1e4, 70.0, 90.0]) * rng.uniform(0.95, 1.05, 3)

    image = np.full(shape, anatomy.air)
    image[_blob(grid, np.zeros(3), half_axes, 0.05, spacing, rng)] = anatomy.fat
    image[_blob(grid, np.zeros(3), half_axes * 0.92, 0.05, spacing, rng)] = anatomy.soft_tissue
    segmentation = np.zeros(shape, np.uint8)
    reach = np.array([shape[0] * spacing[0] / 2, *half_axes[1:]])
    for organ in anatomy.organs:
        centre = np.array(organ.centre) * reach + rng.normal(0, 4.0, 3)
        radii = np.array(organ.radii) * rng.uniform(0.85, 1.15, 3)
        inside = _blob(grid, centre, radii, 0.35, spacing, rng)
        image[inside] = organ.intensity + rng.normal(0, anatomy.variation)
        segmentation[inside] = labels.get(organ.name, 0)
    image = _blur(image, 0.6) + _blur(rng.normal(0, anatomy.noise, shape), 0.4)
    return Phantom(image.astype(np.float32), segmentation, (spacing[0], spacing[1], spacing[2]))


def _blur(volume: npt.NDArray[np.float64], sigma: float | list[float]) -> npt.NDArray[np.float64]:
    from scipy.ndimage import gaussian_filter  # here, as all imports of other data would wait for it

    return np.asarray(gaussian_filter(volume, sigma))


def _blob(
    grid: npt.NDArray[np.float64],
    centre: npt.NDArray[np.float64],
    radii: npt.NDArray[np.float64],
    roughness: float,
    spacing: tuple[float, ...],
    rng: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """An ellipsoid whose surface waves with a wavelength of centimetres."""
    waves = _blur(rng.normal(size=grid.shape[1:]), [12.0 / s for s in spacing])
    distance = np.sqrt(sum(((grid[i] - centre[i]) / radii[i]) ** 2 for i in range(3)))
    return np.asarray(distance + roughness * waves / waves.std() / 2 < 1, dtype=np.bool_)


def write_phantom_dataset(
    folder: str | os.PathLike[str],
    *,
    n_training: int = 20,
    n_test: int = 4,
    seed: int = 0,
    modality: Modality = "CT",
) -> None:
    """Write phantoms in nnU-Net's raw layout, with test cases in ``imagesTs`` and ``labelsTs``.

    Args:
        folder: The dataset's folder, for example ``…/Dataset001_Phantoms``; made where it does not exist.
        n_training: Cases in ``imagesTr``.
        n_test: Cases in ``imagesTs``, numbered after those.
        seed: Equal seeds give equal files.
        modality: Contrast and structures.
    """
    folder = Path(folder)
    for split, cases in (("Tr", range(n_training)), ("Ts", range(n_training, n_training + n_test))):
        images, labels = folder / f"images{split}", folder / f"labels{split}"
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(exist_ok=True)
        for case in cases:
            phantom = make_phantom(seed, case, modality)
            _write_nifti(phantom.image, phantom.spacing, images / f"phantom_{case:03d}_0000.nii.gz")
            _write_nifti(phantom.segmentation, phantom.spacing, labels / f"phantom_{case:03d}.nii.gz")
    dataset_json = {
        "channel_names": {"0": modality},
        "labels": phantom_labels(modality),
        "numTraining": n_training,
        "file_ending": ".nii.gz",
    }
    write_json(dataset_json, folder / "dataset.json")


def write_phantom_masks(
    folder: str | os.PathLike[str],
    *,
    n_training: int = 20,
    n_test: int = 4,
    seed: int = 0,
    missing: float = 0.3,
) -> None:
    """Write phantoms in TotalSegmentator's layout, as ``stunet import totalsegmentator`` reads it.

    Each case has a folder with ``ct.nii.gz`` and one mask for each structure that it annotates; ``meta.csv`` says which
    cases are for training, validation (a fifth of the training cases) and test.

    Args:
        folder: The folder for the cases, made where it does not exist.
        n_training: Cases for training and validation.
        n_test: Cases for testing, which annotate everything.
        seed: Equal seeds give equal files, and the same phantoms as :func:`write_phantom_dataset`.
        missing: Share of the training cases' masks that are left out, as if nobody had drawn them.
    """
    folder = Path(folder)
    rng = np.random.default_rng([seed, n_training])
    structures = [name for name in PHANTOM_LABELS if name != "background"]
    rows = ["image_id;split"]
    for case in range(n_training + n_test):
        split = "test" if case >= n_training else "val" if case % 5 == 4 else "train"
        rows.append(f"s{case:04d};{split}")
        masks = folder / f"s{case:04d}" / "segmentations"
        masks.mkdir(parents=True, exist_ok=True)
        phantom = make_phantom(seed, case)
        _write_nifti(phantom.image, phantom.spacing, masks.parent / "ct.nii.gz")
        kept = rng.random(len(structures)) >= missing if split == "train" else np.ones(len(structures), np.bool_)
        for name, is_kept in zip(structures, kept, strict=True):
            if is_kept:
                mask = (phantom.segmentation == PHANTOM_LABELS[name]).astype(np.uint8)
                _write_nifti(mask, phantom.spacing, masks / f"{name}.nii.gz")
    (folder / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_nifti(volume: npt.NDArray[Any], spacing: tuple[float, float, float], path: Path) -> None:
    import SimpleITK as sitk

    if volume.dtype == np.float32:
        volume = np.round(volume).astype(np.int16)  # as scanners store HU
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing[::-1])  # type: ignore[no-untyped-call]
    sitk.WriteImage(image, str(path))
