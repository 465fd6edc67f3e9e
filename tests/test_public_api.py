"""What ``import stunet`` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stunet

NAMES = [
    "PartialDiceCELoss", "STUNet", "__version__", "create_model", "evaluate", "list_models", "load_model",
    "load_weights", "predict", "rank",
]  # fmt: skip


def test_names() -> None:
    assert sorted(stunet.__all__) == NAMES == sorted(dir(stunet))
    for name in NAMES:
        assert getattr(stunet, name).__doc__
    with pytest.raises(AttributeError, match="segment"):
        _ = stunet.segment  # type: ignore[attr-defined]


def test_import_is_quick() -> None:
    code = "import sys, stunet; assert not {'torch', 'nnunetv2', 'SimpleITK', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
