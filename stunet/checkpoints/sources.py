"""Weights out of any file that holds a STU-Net: nnU-Net v1, the old v2 port, nnU-Net v2, safetensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stunet.checkpoints.archives import load_archive
from stunet.checkpoints.extent import check_extent
from stunet.checkpoints.inspection import Architecture, infer_architecture
from stunet.checkpoints.key_map import from_published_key
from stunet.checkpoints.pickles import read_pickle
from stunet.errors import CheckpointError

__all__ = ["SourceWeights", "open_weights"]

Kind = Literal["nnU-Net v1", "old nnU-Net v2 port", "nnU-Net v2", "safetensors", "plain tensors"]

_HALF = (torch.float16, torch.bfloat16)
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class SourceWeights:
    """Weights and all that their files say about them.

    Attributes:
        path: The file with the weights.
        kind: What wrote it.
        published_names: Whether the parameters had the published code's names.
        tensors: The weights by our names, fp32, on the CPU; mapped from the file where that is possible.
        architecture: What their shapes say.
        precision: The precision in the file, for example ``float16``.
        v1_plans: Plans of nnU-Net v1; empty where no pickle was given or found.
        v1_init: The positional arguments of the v1 trainer; empty likewise.
        pickles: The pickles that these come from.
        init_args: What nnU-Net v2 keeps in its checkpoints: ``plans``, ``configuration``, ``dataset_json``.
        mirroring_axes: The axes that nnU-Net v2 may mirror in prediction.
        epoch: Epochs that the weights were trained for, where the file says it.
    """

    path: Path
    kind: Kind
    published_names: bool
    tensors: dict[str, Tensor]
    architecture: Architecture
    precision: str
    v1_plans: dict[str, Any] = field(default_factory=dict)
    v1_init: tuple[Any, ...] = ()
    pickles: tuple[Path, ...] = ()
    init_args: dict[str, Any] = field(default_factory=dict)
    mirroring_axes: tuple[int, ...] | None = None
    epoch: int | None = None


def open_weights(paths: Sequence[str | os.PathLike[str]]) -> SourceWeights:
    """Read a STU-Net's weights without running code out of any file.

    Args:
        paths: One file with weights, or one model folder, and any number of nnU-Net v1 pickles (``.pkl``), in any
            order. Where ``X.model`` is given, ``X.model.pkl`` and ``plans.pkl`` beside it are read too.

    Returns:
        The weights under our names, without the prefixes of ``DataParallel`` and ``torch.compile``, as fp32.

    Raises:
        CheckpointError: A file is missing, truncated or unsafe, the weights are not finite, or not a STU-Net's.
    """
    path, pickles = _sort_paths([Path(path) for path in paths])
    content, state, kind = _read_state(path)
    if kind == "nnU-Net v1" or path.suffix == ".model":
        pickles += [p for p in _pickles_beside(path) if p.resolve() not in {q.resolve() for q in pickles}]
    v1_plans, v1_init = _read_v1(pickles)
    named, published = _our_names(_strip(state, path), path)
    architecture = infer_architecture({key: tensor for key, (_, tensor) in named.items()}, source=str(path))
    precisions = sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in named.values()})
    epoch = content.get("epoch", content.get("current_epoch"))
    return SourceWeights(
        path=path,
        kind="old nnU-Net v2 port" if kind == "nnU-Net v2" and published else kind,
        published_names=published,
        tensors={key: _finite_float32(name, tensor, path) for key, (name, tensor) in named.items()},
        architecture=architecture,
        precision=" and ".join(precisions),
        v1_plans=v1_plans,
        v1_init=v1_init,
        pickles=tuple(pickles),
        init_args=_known_args(content.get("init_args"), path),
        mirroring_axes=_known_axes(content.get("inference_allowed_mirroring_axes"), path),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _sort_paths(given: list[Path]) -> tuple[Path, list[Path]]:
    """The file with the weights, and the pickles."""
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


def _pickles_beside(path: Path) -> list[Path]:
    candidates = (path.with_name(f"{path.name}.pkl"), path.with_name("plans.pkl"))
    return [candidate for candidate in candidates if candidate.is_file()]


def _read_state(path: Path) -> tuple[Mapping[str, Any], Mapping[Any, Any], Kind]:
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
    raise CheckpointError(
        "a file without weights",
        got=f"{path}: {f'a dictionary with {keys}' if keys else f'a {type(content).__name__}'}",
        expected="'state_dict' (nnU-Net v1), 'network_weights' (nnU-Net v2), or tensors alone",
        remedy="Give the .model file of nnU-Net v1 or a checkpoint of nnU-Net v2.",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError("missing checkpoint", got=path, expected="a file", remedy="Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "a safetensors file that is truncated or damaged",
            got=f"{path} ({path.stat().st_size} bytes): {str(error)[:200]}",
            expected="a whole file",
            remedy="Copy it again.",
        ) from error


def _read_v1(pickles: Sequence[Path]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Plans and trainer arguments out of ``.model.pkl`` and ``plans.pkl``, which must not contradict each other."""
    plans: dict[str, Any] = {}
    init: tuple[Any, ...] = ()
    for path in pickles:
        content = read_pickle(path)
        inner = content.get("plans", content) if isinstance(content, dict) else None
        if not isinstance(inner, dict) or not {"normalization_schemes", "plans_per_stage"} & set(inner):
            raise CheckpointError(
                "a pickle without plans",
                got=path,
                expected="a .model.pkl or plans.pkl of nnU-Net v1",
                remedy="Give the pickle that was published with the weights, or leave it out.",
            )
        for key in ("normalization_schemes", "use_mask_for_norm", "num_classes", "num_modalities", "transpose_forward"):
            if key in plans and key in inner and _plain(plans[key]) != _plain(inner[key]):
                raise CheckpointError(
                    "pickles that contradict each other",
                    got=f"{key}: {str(plans[key])[:80]} and, in {path.name}, {str(inner[key])[:80]}",
                    expected="pickles of one model",
                    remedy="Give the pickles that were published with the weights.",
                )
        if isinstance(content.get("init"), tuple):
            init = content["init"]
        # Only plans that were in use name each stage, so those go first whatever the order on the command line.
        plans = {**plans, **inner} if "plans_per_stage" in inner else {**inner, **plans}
    return plans, init


