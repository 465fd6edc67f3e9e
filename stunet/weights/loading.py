"""Checking nnU-Net checkpoints without running code out of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stunet.errors import CheckpointError
from stunet.weights.archives import load_archive

__all__ = ["check_weights", "describe_mismatch", "read_checkpoint"]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that nnU-Net v2 wrote, admitting tensors and plain values alone.

    Tensors are mapped from the file, not loaded; the file is read once, for its checksums.

    Args:
        path: A ``checkpoint_*.pth``.

    Returns:
        nnU-Net's checkpoint dictionary, with tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    checkpoint = load_archive(path)
    needed = {"network_weights": dict, "current_epoch": int}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), t) for k, t in needed.items()):
        raise CheckpointError("not a checkpoint of nnU-Net v2", got=f"{path}: {_describe(checkpoint)}",
                              expected="a dictionary with 'network_weights' and 'current_epoch'",
                              remedy="Give a checkpoint_*.pth that nnUNetv2_train wrote.")  # fmt: skip
    return checkpoint


def check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str | os.PathLike[str]
) -> None:
    """Check that weights fit a network, name by name and shape by shape.

    Args:
        weights: What the checkpoint holds.
        expected: The network's ``state_dict()``.
        source: The checkpoint's path, for messages.

    Raises:
        CheckpointError: Names the first parameters that are missing, surplus or of another shape.
    """
    mismatch = describe_mismatch(weights, expected)
    if mismatch:
        raise CheckpointError(
            "a checkpoint that does not fit the network",
            got=f"{os.fspath(source)}: {mismatch}",
            expected="the network that the plans describe",
            remedy="Use the plans that the checkpoint was trained with, or start a new training.",
        )


def describe_mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first parameters that are missing, surplus or of another shape, in words; empty where all fit.

    Args:
        weights: What the checkpoint holds.
        expected: The network's ``state_dict()``.
    """
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in the network" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary with {', '.join(str(key)[:60] for key in list(content)[:5]) or 'nothing in it'}"
    return f"a {type(content).__name__}"
