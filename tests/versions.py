"""What needs newer versions than the earliest that the package allows. The bounds are what was seen, not the first."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

_IS_NEW = torch.__version__ >= "2.15"
FAKE_CUDA = pytest.mark.skipif(not _IS_NEW, reason="PyTorch 2.7 asks the driver about fake CUDA tensors, and aborts")
WHOLE_GRAPHS = pytest.mark.skipif(not _IS_NEW, reason="the compiler of PyTorch 2.7 breaks graphs at generators")
CPUS_AVERAGE = _IS_NEW
"""Whether gloo averages where sharding asks for it. That of PyTorch 2.7 sums, and sharding refuses it."""


def replace_in_os(patch: Callable[[Any, str, Any], object], name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of one of ``os``, for ``Path`` too, which looks elsewhere for it in Python 3.10."""
    for owner in (os, getattr(pathlib, "_NormalAccessor", os)):
        patch(owner, name, staticmethod(function))
