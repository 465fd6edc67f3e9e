"""From the files of a case to what the network sees: nnU-Net's own reading and preprocessing, in less memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from stunet.errors import DatasetError
from stunet.inference.image_resampling import resample_image
from stunet.inference.images import Case, Geometry, as_nifti, check_voxels, readable
from stunet.volumes import not_numbers

__all__ = ["PreparationJob", "Prepared", "network_grid", "prepare", "save_array", "spacing_of_network"]

_DEFAULT_RESAMPLING = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class PreparationJob:
    """What a process needs to prepare a case.

    Attributes:
        case: The case.
        plans: Content of ``plans.json``.
        configuration: Name of the configuration.
        dataset_json: Content of ``dataset.json``.
        scratch: Folder for the result; made where it is missing.
    """

    case: Case
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    scratch: Path


@dataclass(frozen=True)
class Prepared:
    """A case on the network's grid.

    Attributes:
        case: The case; its files are in the scratch folder where they had to be converted.
        image: File with the image, ``(C, X, Y, Z)``.
        properties: What nnU-Net notes of the original grid.
    """

    case: Case
    image: Path
    properties: dict[str, Any]


class _LeanConfiguration(ConfigurationManager):
    """A configuration whose images are resampled in little memory, and whose masks of non-zero voxels are not."""

    @property
    def resampling_fn_data(self) -> Callable[..., Any]:
        kwargs = self.configuration["resampling_fn_data_kwargs"]
        if self.configuration["resampling_fn_data"] == _DEFAULT_RESAMPLING and _is_default(kwargs):
            return partial(resample_image, **{k: v for k, v in kwargs.items() if k not in ("is_seg", "order_z")})
        usual: Callable[..., Any] = super().resampling_fn_data
        return usual

    @property
    def resampling_fn_seg(self) -> Callable[..., Any]:
        return _no_mask  # after normalization, which comes first, only training looks at it


def _is_default(kwargs: Mapping[str, Any]) -> bool:
    known = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
    return set(kwargs) <= known and not kwargs.get("is_seg", False) and kwargs.get("order_z", 0) == 0


def _no_mask(mask: npt.NDArray[Any], *_: Any) -> npt.NDArray[Any]:
    return np.zeros((1,) * mask.ndim, mask.dtype)


def prepare(job: PreparationJob) -> Prepared:
    """Read and preprocess a case as nnU-Net does, and write the result into the scratch folder.

    Raises:
        DatasetError: The files cannot be read, hold values that are no numbers, or cannot be preprocessed.
        OSError: The disk is full.
    """
    plans = PlansManager(job.plans)
    configuration = _LeanConfiguration(plans.get_configuration(job.configuration).configuration)
    job.scratch.mkdir(exist_ok=True)
    case = as_nifti(job.case, job.dataset_json["file_ending"], job.scratch)
    read = [_read(case, plans)]
    properties = read[0][1]
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        # The only reference to the voxels is given away, so that they are freed once nnU-Net has its own copy.
        image, _, properties = preprocessor.run_case_npy(
            read.pop()[0], None, properties, plans, configuration, job.dataset_json
        )
    except (ValueError, IndexError, RuntimeError, TypeError, AssertionError) as error:
        raise DatasetError(
            "a case that nnU-Net cannot preprocess",
            got=f"{job.case.name}: {type(error).__name__}: {str(error)[:200]}",
            expected="an image with voxels that are not zero",
            remedy="Look at the image, or leave its case out.",
        ) from error
    path = job.scratch / "image.npy"
    save_array(path, np.asarray(image, dtype=np.float32))
    return Prepared(case, path, properties)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Save an array.

    Raises:
        OSError: The disk is full; names the file.
    """
    try:
        np.save(path, array)
    except OSError as error:
        if error.errno is None:  # numpy only says how many bytes it could not write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _read(case: Case, plans: Any) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    for path in case.files:
        check_voxels(path)
    with readable(", ".join(map(str, case.files))):
        image, properties = plans.image_reader_writer_class().read_images([str(path) for path in case.files])
    n_bad = sum(int(plane.size - np.isfinite(plane).sum()) for channel in image for plane in channel)
    if n_bad:
        raise not_numbers(case.name, n_bad)
    return image, properties


def network_grid(
    geometry: Geometry, plans: Any, configuration: Any
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Voxels of a whole image on its own grid and on the network's, axes in the network's order."""
    shape = [geometry.shape[i] for i in plans.transpose_forward]
    spacing = [geometry.spacing[i] for i in plans.transpose_forward]
    x, y, z = (int(n) for n in compute_new_shape(shape, spacing, spacing_of_network(configuration, spacing)))
    return (shape[0], shape[1], shape[2]), (x, y, z)


def spacing_of_network(configuration: Any, spacing: Sequence[float]) -> list[float]:
    """Spacing of the network's grid for an image; a 2D network keeps the image's along the first axis."""
    target = [float(s) for s in configuration.spacing]
    return target if len(target) == len(spacing) else [float(spacing[0]), *target]
