"""The checkpoints to choose from: where they are, and the networks that read a target's images with them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from stunet.environment import did_you_mean
from stunet.errors import CheckpointError, UsageError, reading
from stunet.forms import decode, read_document
from stunet.network import STUNet, build_stunet
from stunet.ranking.points import SourceHead
from stunet.settings import StemPolicy
from stunet.weights.convert import UNetWeights, open_any_weights
from stunet.weights.published import cached_weights, load_registry
from stunet.weights.transfer import adapt_stem, source_outputs

_HEADS = "decoder.seg_layers."


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    path: Annotated[str, msgspec.Meta(min_length=1)]
    name: str | None = None


class _Zoo(msgspec.Struct, forbid_unknown_fields=True):
    checkpoints: list[_Entry]


def read_zoo(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Read a zoo file.

    It is YAML (or JSON) with a list under ``checkpoints``; each entry has a ``path``, relative to the file, and may
    have a ``name``::

        checkpoints:
          - name: base, TotalSegmentator
            path: models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all/checkpoint_final.pth
          - path: other/checkpoint_best.pth

    Returns:
        Paths by name, in the order of the file.

    Raises:
        UsageError: Missing, not YAML, unknown keys, a name twice, or paths at which there is nothing.
    """
    with reading(path, "a zoo file that cannot be used", UsageError, remedy="correct it"):
        entries = decode(read_document(path), _Zoo).checkpoints
    if not entries:
        raise UsageError(f"the list of checkpoints in {path} is empty: give at least one")
    defaults = name_checkpoints([Path(path).parent / Path(entry.path).expanduser() for entry in entries])
    names = [entry.name or default for entry, default in zip(entries, defaults, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{path} names {', '.join(twice)} twice: give each checkpoint a name of its own")
    return dict(zip(names, defaults.values(), strict=True))


def name_checkpoints(checkpoints: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Give checkpoints short names that tell them apart: what differs in their paths.

    Args:
        checkpoints: Files, model folders, or names of published weights that were fetched.

    Returns:
        Paths by name, in this order.

    Raises:
        CheckpointError: Published weights that were not fetched.
        UsageError: A path twice, or nothing there.
    """
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    if missing := [path for path in paths if not path.exists()]:
        known = load_registry()
        paths = [cached_weights(str(path)) if path in missing and str(path) in known else path for path in paths]
        if gone := [str(path) for path in paths if not path.exists()]:
            meant = did_you_mean(gone[0], known)
            raise UsageError(f"nothing at {', '.join(gone)}: {meant}`stunet weights list` names what is published")
    paths = [path.resolve() for path in paths]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise UsageError(f"checkpoint {', '.join(twice)} is given twice: leave one out")
    # Of each path the last parts that tell it apart, without parts that all of them have.
    parts = [[*path.parts[1:-1], path.stem if path.is_file() else path.name] for path in paths]
    common = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    parts = [[part for part in own if part not in common] or own for own in parts]
    for n in range(1, max(map(len, parts), default=0) + 1):
        named = {"/".join(own[-n:]): path for own, path in zip(parts, paths, strict=True)}
        if len(named) == len(paths):
            return named
    return {str(path): path for path in paths}  # they differ in their suffix alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A checkpoint as a network that features of a target's images can be read from.

    Attributes:
        network: In evaluation mode, on the CPU. Its own heads are 0 and say nothing.
        head: The checkpoint's finest head; None where its outputs are regions, which do not exclude each other.
        patch_size: The smallest patch that it takes and that is no smaller than the target's. A STU-Net takes the
            target's own; one of nnU-Net's networks has the strides that it was trained with.
        description: For JSON: the ``path``; the ``network``, for example ``STU-Net base``; ``parameters``, heads left
            out; ``n_axes``; ``source_channels`` and ``input_channels`` of the images, and what was done with the
            ``stem`` where these differ; ``n_outputs``; what the ``outputs`` stand for, background first, None where
            nothing says it, and whether they are ``exclusive``; the ``epoch``.
    """

    network: nn.Module
    head: SourceHead | None
    patch_size: tuple[int, ...]
    description: dict[str, Any]


def build_candidate(
    path: str | os.PathLike[str],
    *,
    input_channels: int,
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    trust: Sequence[str] = (),
    stem: StemPolicy = "repeat-scaled",
) -> Candidate:
    """Build the network that a checkpoint belongs to, for a target's images, and load it.

    A STU-Net of whatever size gets the target's strides, on which its weights do not depend. One of nnU-Net's networks
    keeps its own: its transposed convolutions have their shape. All parameters but those of the heads are taken; the
    stem is adapted where the target has other channels.

    Args:
        path: As for :func:`stunet.weights.convert.open_any_weights`.
        input_channels: Channels of the target's images.
        patch_size: Voxels of the target's patch; two axes in a 2D configuration.
        strides: Stride of each of STU-Net's six stages for each axis, see :func:`stunet.planning.fit_strides`.
        trust: Classes that the plans of checkpoints may name, see :func:`stunet.weights.networks.check_network`.
        stem: What to do with the stem, see :func:`stunet.weights.transfer.adapt_stem`; what it leaves fresh is the
            same for every checkpoint of one shape.

    Raises:
        ArchitectureError: Strides or channels that no STU-Net has.
        CheckpointError: The file cannot be read, its weights are not finite, or have another number of axes.
    """
    weights = open_any_weights(path, trust)
    architecture, n_axes = weights.architecture, weights.architecture.n_axes
    if n_axes != len(patch_size):
        got = f"{weights.path} holds {n_axes}D weights for {len(patch_size)}D patches"
        raise CheckpointError(f"{got}: choose a {n_axes}D configuration of the target, or leave this checkpoint out")
    # One output, which nobody looks at: a map of logits for a hundred classes would take more than the features.
    with torch.device("meta"):  # initialisation would take long
        if isinstance(weights, UNetWeights):
            name, network = weights.architecture.name, weights.architecture.build(input_channels, 1)
        else:
            name, size = f"STU-Net {weights.architecture.size.name}", weights.architecture.size
            conv_op = nn.Conv3d if n_axes == 3 else nn.Conv2d
            network = build_stunet(size, input_channels, 1, strides, conv_op=conv_op)
    network = _filled(network.to_empty(device="cpu"), weights.tensors, stem).eval()
    stride = np.prod(network.encoder.strides, axis=0)  # type: ignore[union-attr, arg-type]
    fitted = np.ceil(np.array(patch_size) / stride).astype(int) * stride
    if (fitted == stride).all():  # norms need more than one voxel at the coarsest stage
        fitted[0] *= 2
    origin = source_outputs(weights)
    exclusive = origin is None or origin.exclusive  # nnU-Net's own way, where nothing speaks against it
    return Candidate(
        network=network,
        head=finest_head(weights.tensors, source=str(weights.path)) if exclusive else None,
        patch_size=tuple(fitted.tolist()),
        description={
            "path": str(weights.path),
            "network": name,
            "parameters": sum(p.numel() for name, p in network.named_parameters() if not name.startswith(_HEADS)),
            "n_axes": n_axes,
            "source_channels": architecture.input_channels,
            "input_channels": input_channels,
            "stem": stem if stem == "random" or architecture.input_channels != input_channels else "",
            "n_outputs": architecture.num_classes,
            "outputs": None if origin is None else origin.names,
            "exclusive": exclusive,
            "epoch": weights.epoch,
        },
    )


@torch.no_grad()
def _filled(network: nn.Module, tensors: Mapping[str, Tensor], stem: StemPolicy) -> nn.Module:
    """Fill a network that has no values yet: all from the checkpoint, heads with 0, the stem by the policy."""
    stems = ("encoder.stages.0.0.conv1", "encoder.stages.0.0.projection")
    if not isinstance(network, STUNet):
        stems = tuple(network.keys_to_in_proj)  # type: ignore[arg-type] # each of nnU-Net's networks says it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the policies that leave some of it fresh
        for name in stems:
            network.initialize(network.get_submodule(name))  # type: ignore[operator]
    # nnU-Net's decoders own the encoder too, and have its parameters under a second name.
    of_stems = tuple(f"{name}.{kind}" for name in stems for kind in ("weight", "bias"))
    for key, parameter in network.state_dict(keep_vars=True).items():
        if key.startswith(_HEADS):
            parameter.zero_()
        elif tensors[key].shape != parameter.shape:
            parameter.copy_(adapt_stem(tensors[key], parameter, stem))
        elif stem != "random" or not key.endswith(of_stems):
            parameter.copy_(tensors[key])
    return network


def finest_head(tensors: Mapping[str, Tensor], *, source: str) -> SourceHead:
    """Return the last of the decoder's heads, which STU-Net and nnU-Net's networks order from coarse to fine.

    Args:
        tensors: A state dict.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: No head, or one that is no convolution of one voxel.
    """
    heads = (re.fullmatch(r"decoder\.seg_layers\.(\d+)\.weight", key) for key in tensors)
    level = max((int(match[1]) for match in heads if match), default=0)
    weight, bias = (tensors.get(f"{_HEADS}{level}.{kind}") for kind in ("weight", "bias"))
    if weight is None or weight[0, 0].numel() != 1:
        got = f"{_HEADS}{level}.weight of {source} {'is missing' if weight is None else tuple(weight.shape)}"
        raise CheckpointError(f"{got}: give the weights of a whole network, with heads (K, C, 1, 1[, 1])")
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return SourceHead(f"decoder.stages.{level}", weight.detach().flatten(1).float(), bias.detach().float())
