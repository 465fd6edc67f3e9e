"""What needs a newer PyTorch than the earliest that the package allows. The bounds are what was seen, not the first."""

from __future__ import annotations

import pytest
import torch

_IS_NEW = torch.__version__ >= "2.15"
FAKE_CUDA = pytest.mark.skipif(not _IS_NEW, reason="PyTorch 2.7 asks the driver about fake CUDA tensors, and aborts")
WHOLE_GRAPHS = pytest.mark.skipif(not _IS_NEW, reason="the compiler of PyTorch 2.7 breaks graphs at generators")