def _known_args(init_args: Any, path: Path) -> dict[str, Any]:
    try:
        check_extent(init_args)
    except ValueError as error:
        raise _bad_tensor(path, f"init_args are {error}") from None
    return init_args if isinstance(init_args, dict) else {}


def _known_axes(axes: Any, path: Path) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) and 0 <= axis < 3 for axis in axes):
        raise _bad_tensor(path, f"inference_allowed_mirroring_axes of type {type(axes).__name__} that are no axes")
    return tuple(axes)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _strip(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise _bad_tensor(path, f"a {type(key).__name__} as a name")
        name = _PREFIX.sub("", key)
        if name in stripped:
            raise _bad_tensor(path, f"{name} twice, with and without a prefix")
        stripped[name] = _check_tensor(name, tensor, path)
    return stripped


def _check_tensor(name: str, tensor: Any, path: Path) -> Tensor:
    """Check what a tensor claims to be before anything is computed with it."""
    if not isinstance(tensor, Tensor):
        raise _bad_tensor(path, f"{name} is a {type(tensor).__name__}")
    if tensor.dtype not in (*_HALF, torch.float32):
        raise _bad_tensor(path, f"{name} is {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise _bad_tensor(path, f"{name} is a tensor without data ({tensor.layout}, {tensor.device.type})")
    if math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
        # A view that repeats its elements: a small file that would fill the memory.
        raise _bad_tensor(path, f"{name} is {tuple(tensor.shape)}, more than its {tensor.untyped_storage().nbytes()} B")
    return tensor.detach()


def _our_names(state: dict[str, Tensor], path: Path) -> tuple[dict[str, tuple[str, Tensor]], bool]:
    """Tensors, with the names that they had in the file, by our names; and whether those were the published ones."""
    published = any(name.startswith(("conv_blocks_", "seg_outputs.", "upsample_layers.")) for name in state)
    try:
        renamed = {(from_published_key(name) if published else name): (name, tensor) for name, tensor in state.items()}
    except CheckpointError as error:
        raise CheckpointError(
            "weights of another network than STU-Net",
            got=f"{path}: {error.got[:200]}, and {len(state) - 1} more parameters",
            expected="a parameter of the published STU-Net code",
            remedy="Give weights of a STU-Net; other networks cannot be converted.",
        ) from None
    return renamed, published


def _finite_float32(name: str, tensor: Tensor, path: Path) -> Tensor:
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


def _bad_tensor(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        "a file with something else than weights",
        got=f"{path}: {problem}",
        expected="dense tensors of fp32, fp16 or bf16, each under one name",
        remedy="Give the weights as they were published or saved.",
    )
