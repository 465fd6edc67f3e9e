"""Weights of one STU-Net into another that has other channels or other structures."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stunet.errors import CheckpointError, LabelError, UsageError
from stunet.labels.labels import Labels, Outputs, match_names, vocabulary_for
from stunet.settings import HeadPolicy, StemPolicy
from stunet.weights.convert import SourceWeights, UNetWeights, open_any_weights
from stunet.weights.read import describe_mismatch

_STEM = ("encoder.stages.0.0.conv1.", "encoder.stages.0.0.projection.")
_STEM_WEIGHTS = tuple(f"{name}weight" for name in _STEM)  # whose shape depends on the input channels
HEADS = "decoder.seg_layers."


@dataclass(frozen=True)
class TransferReport:
    """What became of every parameter."""

    source: str  # file that the weights come from
    copied: tuple[str, ...]  # parameters taken as they are
    adapted: Mapping[str, str]  # how each other parameter was filled from the source, by name
    fresh: tuple[str, ...]  # parameters that keep the target's own initialisation; heads begin at 0
    structures: Mapping[str, str | None]  # of each output the source's name of it; None where its row begins at 0
    unused_structures: tuple[str, ...]  # outputs of the source that no output of the target corresponds to
    input_channels: tuple[int, int]  # channels of source and target
    stem: StemPolicy  # the policy for the stem, see adapt_stem
    head: HeadPolicy  # the policy for the heads
    head_remark: str = ""  # why no names were compared; empty where they were

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        stem = {"policy": self.stem, "source": self.input_channels[0], "target": self.input_channels[1]}
        head = {"policy": self.head, "remark": self.head_remark, "structures": dict(self.structures)}
        head["unused"] = list(self.unused_structures)
        filled = {"copied": list(self.copied), "adapted": dict(self.adapted), "fresh": list(self.fresh)}
        return {"source": self.source, "stem": stem, "head": head, **filled}

    def rows(self) -> list[tuple[str, str, str]]:
        """Return rows of a table: what, how many, and which or how."""
        renamed = [f"{t} from {s}" if s != t else t for t, s in self.structures.items() if s is not None]
        new = [name for name, source in self.structures.items() if source is None]
        channels = "{} to {} channels".format(*self.input_channels)
        stem = [how for key, how in self.adapted.items() if key in _STEM_WEIGHTS]
        return [
            ("parameters copied", str(len(self.copied)), ""),
            ("parameters adapted", str(len(self.adapted)), ""),
            ("parameters fresh", str(len(self.fresh)), ", ".join(self.fresh[:4]) + (" …" if self.fresh[4:] else "")),
            ("stem", self.stem, f"{channels}: {stem[0]}" if stem else channels),
            ("structures copied", str(len(renamed)), _some(renamed)),
            ("structures fresh", str(len(new)), _some(new) + (f" ({self.head_remark})" if self.head_remark else "")),
            ("structures unused", str(len(self.unused_structures)), _some(self.unused_structures)),
        ]


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def source_outputs(weights: SourceWeights | UNetWeights) -> Outputs | None:
    """Return what the outputs of weights stand for: their ``dataset.json``, or the published order; None if unknown."""
    num_classes = weights.architecture.num_classes
    if weights.pretext is not None:  # nothing has trained its heads
        return None
    labels = (weights.init_args.get("dataset_json") or {}).get("labels")
    if isinstance(labels, dict) and labels:
        outputs = Labels({"labels": labels}).outputs
        return outputs if len(outputs.names) == num_classes else None
    try:
        return Outputs(vocabulary_for(num_classes).labels, exclusive=True)
    except LabelError:
        return None


def transfer_weights(
    weights: SourceWeights | UNetWeights,
    network: nn.Module,
    outputs: Outputs | None,
    *,
    stem: StemPolicy = "repeat-scaled",
    head: HeadPolicy = "by-name",
) -> TransferReport:
    """Fill a network with the weights of another one, in place.

    All parameters between stem and heads are copied as they are. Rows of the heads are copied at all decoder levels for
    structures that both networks have, whatever their spelling (``match_names``). A row of a softmax
    says nothing but in comparison with the others, so a network of regions, with a sigmoid each, gets the difference to
    the background's row: the log-odds of structure against background. All other rows become 0 (as in BiT, arXiv
    1912.11370): random ones would give logits of any size on features that are trained, which drown those of the
    structures that are known, and whose gradients destroy the features within some iterations. Whatever else is not
    filled keeps the network's own initialisation. Nothing random is drawn, so equal networks stay equal on all ranks.

    Args:
        weights: The source.
        network: The target; may be on the meta device, for the report alone.
        outputs: What the target's outputs stand for; the target must be a STU-Net then. None for any module, which gets
            the tensors that have its names and shapes.
        stem: What to do with the stem where the input channels differ; ``random`` leaves it fresh in any case.
        head: ``by-name``, or ``fresh`` to let all rows begin at 0; ``fresh-decoder`` also leaves the decoder as it is.

    Returns:
        What became of each parameter.

    Raises:
        CheckpointError: Source and target differ in axes or size; nothing was changed.
        UsageError: An unknown policy, or outputs that the network does not have.
    """
    for name, value, policies in (("stem", stem, get_args(StemPolicy)), ("head", head, get_args(HeadPolicy))):
        if value not in policies:
            raise UsageError(f"unknown policy {value} for the {name}: give one of {', '.join(policies)}")
    target: dict[str, Tensor] = network.state_dict(keep_vars=True)
    origin: Outputs | None = None
    structures: dict[str, str | None] = {}
    remark = "heads by shape, as their labels were not given"
    if outputs is not None:
        _check_fit(weights, target, outputs)
        origin, structures = source_outputs(weights), dict.fromkeys(outputs.names)
        remark = "fresh heads were asked for" if head != "by-name" else "the source does not say what its outputs are"
        if origin is not None and head == "by-name":
            structures, remark = match_names(origin.names, outputs.names), ""
    matched = {row: source for row, source in enumerate(structures.values()) if source is not None}
    filled: dict[str, str] = {}
    taken = "encoder" if head == "fresh-decoder" else weights.trained
    with torch.no_grad():
        for key, parameter in target.items():
            tensor = weights.tensors.get(key) if key.startswith(taken) else None
            filled[key] = "fresh"
            if key.startswith(HEADS) and (outputs is not None or head != "by-name"):
                parameter.zero_()
                if tensor is not None:
                    filled[key] = _fill_head(parameter, tensor, origin, outputs, matched)
            elif tensor is None or (stem == "random" and key.startswith(_STEM)):
                continue
            elif tensor.shape == parameter.shape:
                parameter.copy_(tensor)
                filled[key] = "copied"
            elif key in _STEM_WEIGHTS and tensor[:, 0].shape == parameter[:, 0].shape:
                parameter.copy_(adapt_stem(tensor, parameter, stem))
                filled[key] = _STEM_DESCRIPTIONS[stem]
    copied, fresh = (tuple(key for key, how in filled.items() if how == kind) for kind in ("copied", "fresh"))
    if not copied:
        mismatch = describe_mismatch(weights.tensors, target)
        raise CheckpointError(f"nothing in {weights.path} fits the network: {mismatch}; give weights of such a network")
    adapted = {key: how for key, how in filled.items() if how not in ("copied", "fresh")}
    used, channels = set(structures.values()), weights.architecture.input_channels
    unused = tuple(name for name in origin.names if name not in used) if origin else ()
    both = channels, target[_STEM_WEIGHTS[0]].shape[1] if _STEM_WEIGHTS[0] in target else channels
    path = str(weights.path)
    return TransferReport(path, copied, adapted, fresh, structures, unused, both, stem, head, remark)


_STEM_DESCRIPTIONS = {
    "repeat-scaled": "channels repeated and divided",
    "first": "leading channels copied, the others fresh",
    "zero-new": "leading channels copied, the others 0",
}


def adapt_stem(weight: Tensor, fresh: Tensor, policy: StemPolicy) -> Tensor:
    """A stem's weight for another number of input channels.

    Args:
        weight: The source's weight, ``(C_out, C_source, k, k[, k])``.
        fresh: The target's own weight, ``(C_out, C_target, k, k[, k])``.
        policy: ``repeat-scaled``: target channel j gets source channel ``j mod C_source``, divided by how many channels
            get it; of more source channels than target channels those that fall together are added. Where channels
            that share one source channel hold the same image, the stem's output is the source's. ``first``: channels
            that both have are copied, new ones stay as in ``fresh``. ``zero-new``: new ones are 0, so that training
            begins as if they were not there. ``random``: ``fresh`` as it is.

    Returns:
        A new tensor of the shape of ``fresh``.
    """
    n_source, n_target = weight.shape[1], fresh.shape[1]
    weight = weight.to(fresh)
    if policy == "random":
        return fresh.detach().clone()
    if policy == "repeat-scaled":
        if n_target < n_source:
            folded = torch.zeros_like(fresh)
            return folded.index_add_(1, torch.arange(n_source, device=fresh.device) % n_target, weight)
        index = [channel % n_source for channel in range(n_target)]
        sharing = torch.tensor([index.count(channel) for channel in index], device=fresh.device)
        return weight[:, index] / sharing.reshape(1, -1, *[1] * (weight.ndim - 2))
    adapted = torch.zeros_like(fresh) if policy == "zero-new" else fresh.detach().clone()
    shared = min(n_source, n_target)
    adapted[:, :shared] = weight[:, :shared]
    return adapted


def _fill_head(
    parameter: Tensor, tensor: Tensor, origin: Outputs | None, outputs: Outputs | None, matched: Mapping[int, str]
) -> str:
    """Copy rows of one head's weight or bias and say what was done."""
    if outputs is None or origin is None or not matched:
        return "fresh"
    to_regions = origin.exclusive and not outputs.exclusive
    for row, name in matched.items():
        value = tensor[origin.names.index(name)]
        parameter[row].copy_(value - tensor[0] if to_regions else value)
    if origin.names == outputs.names and not to_regions:
        return "copied"
    return f"{len(matched)} of {len(outputs.names)} rows by name" + (", against background" if to_regions else "")


