"""Dice and cross-entropy on marginal probabilities, as one function of the logits with a gradient of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from stunet.errors import LossError
from stunet.losses.annotation import Partition, check_members, label_members, partition_outputs
from stunet.losses.checks import check_annotated, check_target
from stunet.losses.chunks import Case, Coefficients, Sums, batch_gradient, batch_sums

__all__ = ["PartialDiceCELoss", "partial_dice_ce_loss"]

# nnU-Net's bound of the denominator of Dice.
_SMALLEST_DENOMINATOR = 1e-8


class PartialDiceCELoss(nn.Module):
    """:func:`partial_dice_ce_loss` with fixed settings, in the place of nnU-Net's loss.

    It takes logits and target alone, so that nnU-Net's ``DeepSupervisionWrapper`` can hold it; what the batch annotates
    is set around the call::

        with loss.annotated_in(mask):
            output = wrapper(logits, targets)

    Args:
        members: ``(L, C)`` of :func:`label_members`, or the number of outputs where each label is an output.
        batch_dice, smooth, ignore_label, ddp, weight_ce, weight_dice: As of the function.

    Raises:
        LossError: Members or ignore label that no loss can have.
    """

    def __init__(
        self,
        members: Tensor | int,
        *,
        batch_dice: bool,
        smooth: float = 1e-5,
        ignore_label: int | None = None,
        ddp: bool = False,
        weight_ce: float = 1,
        weight_dice: float = 1,
    ) -> None:
        super().__init__()
        self.members = check_members(label_members(members) if isinstance(members, int) else members)
        self.settings = _Settings(batch_dice, smooth, ignore_label, ddp, weight_ce, weight_dice)
        self.settings.check(self.members)
        self._annotated: Tensor | None = None

    @contextmanager
    def annotated_in(self, annotated: Tensor | None) -> Iterator[None]:
        """Within this context, the batch annotates these labels; outside, every case annotates every output.

        Args:
            annotated: As for :func:`partial_dice_ce_loss`.
        """
        before, self._annotated = self._annotated, annotated
        try:
            yield
        finally:
            self._annotated = before

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits ``(B, C, X, Y[, Z])`` and label values ``(B, [1,] X, Y[, Z])`` to the loss, a scalar."""
        return _loss(logits, target, self._annotated, self.members, self.settings)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        labels, outputs = self.members.shape
        return f"labels={labels}, outputs={outputs}, {self.settings}"


def partial_dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor | None = None,
    *,
    members: Tensor | None = None,
    batch_dice: bool,
    smooth: float = 1e-5,
    ignore_label: int | None = None,
    ddp: bool = False,
    weight_ce: float = 1,
    weight_dice: float = 1,
) -> Tensor:
    """Soft Dice and cross-entropy of a softmax where each case annotates only some structures.

    In each case the probabilities of the outputs that it does not annotate are merged into the background *as
    probabilities*, and a superclass has the sum of its outputs' (marginal loss, Shi et al. 2021, arXiv 2007.03868):
    with E(v) the outputs that voxel v's label stands for,

        CE = mean over voxels of -log q_v,  q_v = sum of softmax(z_v) over E(v).

    Dice is computed on the same probabilities, over annotated foreground labels alone and averaged over those that are
    annotated in any case of the batch (``batch_dice``) or over all annotated pairs of case and label; a label that is
    annotated and absent counts. The result is ``weight_ce * CE - weight_dice * Dice``. Where all cases annotate
    everything this is nnU-Net's ``DC_and_CE_loss`` with ``MemoryEfficientSoftDiceLoss`` and ``do_bg=False``.

    A voxel with a label that its case does not annotate counts as the annotated superclass that contains the label, or
    else as (merged) background; if the label only overlaps with annotated ones, the voxel is left out of both terms.

    With ``ddp`` the batch is that of all processes, whose shares of it may differ in size and annotation: sums are
    added up over the processes, in one collective a call, which each process joins whatever its cases annotate. The
    mean of the processes' losses is the loss of the joined batch, and so is the mean of their gradients, which is what
    ``DistributedDataParallel`` forms. (A process's cross-entropy is its own sum times the number of processes over the
    joint number of voxels; Dice with ``batch_dice`` is the joint one everywhere.) The processes' losses must be scaled
    alike before ``backward``, which communicates nothing.

    Memory beyond the logits is their gradient and chunks of constant size. Softmax and gradient are computed in fp32 or
    the logits' precision, whichever is higher. There is no second derivative.

    Args:
        logits: ``(B, C, X, Y[, Z])``, output 0 being the background.
        target: ``(B, X, Y[, Z])`` or ``(B, 1, X, Y[, Z])``, label values of any type.
        annotated: ``(B, L)``, boolean: which label values each case annotates. Label 0 is not read. None where each
            case annotates every single output.
        members: ``(L, C)`` of :func:`label_members`; None where each label is an output.
        batch_dice: Dice of each structure over the batch, as one image, instead of in each case.
        smooth: Added to numerator and denominator of Dice.
        ignore_label: Label value of voxels that count in neither term.
        ddp: Whether the batch is spread over the processes of the default group.
        weight_ce: Weight of the cross-entropy.
        weight_dice: Weight of Dice.

    Returns:
        The loss, a scalar.

    Raises:
        LossError: Shapes that do not fit together, label values beyond the labels, a case that annotates labels with a
            common output, or ``ddp`` without a process group.
    """
    if members is None:
        members = label_members(logits.shape[1] if logits.ndim > 1 else 0)
    members = check_members(members)
    settings = _Settings(batch_dice, smooth, ignore_label, ddp, weight_ce, weight_dice)
    settings.check(members)
    return _loss(logits, target, annotated, members, settings)


