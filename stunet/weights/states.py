"""What a file with weights holds, checked before anything is computed with it, whatever network it belongs to."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stunet.errors import CheckpointError, reading
from stunet.weights.archives import load_archive

__all__ = [
    "Kind",
    "bad_tensor",
    "finite_float32",
    "known_args",
    "locate_checkpoint",
    "read_state",
    "sort_paths",
    "strip_prefixes",
]

Kind = Literal["nnU-Net v1", "old nnU-Net v2 port", "nnU-Net v2", "safetensors", "plain tensors"]

_HALF = (torch.float16, torch.bfloat16)
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")


def sort_paths(given: Sequence[Path]) -> tuple[Path, list[Path]]:
    """The file with the weights, that of a model folder where one was given, and the pickles.

    Raises:
        CheckpointError: No file with weights, or more than one.
    """
    pickles = [path for path in given if path.suffix == ".pkl"]
    others = [path for path in given if path.suffix != ".pkl"]
    if len(others) != 1:
        raise CheckpointError(
            "no file with weights" if not others else "more than one file with weights",
            got=", ".join(map(str, given)) or "nothing",
            expected="one .model, .pth or .safetensors file or one model folder, and the .pkl files that belong to it",
            remedy="Give the weights themselves." if not others else "Convert one after the other.",
        )
    return _checkpoint_in(others[0]) if others[0].is_dir() else others[0], pickles


def locate_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file with the weights, that of a model folder where one was given.

    Raises:
        CheckpointError: Nothing there, or a folder without a checkpoint or with several.
    """
    found, _ = sort_paths([Path(path)])
    if not found.is_file():
        raise CheckpointError("missing checkpoint", got=found, expected="a file", remedy="Check the path.")
    return found


def _checkpoint_in(folder: Path) -> Path:
    checkpoints = sorted(folder.glob("fold_*/checkpoint_final.pth")) or sorted(folder.glob("checkpoint_final.pth"))
    if len(checkpoints) != 1:
        raise CheckpointError(
            "a folder with several checkpoints" if checkpoints else "a folder without a checkpoint",
            got=f"{folder}: {', '.join(str(p.relative_to(folder)) for p in checkpoints) or 'no checkpoint_final.pth'}",
            expected="a model folder with one fold_X/checkpoint_final.pth",
            remedy="Give the checkpoint itself.",
        )
    return checkpoints[0]


def read_state(path: Path) -> tuple[Mapping[str, Any], Mapping[Any, Any], Kind]:
    """All that a file holds, the weights in it as they are, and what wrote it.

    Raises:
        CheckpointError: The file is missing, truncated or unsafe, or holds no weights.
    """
    if path.suffix == ".safetensors":
        return {}, _read_safetensors(path), "safetensors"
    content = load_archive(path)
    if isinstance(content, dict):
        if isinstance(content.get("network_weights"), dict):
            return content, content["network_weights"], "nnU-Net v2"
        if isinstance(content.get("state_dict"), dict):
            return content, content["state_dict"], "nnU-Net v1"
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {}, content, "plain tensors"
    keys = ", ".join(str(key)[:40] for key in list(content)[:5]) if isinstance(content, dict) else ""
    raise CheckpointError("a file without weights",
                          got=f"{path}: {f'a dictionary with {keys}' if keys else f'a {type(content).__name__}'}",
                          expected="'state_dict' (nnU-Net v1), 'network_weights' (nnU-Net v2), or tensors alone",
                          remedy="Give the .model file of nnU-Net v1 or a checkpoint of nnU-Net v2.")  # fmt: skip


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError("missing checkpoint", got=path, expected="a file", remedy="Check the path.")
    try:
        with reading(path, "a safetensors file that is truncated or damaged"), safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise CheckpointError("a safetensors file that is truncated or damaged",
                              got=f"{path} ({path.stat().st_size} bytes): {str(error)[:200]}", expected="a whole file",
                              remedy="Copy it again.") from error  # fmt: skip


def known_args(init_args: Any) -> dict[str, Any]:
    """The ``init_args`` of a checkpoint of nnU-Net v2; empty where there are none."""
    return init_args if isinstance(init_args, dict) else {}


def strip_prefixes(state: Mapping[Any, Any], path: Path, names: int = 1) -> dict[str, Tensor]:
    """Tensors by their names without the prefixes of ``DataParallel`` and ``torch.compile``.

    Args:
        state: The weights.
        path: Their file.
        names: How many names a weight may have.

    Raises:
        CheckpointError: Something else than a tensor, a tensor that is not what it claims to be, or a name twice.
    """
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise bad_tensor(path, f"a {type(key).__name__} as a name")
        name = _PREFIX.sub("", key)
        if name in stripped:
            raise bad_tensor(path, f"{name} twice, with and without a prefix")
        stripped[name] = _check_tensor(name, tensor, path)
    n_bytes = sum(tensor.nbytes for tensor in stripped.values())
    if n_bytes > names * path.stat().st_size:  # a small file that would fill the memory
        raise bad_tensor(path, f"weights of {n_bytes} bytes that share those of the file")
    return stripped


def _check_tensor(name: str, tensor: Any, path: Path) -> Tensor:
    """Check what a tensor claims to be before anything is computed with it."""
    if not isinstance(tensor, Tensor):
        raise bad_tensor(path, f"{name} is a {type(tensor).__name__}")
    if tensor.dtype not in (*_HALF, torch.float32):
        raise bad_tensor(path, f"{name} is {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.detach()


def finite_float32(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor as fp32, without what it may be a view of.

    Raises:
        CheckpointError: Values that are not finite.
    """
    converted = tensor.float()
    # Smallest and largest value say it all, as NaN is both; unlike isfinite this needs no memory.
    if not all(math.isfinite(value.item()) for value in torch.aminmax(converted)):
        n_bad = int((~torch.isfinite(converted)).sum())
        raise CheckpointError(
            "weights that are not finite",
            got=f"{path}: {name} has {n_bad} NaN or infinite values of {converted.numel()}",
            expected="finite numbers",
            remedy="The training has diverged, or the file is damaged: take an earlier checkpoint or copy it again.",
        )
    if converted.untyped_storage().nbytes() != converted.numel() * converted.element_size():
        # Saving a view would save all that it is a view of.
        return converted.clone(memory_format=torch.contiguous_format)
    return converted


def bad_tensor(path: Path, problem: str) -> CheckpointError:
    """The error for something in a file that is no weight."""
    return CheckpointError("a file with something else than weights", got=f"{path}: {problem}",
                           expected="dense tensors of fp32, fp16 or bf16, each under one name",
                           remedy="Give the weights as they were published or saved.")  # fmt: skip
