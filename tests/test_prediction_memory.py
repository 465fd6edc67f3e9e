"""Estimates of memory, and what a budget chooses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from prediction_models import NARROW, write_model
from torch import nn

from stunet.errors import UsageError
from stunet.inference import Geometry, available_bytes, choose_strategy, load_model, parse_memory, stock_bytes
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
    model = load_model(write_model(tmp_path / "m", num_classes=105, patch=(96,) * 3, spacing=(1.5,) * 3))
    strategy, need = choose_strategy(model, [WHOLE_BODY], budget=4 * GB, n_preparing=0, n_writing=0)
    assert strategy.exact
    grid = (480, 273, 273)
    slab = 2 * 96 * grid[1] * grid[2] * 105
    assert need > slab + estimate(NARROW, patch_size=(96,) * 3, batch_size=1, num_classes=105).inference_bytes
    # nnU-Net holds all logits in half and in double precision, and in half precision on the original grid.
    assert stock_bytes(model, WHOLE_BODY) > 105 * ((2 + 8) * math.prod(grid) + 2 * WHOLE_BODY.n_voxels)


def test_what_is_given_up_first(tmp_path: Path) -> None:
    """Processes, then bits of the result: other axes only where they are shorter, folds one by one last."""
    model = load_model(
        write_model(tmp_path / "m", num_classes=60, patch=(96, 32, 32), folds=("0", "1", "2"), spacing=(1.5,) * 3)
    )
    geometry = Geometry((120, 400, 400), (1.5, 1.5, 1.5), 2)
    first, need = choose_strategy(model, [geometry], budget=10**12)
    assert (first.axis, first.average_folds, first.n_preparing, first.n_writing) == (0, False, 1, 1)
    order = []
    while True:
        try:
            strategy, need = choose_strategy(model, [geometry], budget=need - 1)
        except UsageError:
            break
        order.append((strategy.axis, strategy.average_folds, strategy.n_preparing))
    with pytest.raises(UsageError, match=f"{math.ceil(need / GB * 10) / 10:.1f}GB at least"):
        choose_strategy(model, [geometry], budget=need - 1)
    assert order == [(0, False, 0), (1, False, 0), (1, True, 0)]


def test_the_least_is_enough(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "m", num_classes=5))
    with pytest.raises(UsageError) as caught:
        choose_strategy(model, [WHOLE_BODY], budget=1)
    least = caught.value.expected.split("GB")[0]
    assert choose_strategy(model, [WHOLE_BODY], budget=parse_memory(f"{least}GB"))[1] <= parse_memory(f"{least}GB")


def test_memory_to_spare_is_a_sane_number() -> None:
    spare = available_bytes()
    assert spare is None or 2**20 < spare < 2**50
