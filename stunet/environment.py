"""nnU-Net's environment variables, read without nnU-Net, whose import takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from stunet.errors import NnUNetPathError

__all__ = ["nnunet_folder"]


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Args:
        variable: ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        NnUNetPathError: The variable is not set, or names no folder.
    """
    value = os.environ.get(variable)
    remedy = f"Set it, for example: export {variable}=/path/to/{variable}"
    if not value:
        raise NnUNetPathError(
            f"the environment variable {variable} is missing",
            got="nothing",
            expected="a folder",
            remedy=remedy,
        )
    if not Path(value).is_dir():
        raise NnUNetPathError(
            f"the environment variable {variable} names no folder",
            got=value,
            expected="a folder that exists",
            remedy=f"Create it (mkdir -p {value}), or set the variable to another folder.",
        )
    return Path(value)
