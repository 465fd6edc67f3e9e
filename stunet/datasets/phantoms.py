"""Generated abdomens that look a little like CT: data for demonstrations and tests that needs no download."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stunet.files import write_json

_SHAPE = (24, 48, 56)  # voxels, z y x
_SPACING = (6.0, 4.0, 4.0)  # mm, z y x: thick slices, as abdominal CT often has

Array = npt.NDArray[np.float64]
Contrast = Literal["venous", "arterial"]
"""Which phantoms: the phase of the contrast agent, the dose, and which structures are labelled."""


@dataclass(frozen=True)
class _Organ:
    """An ellipsoid before its surface and place are varied. Attenuation alone does not tell organs apart."""

    name: str
    centre: tuple[float, float, float]  # fraction of the body's half axes from its centre, z y x
    radii: tuple[float, float, float]  # mm, z y x
    venous: float  # attenuation, HU
    arterial: float
    texture: float = 0.0  # standard deviation, HU
    wavelength: tuple[float, float, float] = (12.0, 12.0, 12.0)  # of the texture, mm, z y x
    core: float = 0.0  # HU that an inner part differs by, as a kidney's medulla does


# x runs from the patient's right to the left, y from front to back. Later organs are painted over earlier ones.
_ORGANS = (
    _Organ("muscle", (0.0, 0.45, -0.42), (400.0, 26.0, 30.0), 58.0, 54.0, 14.0, (30.0, 8.0, 14.0)),
    _Organ("muscle", (0.0, 0.45, 0.42), (400.0, 26.0, 30.0), 58.0, 54.0, 14.0, (30.0, 8.0, 14.0)),
    _Organ("liver", (0.15, -0.12, -0.44), (46.0, 40.0, 38.0), 112.0, 104.0, 18.0),
    _Organ("stomach", (0.15, -0.32, 0.36), (34.0, 24.0, 28.0), 265.0, 265.0, 30.0, (16.0, 16.0, 10.0)),
    _Organ("spleen", (0.20, 0.24, 0.62), (32.0, 24.0, 19.0), 145.0, 150.0, 10.0, (6.0, 6.0, 6.0)),
    _Organ("kidneys", (-0.25, 0.36, 0.38), (36.0, 21.0, 20.0), 180.0, 190.0, core=-45.0),
    _Organ("kidneys", (-0.30, 0.36, -0.38), (36.0, 21.0, 20.0), 180.0, 190.0, core=-45.0),
    _Organ("spine", (0.0, 0.58, 0.0), (400.0, 15.0, 17.0), 200.0, 205.0, 45.0, (5.0, 5.0, 5.0)),
    _Organ("aorta", (0.0, 0.22, 0.12), (400.0, 11.0, 11.0), 200.0, 215.0),
    _Organ("vena cava", (0.0, 0.20, -0.14), (400.0, 10.0, 12.0), 165.0, 125.0),
)
_LABELS: dict[Contrast, tuple[str, ...]] = {
    "venous": ("liver", "spleen", "kidneys", "spine", "aorta"),
    "arterial": ("liver", "spleen", "kidneys", "aorta", "stomach", "vena cava"),
}
_NOISE: dict[Contrast, float] = {"venous": 18.0, "arterial": 24.0}  # HU, standard deviation before smoothing
_AIR, _FAT, _SOFT_TISSUE = -1000.0, -100.0, {"venous": 45.0, "arterial": 40.0}  # HU
_VARIATION = 8.0  # HU, standard deviation of an organ's attenuation from case to case


def phantom_labels(contrast: Contrast) -> dict[str, int]:
    """Label value of each structure, with background."""
    return {"background": 0, **{name: value for value, name in enumerate(_LABELS[contrast], start=1)}}


PHANTOM_LABELS: dict[str, int] = phantom_labels("venous")
"""Label value of each structure in a phantom of the venous phase."""


@dataclass(frozen=True)
class Phantom:
    """One generated case."""

    image: npt.NDArray[np.float32]  # attenuation in HU, float32 of shape (Z, Y, X)
    segmentation: npt.NDArray[np.uint8]  # label values, uint8 of the same shape
    spacing: tuple[float, float, float]  # mm along (z, y, x)


def make_phantom(seed: int, case: int, contrast: Contrast = "venous") -> Phantom:
    """Make one phantom: a body with organs whose surface, place, size and contrast vary from case to case."""
    labels = phantom_labels(contrast)
    rng = np.random.default_rng([seed, case])
    shape = tuple(int(n + rng.integers(-2, 3)) for n in _SHAPE)
    spacing = tuple(float(np.round(s * rng.uniform(0.95, 1.05), 3)) for s in _SPACING)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, Z, Y, X) in mm from the centre
    half_axes = np.array([1e4, 80.0, 100.0]) * rng.uniform(0.94, 1.06, 3)

    image = np.full(shape, _AIR)
    body = _distance(grid, np.zeros(3), half_axes, 0.05, spacing, rng)
    image[body < 1] = _FAT
    image[body < 0.92] = _SOFT_TISSUE[contrast]
    segmentation = np.zeros(shape, np.uint8)
    reach = np.array([shape[0] * spacing[0] / 2, *half_axes[1:]])
    for organ in _ORGANS:
        centre = np.array(organ.centre) * reach + rng.normal(0, 5.0, 3)
        radii = np.array(organ.radii) * rng.uniform(0.82, 1.18, 3)
        distance = _distance(grid, centre, radii, 0.35, spacing, rng)
        inside = distance < 1
        image[inside] = getattr(organ, contrast) + rng.normal(0, _VARIATION)
        image[distance < 0.62] += organ.core
        if organ.texture:
            texture = _blur(rng.normal(size=shape), [w / s / 2 for w, s in zip(organ.wavelength, spacing, strict=True)])
            image[inside] += organ.texture * (texture / texture.std())[inside]
        segmentation[inside] = labels.get(organ.name, 0)
    image = _blur(image, 0.5) + _blur(rng.normal(0, _NOISE[contrast], shape), 0.4)
    return Phantom(image.astype(np.float32), segmentation, (spacing[0], spacing[1], spacing[2]))


def _blur(volume: Array, sigma: float | list[float]) -> Array:
    from scipy.ndimage import gaussian_filter  # here, as all imports of other data would wait for it

    return np.asarray(gaussian_filter(volume, sigma))


def _distance(
    grid: Array, centre: Array, radii: Array, roughness: float, spacing: tuple[float, ...], rng: np.random.Generator
) -> Array:
    """Distance from the centre of an ellipsoid, 1 on its surface, which waves with a wavelength of centimetres."""
    waves = _blur(rng.normal(size=grid.shape[1:]), [14.0 / s for s in spacing])
    distance = np.sqrt(sum(((grid[i] - centre[i]) / radii[i]) ** 2 for i in range(3)))
    return np.asarray(distance + roughness * waves / waves.std() / 2)


def write_phantom_dataset(
    folder: str | os.PathLike[str],
    *,
    n_training: int = 20,
    n_test: int = 4,
    seed: int = 0,
    contrast: Contrast = "venous",
) -> None:
    """Write phantoms in nnU-Net's raw layout, with test cases in ``imagesTs`` and ``labelsTs``.

    Args:
        folder: The dataset's folder, for example ``…/Dataset001_Phantoms``; made where it does not exist.
        n_training: Cases in ``imagesTr``.
        n_test: Cases in ``imagesTs``, numbered after those.
        seed: Equal seeds give equal files.
        contrast: As of :func:`make_phantom`.
    """
    folder = Path(folder)
    for split, cases in (("Tr", range(n_training)), ("Ts", range(n_training, n_training + n_test))):
        images, labels = folder / f"images{split}", folder / f"labels{split}"
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(exist_ok=True)
        for case in cases:
            phantom = make_phantom(seed, case, contrast)
            _write_nifti(phantom.image, phantom.spacing, images / f"phantom_{case:03d}_0000.nii.gz")
            _write_nifti(phantom.segmentation, phantom.spacing, labels / f"phantom_{case:03d}.nii.gz")
    described = {"channel_names": {"0": "CT"}, "labels": phantom_labels(contrast), "numTraining": n_training}
    write_json({**described, "file_ending": ".nii.gz"}, folder / "dataset.json")


def write_phantom_masks(
    folder: str | os.PathLike[str], *, n_training: int = 20, n_test: int = 4, seed: int = 0, missing: float = 0.3
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
