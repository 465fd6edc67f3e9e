"""The fast interpolation of labels beside batchgeneratorsv2's own, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from made_trainers import make, narrow_plans
from preprocessed_cases import structures
from torch import Tensor

from stunet.training.labels import LocalLabelTransform

PATCH, LARGER = (24, 20, 28), (38, 36, 40)


def labels_of(count: int, seed: int, shape: tuple[int, ...] = LARGER) -> Tensor:
    """Label map ``(1, X, Y, Z)`` with structures that touch, and the -1 that loaders put around a case at two sides."""
    labels = structures(shape, count, seed=seed)
    labels[:5], labels[:, :, -4:] = -1, -1
    return torch.from_numpy(labels)[None]


def stock(**settings: Any) -> SpatialTransform:
    """nnU-Net's settings, with a rotation and a scale in each call."""
    settings = {
        "p_rotation": 1, "rotation": (-np.pi / 6, np.pi / 6), "p_scaling": 1, "scaling": (0.7, 1.4),
        "p_synchronize_scaling_across_axes": 1, "border_mode_seg": "constant", "padding_value_seg": -1, **settings,
    }  # fmt: skip
    return SpatialTransform(settings.pop("patch_size", PATCH), 0, False, **settings)


def both(transform: SpatialTransform, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What the original and ours make of the same labels with the same random numbers."""
    results = []
    for one in (transform, LocalLabelTransform.like(transform)):
        np.random.seed(seed)
        torch.manual_seed(seed)
        given = labels.clone()
        results.append(one(image=torch.zeros(given.shape), segmentation=given)["segmentation"])
        assert torch.equal(given, labels)
    return results[0], results[1]


def assert_same(transform: SpatialTransform, labels: Tensor, seed: int = 0) -> Tensor:
    expected, got = both(transform, labels, seed)
    assert got.dtype == expected.dtype
    assert got.is_contiguous() == expected.is_contiguous()
    assert torch.equal(got, expected)
    return got


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [3, 40])
def test_rotated_and_scaled_labels_are_the_same(count: int, seed: int) -> None:
    labels = labels_of(count, seed)
    got = assert_same(stock(), labels, seed)
    nearest = both(stock(mode_seg="nearest"), labels, seed)[1]
    assert not torch.equal(got, nearest)  # it is an interpolation


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0])
def test_points_outside_of_the_map_are_the_same(scale: float) -> None:
    got = assert_same(stock(scaling=(scale, scale)), labels_of(20, 1))
    assert got[0, 0, 0, 0] == -1


@pytest.mark.parametrize("border", ["zeros", "constant", "border", "reflection"])
@pytest.mark.parametrize("padding", [-1, 3, 77])
def test_what_is_outside_may_be_any_label(border: str, padding: int) -> None:
    assert_same(stock(border_mode_seg=border, padding_value_seg=padding, scaling=(1.5, 1.5)), labels_of(12, 2))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("angle", [0.0, np.pi / 4, np.pi / 2])
@pytest.mark.parametrize("size", [23, 24])
def test_ties_are_settled_alike(scale: float, angle: float, size: int) -> None:
    """Points right between voxels, where scores are equal; noise has more such places than anything else."""
    noise = torch.randint(0, 6, (1, *LARGER), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    assert_same(stock(patch_size=(size,) * 3, rotation=(angle, angle), scaling=(scale, scale)), noise)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_few_labels_are_the_same(count: int, scale: float) -> None:
    labels = labels_of(count, 3)
    labels[labels == -1] = 0
    assert_same(stock(scaling=(scale, scale)), labels)


def test_two_labels_in_a_larger_patch_are_the_same() -> None:
    """The original decides between two labels by the score of one of them, and so many points have near ties."""
    noise = torch.randint(0, 2, (1, 96, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    assert_same(stock(patch_size=(72,) * 3, scaling=(0.7, 0.7), padding_value_seg=0), noise)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_several_maps_of_any_whole_numbers(dtype: torch.dtype) -> None:
    """The cascade's labels of the previous stage are a map of their own; one of them has a single label."""
    maps = torch.cat([labels_of(30, 4), labels_of(5, 5), torch.full((1, *LARGER), 7, dtype=torch.int16)])
    assert_same(stock(scaling=(0.7, 0.7), padding_value_seg=0), maps.clamp_min(0).to(dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {"seg_tiebreak": "highest"}, {"seg_tiebreak": "lowest"}, {"align_corners": True}, {"mode_seg": "nearest"},
        {"bg_style_seg_sampling": True}, {"p_rotation": 0, "p_scaling": 0}, {"p_elastic_deform": 1},
    ],
)  # fmt: skip
def test_other_settings_are_the_same(settings: dict[str, Any]) -> None:
    assert_same(stock(**settings), labels_of(9, 6))


def test_slices_are_the_same() -> None:
    flat = stock(patch_size=PATCH[1:])
    assert_same(flat, labels_of(20, 7)[:, 15])


def test_it_travels_to_workers_and_leaves_the_original_alone() -> None:
    transform = stock()
    before = copy.copy(vars(transform))
    local = pickle.loads(pickle.dumps(LocalLabelTransform.like(transform)))
    labels = labels_of(9, 8)
    np.random.seed(0)
    there = local(image=torch.zeros(labels.shape), segmentation=labels)["segmentation"]
    assert torch.equal(there, both(transform, labels, 0)[0])
    assert vars(transform) == before


@pytest.mark.parametrize("nearest", [False, True])
def test_trainers_use_it_where_labels_are_interpolated(dataset: object, nearest: bool) -> None:
    trainer = make(plans=narrow_plans(nearest_labels=nearest))
    transforms = trainer.get_training_transforms([40, 56, 40], (-0.5, 0.5), None, (0, 1, 2), False, [False])
    (spatial,) = (t for t in transforms.transforms if isinstance(t, SpatialTransform))
    assert isinstance(spatial, LocalLabelTransform) is not nearest
    assert (spatial.p_rotation, spatial.scaling, spatial.padding_value_seg) == (0.2, (0.7, 1.4), -1)
