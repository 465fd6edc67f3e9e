"""Images resampled a few planes at a time are nnU-Net's to the last bits of single precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from stunet.inference import images
from stunet.inference.images import resample_image

ISOTROPIC = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "new_shape", "spacing", "new_spacing"),
    [
        ((40, 25, 18), (60, 13, 19), ISOTROPIC, ISOTROPIC),
        ((10, 25, 18), (20, 13, 19), (5, 1, 1), (2.5, 2, 1)),  # planes each by itself
        ((25, 18, 11), (21, 20, 5), (1, 1, 5), (1, 1, 9)),
        ((25, 18, 11), (25, 18, 5), (1, 1, 5), (1, 1, 9)),
        ((1, 18, 11), (1, 30, 22), ISOTROPIC, ISOTROPIC),
        ((20, 2, 11), (33, 3, 5), ISOTROPIC, ISOTROPIC),
        ((150, 6, 7), (80, 9, 7), ISOTROPIC, (1.9, 0.7, 1)),
        ((9, 9, 9), (9, 9, 9), ISOTROPIC, ISOTROPIC),
    ],
)
@pytest.mark.parametrize("order", [3, 1])
def test_nnunets_images(
    shape: Any, new_shape: Any, spacing: Any, new_spacing: Any, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_BLOCK_ELEMENTS", 2000)  # several blocks even of a small image
    image = (5 * np.random.default_rng(0).normal(size=(2, *shape))).astype(np.float32)
    before = image.copy()
    expected = resample_data_or_seg_to_shape(
        image, new_shape, spacing, new_spacing, is_seg=False, order=order, order_z=0, force_separate_z=None
    )
    result = resample_image(image, new_shape, spacing, new_spacing, order=order)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert np.mean(result != expected) < 1e-2
    assert np.array_equal(image, before)


def test_overshoot_is_cut_off() -> None:
    image = np.zeros((1, 12, 12, 12), np.float32)
    image[:, 6:] = 1
    result = resample_image(image, (25, 12, 12), ISOTROPIC, ISOTROPIC, order=3)
    assert (result.min(), result.max()) == (0, 1)
