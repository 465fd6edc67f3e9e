"""What a label says about the outputs, given what its case annotates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stunet.errors import LossError


def label_members(num_outputs: int, superclasses: Mapping[int, Collection[int]] | None = None) -> Tensor:
    """Which outputs each label value stands for.

    Label values up to ``num_outputs - 1`` are the outputs themselves, 0 the background. A superclass is a further label
    value that stands for the union of several outputs, as ``kidney`` for the left and the right one.

    Args:
        num_outputs: C, outputs of the network, background included.
        superclasses: Outputs by label value. The values continue where the outputs end.

    Returns:
        ``(L, C)``, boolean: row l has the outputs of label value l.

    Raises:
        LossError: Label values with gaps, or a superclass with fewer than two outputs or with one that does not exist.

    >>> label_members(3, {3: (1, 2)}).int()[3]
    tensor([0, 1, 1], dtype=torch.int32)
    """
    superclasses = superclasses or {}
    expected = list(range(num_outputs, num_outputs + len(superclasses)))
    if sorted(superclasses) != expected:
        raise LossError(f"superclass values {sorted(superclasses)} do not follow the outputs: number them {expected}")
    members = torch.eye(num_outputs + len(superclasses), num_outputs, dtype=torch.bool)
    for label, outputs in superclasses.items():
        if len(set(outputs)) < 2 or not all(0 < output < num_outputs for output in outputs):
            got = f"superclass {label} cannot consist of outputs {sorted(outputs)}"
            raise LossError(f"{got}: name two or more of 1 to {num_outputs - 1}")
        members[label, list(outputs)] = True
    return members


def check_members(members: Tensor) -> Tensor:
    """The same matrix on the CPU, after checking that label 0 is output 0 alone and no two labels say the same.

    Raises:
        LossError: It is not such a matrix.
    """
    fits = members.ndim == 2 and members.dtype == torch.bool and min(members.shape) >= 2
    if fits:
        members = members.detach().cpu()
        only_background = torch.zeros_like(members[0])
        only_background[0] = True
        fits = (
            torch.equal(members[0], only_background)
            and not bool(members[1:, 0].any())
            and bool(members.any(1).all())
            and len(torch.unique(members, dim=0)) == len(members)
        )
    if not fits:
        got = f"{members.dtype} {tuple(members.shape)} are members that do not say which outputs a label stands for"
        raise LossError(f"{got}: make them with stunet.loss.label_members")
    return members


@dataclass(frozen=True)
class Partition:
    """How one case's annotation divides the outputs C into those told apart and those known only by their sum.

    The background is a set together with all outputs that the case does not annotate, an annotated superclass a set of
    its outputs. All other annotated outputs are single.

    Attributes:
        order: ``(C,)``, the outputs set by set, then the single ones; None where that is their own order.
        sets: Where each set starts and stops in that order.
        singles: Where the first single output is.
        owner: ``(C,)`` in that order: the label of which Dice counts an output, 0 for none.
        tables: ``(3, L + 1)``, looked up by label value, the last column for voxels that are to be left out: the label
            that a voxel counts as (L: it is left out), its set (``len(sets)``: a single output), its output in that
            order (single ones only).
    """

    order: Tensor | None
    sets: tuple[tuple[int, int], ...]
    singles: int
    owner: Tensor
    tables: Tensor


def partition_outputs(members: Tensor, annotated: Tensor, case: int = 0) -> Partition:
    """Divide the outputs for one case.

    A voxel with a label that the case does not annotate counts as the annotated superclass that contains all its
    outputs; where it shares no output with an annotated label, as background; otherwise it says nothing certain, and is
    left out.

    Args:
        members: ``(L, C)``, as of :func:`label_members`.
        annotated: ``(L,)``, boolean, on the CPU. Label 0 is not read.
        case: Index in the batch, for the message.

    Raises:
        LossError: Two annotated labels share an output.
    """
    n_labels, n_outputs = members.shape
    owned = members & annotated[:, None]
    owned[0] = False
    if bool((owned.sum(0) > 1).any()):
        shared = int(owned.sum(0).argmax())
        got = f"labels {owned[:, shared].nonzero().flatten().tolist()}, which both contain output {shared}"
        raise LossError(f"case {case} of the batch annotates labels that share outputs: {got}; correct the manifest")
    owner = owned.int().argmax(0)  # 0 where no row has it
    size = torch.bincount(owner, minlength=n_labels + 1)
    in_set = size[owner] > 1
    order = torch.where(in_set, owner, n_labels).argsort(stable=True)
    set_labels = (size > 1).nonzero().flatten()
    stops = size[set_labels].cumsum(0).tolist()
    starts = [0, *stops[:-1]] if stops else []

    # A label whose outputs all have one owner counts as that owner; an annotated label owns its own.
    lowest = torch.where(members, owner, n_labels).amin(1)
    highest = torch.where(members, owner, -1).amax(1)
    left_out = torch.tensor([n_labels])
    counts_as = torch.cat([torch.where(lowest == highest, lowest, n_labels), left_out])
    set_of = torch.full((n_labels + 1,), len(set_labels))
    set_of[set_labels] = torch.arange(len(set_labels))
    output_of = torch.zeros(n_labels + 1, dtype=torch.long)
    output_of[owner[order]] = torch.arange(n_outputs)
    return Partition(
        order=order if len(set_labels) else None,
        sets=tuple(zip(starts, stops, strict=True)),
        singles=stops[-1] if stops else 0,
        owner=owner[order],
        tables=torch.stack([counts_as, set_of[counts_as], output_of[counts_as]]),
    )
