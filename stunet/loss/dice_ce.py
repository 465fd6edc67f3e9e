"""Dice and cross-entropy on marginal probabilities, as one function of the logits with a gradient of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from stunet.errors import LossError
from stunet.loss.annotation import Partition, check_members, label_members, partition_outputs
from stunet.loss.checks import check_annotated, check_labels, check_target
from stunet.loss.chunks import Case, Coefficients, batch_gradient, batch_sums, count_voxels
from stunet.loss.combination import Joint, LossSettings, combine, count_of, total_of
from stunet.loss.whole_batch import WholeBatch

__all__ = ["PartialDiceCELoss", "partial_dice_ce_loss"]


class PartialDiceCELoss(nn.Module):
    """:func:`partial_dice_ce_loss` with fixed settings, in the place of nnU-Net's loss.

    It takes logits and target alone, so that nnU-Net's ``DeepSupervisionWrapper`` can hold it; what the batch annotates
    is set around the call::

        with loss.annotated_in(mask):
            output = wrapper(logits, targets)

    A batch that is too large can be computed in pieces, of which each is counted before the first is computed::

        whole = WholeBatch()
        with torch.no_grad():
            for logits, targets in pieces:
                with loss.counted_in(whole):
                    wrapper(logits, targets)
        for logits, targets in pieces:
            with loss.as_part_of(whole):
                wrapper(logits, targets).backward()

    The pieces' losses add up to the whole batch's loss, and so do their gradients, whatever the pieces' sizes and
    annotations.

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
        self.settings = LossSettings(batch_dice, smooth, ignore_label, ddp, weight_ce, weight_dice)
        self.settings.check(self.members)
        self._annotated: Tensor | None = None
        self._counting: WholeBatch | None = None
        self._whole: WholeBatch | None = None

    @property
    def counts_probabilities(self) -> bool:
        """Whether counting a piece takes its logits; elsewhere the targets are enough."""
        return self.settings.batch_dice

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

    @contextmanager
    def counted_in(self, whole: WholeBatch) -> Iterator[None]:
        """Within this context, the calls add one piece of a batch to the sums over it, and return 0.

        Logits are read with ``batch_dice`` only; elsewhere anything may stand in their place.

        Args:
            whole: The batch.

        Raises:
            LossError: Some piece has been computed already.
        """
        whole.begin_counting()
        self._counting = whole
        try:
            yield
        finally:
            self._counting = None

    @contextmanager
    def as_part_of(self, whole: WholeBatch) -> Iterator[None]:
        """Within this context, the calls return what one piece contributes to the loss of a batch.

        The first time, with ``ddp``, the processes add up their sums, so each of them must come here.

        Args:
            whole: The batch, all of whose pieces are counted.
        """
        whole.begin_computing(ddp=self.settings.ddp)
        self._whole = whole
        try:
            yield
        finally:
            self._whole = None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits ``(B, C, X, Y[, Z])`` and label values ``(B, [1,] X, Y[, Z])`` to the loss, a scalar."""
        if self._counting is not None:
            total = _count(logits, target, self._annotated, self.members, self.settings)
            self._counting.add(total)
            return torch.zeros((), device=total.device)
        joint = None if self._whole is None else self._whole.next_output()
        return _loss(logits, target, self._annotated, self.members, self.settings, joint)

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
        LossError: An empty batch, shapes that do not fit together, values that are no labels, a case that annotates
            labels with a common output, or ``ddp`` without a process group.
    """
    if members is None:
        members = label_members(logits.shape[1] if logits.ndim > 1 else 0)
    members = check_members(members)
    settings = LossSettings(batch_dice, smooth, ignore_label, ddp, weight_ce, weight_dice)
    settings.check(members)
    return _loss(logits, target, annotated, members, settings)


def _loss(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor | None,
    members: Tensor,
    settings: LossSettings,
    joint: Joint | None = None,
) -> Tensor:
    target = check_target(logits, target, members, settings.ignore_label)
    annotated = _complete(annotated, len(logits), members)
    if settings.ddp and not (dist.is_available() and dist.is_initialized()):
        raise LossError(
            "a loss over several processes without a process group",
            got="ddp=True",
            expected="torch.distributed.init_process_group called before",
            remedy="Set ddp=False, or start the processes with nnU-Net's -num_gpus or torchrun.",
        )
    partitions = [partition_outputs(members, row, case) for case, row in enumerate(annotated)]
    loss: Tensor = _PartialDiceCE.apply(logits, target, annotated, partitions, settings, joint)
    return loss


def _count(logits: Tensor, target: Tensor, annotated: Tensor | None, members: Tensor, settings: LossSettings) -> Tensor:
    annotated = _complete(annotated, len(target), members)
    partitions = [partition_outputs(members, row, case) for case, row in enumerate(annotated)]
    if not settings.batch_dice:
        target = check_labels(target, members, settings.ignore_label)
        flat = target.flatten(1)
        counts = [count_voxels(row, p, settings.ignore_label) for row, p in zip(flat, partitions, strict=True)]
        return count_of(torch.stack(counts).sum(), annotated.to(target.device))
    target = check_target(logits, target, members, settings.ignore_label).flatten(1)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        sums = batch_sums(_cases(logits, target, partitions, settings))
    return total_of(sums, annotated.to(logits.device), settings)


def _complete(annotated: Tensor | None, batch_size: int, members: Tensor) -> Tensor:
    if annotated is None:
        annotated = (members.sum(1) == 1).expand(batch_size, -1)
    return check_annotated(annotated, batch_size, len(members))


class _PartialDiceCE(torch.autograd.Function):
    """The loss with its gradient computed anew from the logits, so that nothing of their size is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        annotated: Tensor,
        partitions: list[Partition],
        settings: LossSettings,
        joint: Joint | None,
    ) -> Tensor:
        target = target.flatten(1)
        with torch.autocast(logits.device.type, enabled=False):
            sums = batch_sums(_cases(logits, target, partitions, settings))
            value, coefficients = combine(sums, annotated.to(logits.device), settings, joint)
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
        return gradient, None, None, None, None, None


def _cases(logits: Tensor, target: Tensor, partitions: list[Partition], settings: LossSettings) -> list[Case]:
    return [
        Case(one, labels, partition, settings.ignore_label)
        for one, labels, partition in zip(logits.flatten(2), target, partitions, strict=True)
    ]
