"""Weights out of any file that holds a STU-Net: nnU-Net v1, the old v2 port, nnU-Net v2, safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stunet.errors import CheckpointError, reading
from stunet.weights.inspection import Architecture, infer_architecture
from stunet.weights.key_map import from_published_key
from stunet.weights.networks import check_network, described_network
from stunet.weights.pickles import read_pickle
from stunet.weights.states import Kind, bad_tensor, finite_float32, known_args, read_state, sort_paths, strip_prefixes

__all__ = ["SourceWeights", "open_weights"]


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


def open_weights(paths: Sequence[str | os.PathLike[str]], *, trust: Sequence[str] | None = None) -> SourceWeights:
    """Read a STU-Net's weights without running code out of any file.

    Args:
        paths: One file with weights, or one model folder, and any number of nnU-Net v1 pickles (``.pkl``), in any
            order. Where ``X.model`` is given, ``X.model.pkl`` and ``plans.pkl`` beside it are read too.
        trust: Check the network that the plans in the checkpoint name, too, and admit these classes beyond the known
            ones; see :func:`stunet.weights.check_network`. None where nothing will be built of these plans.

    Returns:
        The weights under our names, without the prefixes of ``DataParallel`` and ``torch.compile``, as fp32.

    Raises:
        CheckpointError: A file is missing, truncated or unsafe, the weights are not finite, or not a STU-Net's.
    """
    path, pickles = sort_paths([Path(path) for path in paths])
    return stunet_weights(path, *read_state(path), pickles, trust=trust)


def stunet_weights(
    path: Path,
    content: Mapping[str, Any],
    state: Mapping[Any, Any],
    kind: Kind,
    pickles: Sequence[Path] = (),
    *,
    trust: Sequence[str] | None = None,
) -> SourceWeights:
    """What :func:`open_weights` returns, of a file that is read already.

    Args:
        path: The file.
        content: All that it holds.
        state: The weights in it.
        kind: What wrote it.
        pickles: Pickles of nnU-Net v1 that were given with it.
        trust: Further classes that the plans may name, see :func:`check_network`; None not to look at them.

    Raises:
        CheckpointError: As for :func:`open_weights`.
    """
    init_args = known_args(content.get("init_args"))
    if trust is not None and (described := described_network(init_args, path)) is not None:
        check_network(described, source=str(path), trust=trust)
    pickles = list(pickles)
    if kind == "nnU-Net v1" or path.suffix == ".model":
        pickles += [p for p in _pickles_beside(path) if p.resolve() not in {q.resolve() for q in pickles}]
    v1_plans, v1_init = _read_v1(pickles)
    with reading(path, "a checkpoint that cannot be used"):
        named, published = _our_names(strip_prefixes(state, path), path)
        architecture = infer_architecture({key: tensor for key, (_, tensor) in named.items()}, source=str(path))
        precisions = sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in named.values()})
        epoch = content.get("epoch", content.get("current_epoch"))
        return SourceWeights(
            path=path,
            kind="old nnU-Net v2 port" if kind == "nnU-Net v2" and published else kind,
            published_names=published,
            tensors={key: finite_float32(name, tensor, path) for key, (name, tensor) in named.items()},
            architecture=architecture,
            precision=" and ".join(precisions),
            v1_plans=v1_plans,
            v1_init=v1_init,
            pickles=tuple(pickles),
            init_args=init_args,
            mirroring_axes=_known_axes(content.get("inference_allowed_mirroring_axes"), path),
            epoch=epoch if isinstance(epoch, int) else None,
        )


def _pickles_beside(path: Path) -> list[Path]:
    candidates = (path.with_name(f"{path.name}.pkl"), path.with_name("plans.pkl"))
    return [candidate for candidate in candidates if candidate.is_file()]


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
                raise CheckpointError("pickles that contradict each other",
                                      got=f"{key}: {str(plans[key])[:80]} and, in {path.name}, {str(inner[key])[:80]}",
                                      expected="pickles of one model",
                                      remedy="Give the pickles that were published with the weights.")  # fmt: skip
        if isinstance(content.get("init"), tuple):
            init = content["init"]
        # Only plans that were in use name each stage, so those go first whatever the order on the command line.
        plans = {**plans, **inner} if "plans_per_stage" in inner else {**inner, **plans}
    return plans, init


def _known_axes(axes: Any, path: Path) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) and 0 <= axis < 3 for axis in axes):
        raise bad_tensor(path, f"inference_allowed_mirroring_axes of type {type(axes).__name__} that are no axes")
    return tuple(axes)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


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
