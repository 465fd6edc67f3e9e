from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stunet.errors import ArchitectureError
from stunet.network import SIZES, STUNetSize, find_size, size_of


def test_sizes_are_those_of_the_paper(shared: Path) -> None:
    published = json.loads((shared / "facts" / "stunet_tables.json").read_text())["sizes"]
    assert {
        name: {"depth": size.depth[0], "width": size.width, "features": list(size.features)}
        for name, size in SIZES.items()
    } == {name: {k: row[k] for k in ("depth", "width", "features")} for name, row in published.items()}
    assert all(len(set(size.depth)) == 1 for size in SIZES.values())


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_recognised_by_its_network(name: str) -> None:
    size = find_size(name)
    assert size_of(list(size.features), list(size.depth)) is size


def test_a_size_of_ones_own_gets_a_name() -> None:
    size = STUNetSize("mine", (1, 1, 2, 2, 2, 2), 24)
    assert size.features == (24, 48, 96, 192, 384, 384)
    assert size_of(size.features, size.depth).name == "d112222w24"
    assert size_of(size.features, (1, 1, 2, 2, 2, 12)).name == "d1-1-2-2-2-12w24"


@pytest.mark.parametrize(
    ("depth", "width"),
    [((1, 1, 1), 16), ((1,) * 5 + (0,), 16), ((1,) * 5 + (-1,), 16), ((1,) * 6, 0), ((1,) * 6, -8), ((1,) * 6, 1.5)],
)
def test_impossible_sizes(depth: tuple[int, ...], width: Any) -> None:
    with pytest.raises(ArchitectureError, match="impossible"):
        STUNetSize("bad", depth, width)


def test_unknown_size_lists_the_known() -> None:
    with pytest.raises(ArchitectureError, match=r"giant[\s\S]*small, base, large, huge"):
        find_size("giant")


def test_channels_that_no_stunet_has() -> None:
    with pytest.raises(ArchitectureError, match="no STU-Net has"):
        size_of([16, 32, 64, 128, 256, 512], [1] * 6)