def _check_fit(weights: SourceWeights | UNetWeights, target: Mapping[str, Tensor], outputs: Outputs) -> None:
    if _STEM_WEIGHTS[0] not in target:
        raise UsageError("labels are for the heads of a STU-Net, which this network is not: leave them out")
    n_axes = target[_STEM_WEIGHTS[0]].ndim - 2
    if (trained := weights.architecture.n_axes) != n_axes:
        text = f"a {n_axes}D network from {trained}D weights, {weights.path}: kernels trained on {trained} axes have no"
        raise CheckpointError(f"{text} counterpart on {n_axes}, choose a {trained}D configuration or other weights")
    flexible = (*_STEM_WEIGHTS, HEADS)
    source = {key: tensor for key, tensor in weights.tensors.items() if not key.startswith(flexible)}
    fixed = {key: parameter for key, parameter in target.items() if not key.startswith(flexible)}
    if mismatch := describe_mismatch(source, fixed):
        text = f"{weights.path} has weights of another size than the network"
        raise CheckpointError(f"{text}: {mismatch}; `stunet plan --from CHECKPOINT` takes the size from the weights")
    n_outputs = next(parameter.shape[0] for key, parameter in target.items() if key.startswith(HEADS))
    if len(outputs.names) != n_outputs or len(set(outputs.names)) != len(outputs.names):
        raise UsageError(f"{len(outputs.names)} names for the network's outputs, not {n_outputs} different names")


