"""Logits plane by plane are those of nnU-Net's predictor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from plans import configuration, make_plans
from stunet.errors import CheckpointError
from stunet.inference.predictor import average, mirror_and_predict, predict_planes

CPU = torch.device("cpu")
K = 4
DATASET_JSON = {"channel_names": {"0": "a", "1": "b"}, "labels": {f"s{i}": i for i in range(1, K)} | {"background": 0}}


def network(seed: int, n_axes: int = 3) -> nn.Module:
    """Not symmetric, so that mirroring shows."""
    torch.manual_seed(seed)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[n_axes]
    return nn.Sequential(conv(2, 5, 3, padding=1), nn.LeakyReLU(), conv(5, K, 3, padding=1)).eval()


def nnunets_logits(
    image: Tensor, networks: Sequence[nn.Module], patch: list[int], mirroring: tuple[int, ...] | None, step_size: float
) -> Tensor:
    plans = make_plans()
    plans["configurations"] = {"c": configuration("c", patch, [[1] * len(patch)])}
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(tile_step_size=step_size, device=CPU, allow_tqdm=False)
    predictor.manual_initialization(
        networks[0], manager, manager.get_configuration("c"), [n.state_dict() for n in networks], DATASET_JSON, "",
        mirroring,
    )  # fmt: skip
    first = {k: v.clone() for k, v in networks[0].state_dict().items()}
    predictor.list_of_parameters[0] = first
    logits: Tensor = predictor.predict_logits_from_preprocessed_data(image)
    networks[0].load_state_dict(first)
    return logits


def logits_by_planes(
    image: Tensor, networks: Sequence[Any], patch: list[int], step_size: float = 0.5, axis: int = 0
) -> Tensor:
    planes = predict_planes(image.numpy(), networks, patch, num_classes=K, step_size=step_size, axis=axis)
    return torch.stack([plane.clone() for plane in planes], 1).movedim(1, axis + 1)


@pytest.mark.parametrize("mirroring", [None, (0,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("n_folds", [1, 3])
def test_bit_for_bit_along_the_first_axis(mirroring: tuple[int, ...] | None, n_folds: int) -> None:
    torch.manual_seed(0)
    image, networks = torch.randn(2, 21, 17, 12), [network(i) for i in range(n_folds)]
    expected = nnunets_logits(image, networks, [8, 10, 12], mirroring, 0.5)
    before = image.clone()
    result = logits_by_planes(image, [partial(mirror_and_predict, n, mirroring) for n in networks], [8, 10, 12])
    assert torch.equal(result, expected)
    assert torch.equal(image, before)


@pytest.mark.parametrize("step_size", [0.3, 0.5, 1.0])
def test_step_sizes(step_size: float) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 19, 9, 13)
    expected = nnunets_logits(image, [network(0)], [8, 8, 8], None, step_size)
    assert torch.equal(
        logits_by_planes(image, [partial(mirror_and_predict, network(0), None)], [8, 8, 8], step_size), expected
    )


def test_a_2d_network_takes_plane_after_plane() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 5, 17, 12)
    expected = nnunets_logits(image, [network(0, 2)], [8, 10], (0, 1), 0.5)
    assert torch.equal(logits_by_planes(image, [partial(mirror_and_predict, network(0, 2), (0, 1))], [8, 10]), expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_along_another_axis_only_roundings_differ(axis: int) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 12, 17, 15)
    expected = nnunets_logits(image, [network(0)], [8, 10, 8], (1,), 0.5)
    result = logits_by_planes(image, [partial(mirror_and_predict, network(0), (1,))], [8, 10, 8], axis=axis)
    inside = (slice(None), *[slice(2, -2)] * 3)  # at the rim windows weigh next to nothing in half precision
    torch.testing.assert_close(result[inside], expected[inside], rtol=4e-3, atol=4e-3)
    assert not torch.equal(result, expected)


def test_folds_averaged_window_by_window_are_close_to_nnunets() -> None:
    torch.manual_seed(0)
    image, networks = torch.randn(2, 12, 17, 12), [network(i) for i in range(3)]
    expected = nnunets_logits(image, networks, [8, 10, 8], None, 0.5)
    combined = partial(average, [partial(mirror_and_predict, n, None) for n in networks])
    inside = (slice(None), *[slice(2, -2)] * 3)
    torch.testing.assert_close(
        logits_by_planes(image, [combined], [8, 10, 8])[inside], expected[inside], rtol=4e-3, atol=4e-3
    )


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e6])
def test_logits_that_half_precision_cannot_hold(bad: float) -> None:
    image = torch.zeros(2, 8, 8, 8)
    with pytest.raises(CheckpointError, match="half precision"):
        logits_by_planes(image, [lambda window: torch.full((1, K, 8, 8, 8), bad)], [8, 8, 8])


def test_windows_and_their_callback() -> None:
    """Four windows along the first axis, one along the second and two along the third, for each of two folds."""
    calls: list[int] = []
    planes = predict_planes(
        np.zeros((2, 20, 8, 12), np.float32), [network(0), network(1)], (8, 8, 8), num_classes=K, on_window=calls.append
    )
    next(planes)
    assert calls == [16] * 4  # the windows that reach the first plane, and no other
    assert sum(1 for _ in planes) == 19
    assert len(calls) == 16
