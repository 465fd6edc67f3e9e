"""Labels found plane by plane are those of nnU-Net's resampling of all logits and its argmax, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy.ndimage import gaussian_filter

from stunet.inference.predictor import AxisMap, LabelResampler, axis_maps

ISOTROPIC = (1.0, 1.0, 1.0)


def smooth_logits(num_classes: int, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_classes, *shape))
    return np.stack([40 * gaussian_filter(each, 1.5) + 0.05 * each for each in noise]).astype(np.float16)


def expected_labels(logits: npt.NDArray[Any], new_shape: Any, spacing: Any, new_spacing: Any, **kwargs: Any) -> Any:
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None, **kwargs}
    return resample_data_or_seg_to_shape(logits, new_shape, spacing, new_spacing, **kwargs).argmax(0)


def labels_by_planes(
    logits: npt.NDArray[Any], new_shape: Any, spacing: Any, new_spacing: Any, axis: int = 0, **kwargs: Any
) -> Any:
    maps = axis_maps(logits.shape[1:], new_shape, spacing, new_spacing, **kwargs)
    others = [i for i in range(3) if i != axis]
    resampler = LabelResampler((maps[axis], maps[others[0]], maps[others[1]]), np.uint16)
    labels = np.full(new_shape, 65535, np.uint16)
    target, order = np.moveaxis(labels, axis, 0), []
    before = logits.copy()
    for plane in np.moveaxis(logits, axis + 1, 0):
        for index, labelled in resampler.push(plane):
            target[index] = labelled
            order.append(index)
    assert order == list(range(new_shape[axis]))
    assert np.array_equal(logits, before)
    return labels


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_classes", "shape", "new_shape", "spacing", "new_spacing"),
    [
        (5, (12, 15, 13), (19, 25, 9), ISOTROPIC, ISOTROPIC),
        (5, (12, 15, 13), (12, 15, 13), ISOTROPIC, ISOTROPIC),
        (12, (6, 15, 13), (12, 30, 26), (5, 1, 1), (2.5, 0.5, 0.5)),  # the first axis by the nearest plane
        (12, (12, 13, 14), (5, 30, 27), ISOTROPIC, (5, 0.5, 0.5)),  # by the original image's spacing
        (5, (12, 14, 9), (20, 22, 4), (1, 1, 4), (1, 1, 9)),  # the last axis
        (5, (12, 14, 9), (20, 14, 9), (1, 4, 4), (1, 9, 9)),  # two coarse axes, so none by itself
        (4, (1, 9, 9), (1, 19, 15), ISOTROPIC, ISOTROPIC),
        (40, (1, 2, 3), (2, 3, 7), ISOTROPIC, ISOTROPIC),
        (3, (30, 8, 8), (4, 3, 2), ISOTROPIC, (7, 3, 4)),
        (300, (4, 6, 5), (6, 11, 9), ISOTROPIC, ISOTROPIC),
    ],
)
def test_nnunets_labels(
    num_classes: int, shape: Any, new_shape: Any, spacing: Any, new_spacing: Any, axis: int
) -> None:
    logits = smooth_logits(num_classes, shape)
    expected = expected_labels(logits, new_shape, spacing, new_spacing)
    assert len(np.unique(expected)) > 1
    differ = labels_by_planes(logits, new_shape, spacing, new_spacing, axis) != expected
    # Along another axis products are added in another order, which can change what half precision rounds to.
    assert np.mean(differ) <= (0 if axis == 0 else 1e-3)


@pytest.mark.parametrize("force_separate_z", [None, True, False])
@pytest.mark.parametrize("order_z", [0, 1])
def test_options_of_the_plans(force_separate_z: bool | None, order_z: int) -> None:
    logits = smooth_logits(6, (7, 12, 11))
    arguments = ((15, 20, 23), (2, 1, 1), (0.9, 0.6, 0.5))
    options = {"force_separate_z": force_separate_z, "order_z": order_z}
    expected = expected_labels(logits, *arguments, **options)
    differ = labels_by_planes(logits, *arguments, **options) != expected
    assert np.mean(differ) <= (0 if order_z == 0 or not force_separate_z else 1e-3)


def test_equal_logits_go_to_the_first_class() -> None:
    """Few different values, so that most maxima are shared, before or after rounding; and both zeros."""
    rng = np.random.default_rng(1)
    logits = rng.integers(-1, 2, (7, 9, 10, 11)).astype(np.float16)
    logits[rng.random(logits.shape) < 0.2] = np.float16(-0.0)
    for new_shape in ((9, 10, 11), (18, 20, 22), (14, 5, 17)):
        expected = expected_labels(logits, new_shape, ISOTROPIC, ISOTROPIC)
        assert np.array_equal(labels_by_planes(logits, new_shape, ISOTROPIC, ISOTROPIC), expected)


def test_rounding_to_half_precision_decides() -> None:
    """Two classes closer than half precision resolves, between voxels: nnU-Net finds them equal."""
    logits = np.zeros((3, 2, 2, 2), np.float16)
    step = np.spacing(np.float16(1000))
    logits[1] = np.float16(1000)
    logits[2] = np.float16(1000)
    logits[2, 1, 1, 1] += step  # a quarter of which, between the voxels, is lost in rounding
    expected = expected_labels(logits, (8, 8, 8), ISOTROPIC, ISOTROPIC)
    assert 0 < np.count_nonzero(expected == 2) < 8**3
    assert np.array_equal(labels_by_planes(logits, (8, 8, 8), ISOTROPIC, ISOTROPIC), expected)


def test_a_class_that_is_second_at_every_corner_can_win_between_them() -> None:
    logits = np.zeros((4, 1, 2, 2), np.float16)
    logits[0, 0, 0, 0] = logits[1, 0, 1, 1] = logits[2, 0, 0, 1] = 10
    logits[3] = 6
    labels = labels_by_planes(logits, (1, 9, 9), ISOTROPIC, ISOTROPIC)
    assert labels[0, 4, 4] == 3
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert np.array_equal(labels, expected_labels(logits, (1, 9, 9), ISOTROPIC, ISOTROPIC))


def test_planes_are_given_as_soon_as_they_are_certain() -> None:
    (planes, rows, columns) = axis_maps((10, 4, 4), (25, 4, 4), ISOTROPIC, ISOTROPIC)
    resampler = LabelResampler((planes, rows, columns))
    logits = smooth_logits(3, (10, 4, 4))
    given: list[int] = []
    for index in range(10):
        given += [i for i, _ in resampler.push(logits[:, index])]
        assert given == [i for i, lower in enumerate(planes.lower) if lower + 1 <= index]
    assert len(given) == 25


def test_where_output_voxels_lie() -> None:
    """Two voxels become four: the borders fall together, so the new centres lie at -1/4, 1/4, 3/4 and 5/4.

    What lies outside takes the value at the border.
    """
    linear, same, nearest = axis_maps((2, 3, 2), (4, 3, 5), (1, 1, 9), (0.5, 1, 1.8))
    assert linear.weight is not None
    assert linear.ends is not None
    offset = linear.ends[0] * (1 - linear.weight) + linear.ends[1] * linear.weight
    assert np.allclose(linear.lower + offset, [0, 0.25, 0.75, 1])
    assert (same.linear, same.lower.tolist()) == (False, [0, 1, 2])
    assert (nearest.linear, nearest.lower.tolist()) == (False, [0, 0, 1, 1, 1])
    assert AxisMap(np.arange(2), None).linear is False