def load_weights(
    network: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    stem: StemPolicy = "repeat-scaled",
    head: HeadPolicy = "by-name",
    trust: Sequence[str] = (),
) -> TransferReport:
    """Fill a network with the weights of a file, by name and shape and without running code out of the file.

    With ``labels``, the network must be a STU-Net of the weights' size, and the rows of its heads go by name
    (:func:`transfer_weights`). Without, any module gets the tensors that have its names and shapes, and the stem of a
    STU-Net is adapted to its channels; the rest stays as it is.

    Args:
        network: The network, changed in place.
        checkpoint: What :func:`stunet.weights.convert.open_any_weights` reads.
        labels: What each output of the network stands for, background first.
        stem: As for :func:`transfer_weights`.
        head: Likewise.
        trust: Further classes that the plans in the file may name, see :func:`stunet.weights.read.check_network`.

    Returns:
        What became of each parameter.

    Raises:
        CheckpointError: The file cannot be read safely, or nothing in it fits; the network is unchanged.
        UsageError: An unknown policy, or labels that are not one for each output.

    >>> import tempfile, torch
    >>> from stunet.network import STUNetSize, build_stunet
    >>> tiny, strides = STUNetSize("tiny", (1,) * 6, 2), [1, 2, 2, 2, 2, 1]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(build_stunet(tiny, 1, 3, strides).state_dict(), f"{folder}/x.pth")
    ...     report = load_weights(build_stunet(tiny, 2, 4, strides), f"{folder}/x.pth")
    >>> report.input_channels, len(report.adapted), sorted(report.fresh)[0]
    ((1, 2), 2, 'decoder.seg_layers.0.bias')
    """
    outputs = None if labels is None else Outputs(tuple(labels), exclusive=True)
    return transfer_weights(open_any_weights(checkpoint, trust), network, outputs, stem=stem, head=head)
