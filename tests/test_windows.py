"""Windows: where nnU-Net has them, which hold points, and what is cut out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from stunet.errors import FeatureError
from stunet.ranking import assign_windows, cut_window, window_starts


@pytest.mark.parametrize("step_size", [0.5, 0.3, 1.0])
def test_windows_begin_where_nnunets_do(step_size: float) -> None:
    for size, patch in itertools.product((16, 17, 23, 33, 64, 110, 111), (8, 13, 16)):
        expected = compute_steps_for_sliding_window((size,), (patch,), step_size)[0]
        assert window_starts(size, patch, step_size).tolist() == expected


SHAPES = [((30, 41, 24), (16, 16, 8)), ((30, 10, 7), (16, 16, 8)), ((5, 6, 7), (16, 16, 8)), ((6, 41, 22), (16, 8))]


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
@pytest.mark.parametrize("step_size", [0.5, 1.0])
def test_each_point_is_in_the_window_that_weighs_most(
    shape: tuple[int, ...], patch_size: tuple[int, ...], step_size: float
) -> None:
    points = np.stack([np.random.default_rng(0).integers(0, n, 200) for n in shape], axis=1)
    points[:8] = list(itertools.product(*[(0, n - 1) for n in shape]))
    windows = assign_windows(points, shape, patch_size, step_size=step_size)
    assert sorted(np.concatenate([w.points for w in windows])) == list(range(200))
    assert len({w.start for w in windows}) == len(windows)
    n_flat = 3 - len(patch_size)
    padded = tuple(max(n, p) for n, p in zip(shape[n_flat:], patch_size, strict=True))
    _, slicer = pad_nd_image(np.empty(shape), patch_size, "constant", {}, return_slicer=True)
    offset = np.array([s.start for s in slicer])
    gaussian = compute_gaussian(patch_size, device=torch.device("cpu"), dtype=torch.float32).numpy()
    starts = list(itertools.product(*compute_steps_for_sliding_window(padded, patch_size, step_size)))
    for window in windows:
        assert (window.local >= 0).all()
        assert (window.local < patch_size).all()
        assert np.array_equal(points[window.points] - window.start, np.pad(window.local, ((0, 0), (n_flat, 0))))
        for point, local in zip(points[window.points], window.local, strict=True):
            inside = [(point + offset)[n_flat:] - start for start in starts]
            weights = [gaussian[tuple(i)] for i in inside if (i >= 0).all() and (i < patch_size).all()]
            assert gaussian[tuple(local)] == max(weights)


def test_windows_without_points_are_left_out() -> None:
    points = np.array([[0, 0, 0], [1, 1, 1], [99, 99, 99]])
    windows = assign_windows(points, (100, 100, 100), (16, 16, 16))
    assert [(w.start, w.points.tolist()) for w in windows] == [((0, 0, 0), [0, 1]), ((84, 84, 84), [2])]
    assert assign_windows(points[:0], (100, 100, 100), (16, 16, 16)) == []


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_windows_are_cut_as_nnunet_pads(shape: tuple[int, ...], patch_size: tuple[int, ...], kind: str) -> None:
    image = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    given = image if kind == "array" else torch.from_numpy(image)
    padded, slicer = pad_nd_image(image, patch_size, "constant", {"constant_values": 0}, return_slicer=True)
    n_flat = 3 - len(patch_size)
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape])))
    for window in assign_windows(corners, shape, patch_size):
        first = [start + s.start for start, s in zip(window.start, slicer[1:], strict=True)]
        box = [slice(a, a + n) for a, n in zip(first[n_flat:], patch_size, strict=True)]
        cut = cut_window(given, window.start, patch_size)
        assert cut.dtype == torch.float32
        assert np.array_equal(cut.numpy(), padded[(slice(None), *first[:n_flat], *box)])


def test_impossible_windows() -> None:
    points = np.zeros((1, 3), np.int64)
    for patch, step in (((8,), 0.5), ((8, 8, 8, 8), 0.5), ((8, 8, 0), 0.5), ((8, 8, 8), 0.0), ((8, 8, 8), 1.5)):
        with pytest.raises(FeatureError, match="cannot be laid"):
            assign_windows(points, (9, 9, 9), patch, step_size=step)
    for wrong in (points - 1, points + 9, points[:, :2]):
        with pytest.raises(FeatureError, match="outside the volume"):
            assign_windows(wrong, (9, 9, 9), (8, 8, 8))
