"""Weights written back in the published format."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from stunet.errors import CheckpointError
from stunet.files import atomic_path, refuse_existing
from stunet.weights.key_map import to_published_key
from stunet.weights.sources import SourceWeights

__all__ = ["write_published"]


def write_published(weights: SourceWeights, path: str | os.PathLike[str]) -> None:
    """Write a ``.model`` file as the published nnU-Net v1 code reads it, whole or not at all.

    Args:
        weights: The weights; each tensor is written as it is.
        path: The new file.

    Raises:
        CheckpointError: The file cannot be written, or the network is 2D, which the published code has not.
        UsageError: The file exists.
    """
    path = Path(path)
    refuse_existing(path)
    if weights.architecture.n_axes != 3:
        raise CheckpointError("a 2D network, which the published code does not have", got=weights.path,
                              expected="a 3D STU-Net", remedy="Keep it in nnU-Net v2's format.")  # fmt: skip
    content: dict[str, Any] = {
        "epoch": weights.epoch or 0,
        "state_dict": OrderedDict((to_published_key(key), tensor) for key, tensor in weights.tensors.items()),
        "optimizer_state_dict": None,
        "lr_scheduler_state_dict": None,
        "plot_stuff": ([], [], [], []),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a file that cannot be written",
            got=f"{path}: {str(error).strip().splitlines()[0][:200]}",
            expected=f"a folder with {sum(t.nbytes for t in weights.tensors.values()) / 2**30:.1f} GB of free space",
            remedy="Make room, or choose another place with -o. No unfinished file was left.",
        ) from error
