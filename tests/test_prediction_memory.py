"""Estimates of memory, and what a budget chooses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from prediction_models import NARROW, write_model
from torch import nn

from stunet.errors import UsageError
from stunet.inference import Predictor, load_model, parse_memory
from stunet.inference.folders import available_bytes, plan_memory
from stunet.inference.images import Geometry
from stunet.memory import estimate, peak_forward_bytes

GB = 2**30
WHOLE_BODY = Geometry((900, 512, 512), (0.8, 0.8, 0.8), 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * GB), ("0.5 gb", GB // 2), ("700M", 700 * 2**20), ("1TiB", 2**40), ("1024", 1024), ("3k", 3072)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "0", "1,5GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="8GB"):
        parse_memory(text)


def test_forward_pass() -> None:
    """Two layers: the input, the first output, the second; the input and both outputs live when the second is made."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.Conv3d(5, 7, 3, padding=1))
    assert peak_forward_bytes(network, (1, 1, 10, 10, 10)) == 4 * 1000 * (1 + 5 + 7)


def test_all_classes_of_a_whole_body_fit_in_4_gb(tmp_path: Path) -> None:
    predictor = Predictor(load_model(write_model(tmp_path / "m", num_classes=105, patch=(96,) * 3, spacing=(1.5,) * 3)))
    plan, need = plan_memory(predictor, [WHOLE_BODY], budget=4 * GB, n_preparing=0, n_writing=0)
    assert (plan.axis, plan.average_folds) == (0, False)
    grid = (480, 273, 273)
    slab = 2 * 96 * grid[1] * grid[2] * 105
    assert need > slab + estimate(NARROW, patch_size=(96,) * 3, batch_size=1, num_classes=105).inference_bytes


def test_what_is_given_up_first(tmp_path: Path) -> None:
    """Processes, then bits of the result: other axes only where they are shorter, folds one by one last."""
    folder = write_model(tmp_path / "m", num_classes=60, patch=(96, 32, 32), folds=("0", "1", "2"), spacing=(1.5,) * 3)
    predictor = Predictor(load_model(folder))
    geometry = Geometry((120, 400, 400), (1.5, 1.5, 1.5), 2)
    first, need = plan_memory(predictor, [geometry], budget=10**12)
    assert (first.axis, first.average_folds, first.n_preparing, first.n_writing) == (0, False, 1, 1)
    order = []
    while True:
        try:
            plan, need = plan_memory(predictor, [geometry], budget=need - 1)
        except UsageError:
            break
        order.append((plan.axis, plan.average_folds, plan.n_preparing))
    with pytest.raises(UsageError, match=f"{math.ceil(need / GB * 10) / 10:.1f}GB at least"):
        plan_memory(predictor, [geometry], budget=need - 1)
    assert order == [(0, False, 0), (1, False, 0), (1, True, 0)]


def test_the_least_is_enough(tmp_path: Path) -> None:
    predictor = Predictor(load_model(write_model(tmp_path / "m", num_classes=5)))
    with pytest.raises(UsageError) as caught:
        plan_memory(predictor, [WHOLE_BODY], budget=1)
    least = str(caught.value).split("GB at least")[0].split()[-1]
    assert plan_memory(predictor, [WHOLE_BODY], budget=parse_memory(f"{least}GB"))[1] <= parse_memory(f"{least}GB")


def test_memory_to_spare_is_a_sane_number() -> None:
    spare = available_bytes()
    assert spare is None or 2**20 < spare < 2**50
