"""Checking nnU-Net checkpoints without running code out of them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stunet.errors import CheckpointError

__all__ = ["check_weights", "read_checkpoint"]


def _numpy_scalar_globals() -> list[Any]:
    """What a pickled numpy scalar names: nnU-Net keeps its logged losses and Dice as such."""
    # Its module has moved from one numpy to the next; how the scalar is pickled tells where it is now.
    scalar = np.float64(0).__reduce__()[0]
    dtype_classes = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u4", "u8", "?")}
    # Files are written with either module path, depending on the numpy of their time.
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *dtype_classes]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that nnU-Net v2 wrote, admitting tensors and plain values alone.

    Tensors are mapped from the file, not loaded: reading a checkpoint of many gigabytes costs next to nothing until
    its tensors are used.

    Args:
        path: A ``checkpoint_*.pth``.

    Returns:
        nnU-Net's checkpoint dictionary, with tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            "missing checkpoint",
            got=path,
            expected="a file",
            remedy="Check the path, or train the model first.",
        )
    if not zipfile.is_zipfile(path):
        # torch.save writes the archive's directory last, so a truncated file has none.
        raise CheckpointError(
            "a checkpoint that is truncated, or not a checkpoint",
            got=f"{path} ({path.stat().st_size} bytes)",
            expected="a whole file written by torch.save",
            remedy="Remove it and resume from another checkpoint of the fold, or copy it again.",
        )
    admitted = torch.serialization.safe_globals(_numpy_scalar_globals())
    try:
        with admitted:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(
            "a checkpoint that cannot be read safely",
            got=f"{path} {_reason(error)}",
            expected="tensors, numbers, strings and containers alone",
            remedy="Do not load files from sources that you do not trust. If this one is yours, copy it again.",
        ) from error
    needed = {"network_weights": dict, "current_epoch": int}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), t) for k, t in needed.items()):
        raise CheckpointError(
            "not a checkpoint of nnU-Net v2",
            got=f"{path}: {_describe(checkpoint)}",
            expected="a dictionary with 'network_weights' and 'current_epoch'",
            remedy="Give a checkpoint_*.pth that nnUNetv2_train wrote.",
        )
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
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in the network" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(
            "a checkpoint that does not fit the network",
            got=f"{os.fspath(source)}: {shown}",
            expected="the network that the plans describe",
            remedy="Use the plans that the checkpoint was trained with, or start a new training.",
        )


def _reason(error: Exception) -> str:
    # PyTorch's own message goes on to recommend loading without restraint.
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    return f"asks for {asked_for[1]}" if asked_for else f"({str(error).strip().splitlines()[0]})"


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary with {', '.join(map(str, list(content)[:5])) or 'nothing in it'}"
    return f"a {type(content).__name__}"