@dataclass(frozen=True)
class _Settings:
    batch_dice: bool
    smooth: float
    ignore_label: int | None
    ddp: bool
    weight_ce: float
    weight_dice: float

    def check(self, members: Tensor) -> None:
        if self.ignore_label is not None and 0 <= self.ignore_label < len(members):
            raise LossError(
                "an ignore label that stands for outputs",
                got=self.ignore_label,
                expected=f"a value that is none of the {len(members)} labels",
                remedy=f"Give it the value {len(members)}, as nnU-Net does.",
            )


def _loss(logits: Tensor, target: Tensor, annotated: Tensor | None, members: Tensor, settings: _Settings) -> Tensor:
    target = check_target(logits, target, members, settings.ignore_label)
    if annotated is None:
        annotated = (members.sum(1) == 1).expand(len(logits), -1)
    annotated = check_annotated(annotated, len(logits), len(members))
    if settings.ddp and not (dist.is_available() and dist.is_initialized()):
        raise LossError(
            "a loss over several processes without a process group",
            got="ddp=True",
            expected="torch.distributed.init_process_group called before",
            remedy="Set ddp=False, or start the processes with nnU-Net's -num_gpus or torchrun.",
        )
    partitions = [partition_outputs(members, row, case) for case, row in enumerate(annotated)]
    loss: Tensor = _PartialDiceCE.apply(logits, target, annotated, partitions, settings)
    return loss


class _PartialDiceCE(torch.autograd.Function):
    """The loss with its gradient computed anew from the logits, so that nothing of their size is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, annotated: Tensor, partitions: list[Partition], settings: _Settings
    ) -> Tensor:
        target = target.flatten(1)
        with torch.autocast(logits.device.type, enabled=False):
            sums = batch_sums(_cases(logits, target, partitions, settings))
            value, coefficients = _combine(sums, annotated.to(logits.device), settings)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ctx.save_for_backward(logits, target, *(c.to(dtype) for c in coefficients))
        ctx.partitions, ctx.settings = partitions, settings
        return value.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, *coefficients = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            # Scaled before the gradient is rounded to the logits' precision, which may be half.
            nu, alpha, beta = (c * grad_output for c in coefficients)
            by = [Coefficients(nu, *pair) for pair in zip(alpha, beta, strict=True)]
            batch_gradient(_cases(logits, target, ctx.partitions, ctx.settings), by, gradient.flatten(2))
        return gradient, None, None, None, None


def _cases(logits: Tensor, target: Tensor, partitions: list[Partition], settings: _Settings) -> list[Case]:
    return [
        Case(one, labels, partition, settings.ignore_label)
        for one, labels, partition in zip(logits.flatten(2), target, partitions, strict=True)
    ]


def _combine(sums: list[Sums], annotated: Tensor, settings: _Settings) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss and its derivatives nu ``()``, alpha ``(B, L)`` and beta ``(B, L)`` by the cases' sums."""
    world = dist.get_world_size() if settings.ddp else 1
    by_label = torch.stack([s.by_label for s in sums], 1)  # (3, B, L)
    cross_entropy = torch.stack([s.cross_entropy for s in sums]).sum()
    voxels = torch.stack([s.voxels for s in sums]).sum()
    mask = annotated.to(by_label.dtype)
    by_label = by_label * mask
    pairs = mask
    if settings.batch_dice:
        by_label, pairs = by_label.sum(1, keepdim=True), mask.sum(0, keepdim=True)
    n_pairs = pairs.sum()
    if settings.ddp:
        joint = [voxels[None], n_pairs[None], *([pairs[0], by_label.flatten()] if settings.batch_dice else [])]
        flat = torch.cat(joint)
        dist.all_reduce(flat)
        voxels, n_pairs = flat[0], flat[1]
        if settings.batch_dice:
            pairs, by_label = flat[2 : 2 + pairs.numel()][None], flat[2 + pairs.numel() :].view(by_label.shape)
    present = (pairs > 0).to(mask.dtype)
    count = (present.sum() if settings.batch_dice else n_pairs).clamp_min(1)
    voxels = voxels.clamp_min(1)

    intersection, prediction, reference = by_label
    denominator = reference + prediction + settings.smooth
    bounded = denominator.clamp_min(_SMALLEST_DENOMINATOR)
    dice = (2 * intersection + settings.smooth) / bounded * present / count
    alpha = 2 * present / bounded / count
    beta = torch.where(denominator >= _SMALLEST_DENOMINATOR, dice / bounded, 0)
    scale = world * settings.weight_dice
    value_dice = dice.sum() * (1 if settings.batch_dice else world)
    value = settings.weight_ce * world * cross_entropy / voxels - settings.weight_dice * value_dice
    return value, (settings.weight_ce * world / voxels, scale * alpha * mask, scale * beta * mask)
