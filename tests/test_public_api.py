"""What ``import stunet`` gives."""

from __future__ import annotations

import stunet


def test_public_names() -> None:
    assert sorted(stunet.__all__) == ["__version__"]
