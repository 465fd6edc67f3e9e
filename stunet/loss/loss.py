"""Dice and cross-entropy on marginal probabilities, as one function of the logits with a gradient of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from stunet.errors import LossError
from stunet.loss.chunks import Case, Coefficients, Sums, batch_gradient, batch_sums, count_voxels
from stunet.loss.partition import Partition, check_members, label_members, partition_outputs
from stunet.network import aliases, is_recorded, is_transformed

# nnU-Net's bound of the denominator of Dice.
_SMALLEST_DENOMINATOR = 1e-8


class WholeBatch:
    """What the micro-batches of one batch must know of each other; see :meth:`PartialDiceCELoss.counted_in`.

    With deep supervision a loss is called once for each output, in the same order for each micro-batch; each output has
    sums of its own.
    """

    def __init__(self) -> None:
        self.micro_batches = 0
        self._totals: list[Tensor] = []
        self._output = 0
        self._is_joined = False

    def begin_counting(self) -> None:
        """Expect the first output of another micro-batch, to be counted.

        Raises:
            LossError: Some micro-batch has been computed already, with the sums as they were.
        """
        if self._is_joined:
            raise LossError("a micro-batch comes too late: count all of a batch before the first is computed")
        self.micro_batches += 1
        self._output = 0

    def add(self, total: Tensor) -> None:
        """Add the sums of the present micro-batch's next output."""
        if self.micro_batches == 1:
            self._totals.append(total)
        else:
            self._totals[self._output] += total
        self._output += 1

    def begin_computing(self, *, ddp: bool) -> None:
        """Expect the first output of a micro-batch, to be computed; the first time, sum over the processes."""
        if not self._is_joined and ddp:
            for total in self._totals:
                dist.all_reduce(total)
        self._is_joined = True
        self._output = 0

    def next_total(self) -> Tensor:
        """Return the sums over the whole batch for the next output.

        Raises:
            LossError: So many outputs were not counted.
        """
        if self._output >= len(self._totals):
            got = f"output {self._output + 1} of a micro-batch was not counted, but {len(self._totals)}"
            raise LossError(f"{got}: count every micro-batch with all its outputs before one is computed")
        self._output += 1
        return self._totals[self._output - 1]


class PartialDiceCELoss(nn.Module):
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

    It takes logits and target alone, so that nnU-Net's ``DeepSupervisionWrapper`` can hold it; what the batch annotates
    is set around the call (:meth:`annotated_in`). A batch that is too large can be computed in micro-batches, of which
    each is counted before the first is computed::

        whole = WholeBatch()
        with torch.no_grad(), loss.counted_in(whole):  # for each micro-batch
            loss(logits, target)
        with loss.as_part_of(whole):  # for each micro-batch
            loss(logits, target).backward()

    The micro-batches' losses add up to the whole batch's loss, and so do their gradients, whatever the micro-batches'
    sizes and annotations.

    With ``ddp`` the batch is that of all processes, whose shares of it may differ in size and annotation: sums are
    added up over the processes, in one collective a call, which each process joins whatever its cases annotate. The
    mean of the processes' losses is the loss of the joined batch, and so is the mean of their gradients, which is what
    ``DistributedDataParallel`` forms. (A process's cross-entropy is its own sum times the number of processes over the
    joint number of voxels; Dice with ``batch_dice`` is the joint one everywhere.) The processes' losses must be scaled
    alike before ``backward``, which communicates nothing.

    Memory beyond the logits is their gradient and chunks of constant size; second derivatives and ``torch.func`` take
    all maps of probabilities. Softmax and gradient are computed in fp32 or the logits' precision, whichever is higher.

    Args:
        members: ``(L, C)`` of :func:`label_members`, or the number of outputs where each label is an output.
        batch_dice: Dice of each structure over the batch, as one image, instead of in each case.
        smooth: Added to numerator and denominator of Dice.
        ignore_label: Label value of voxels that count in neither term.
        ddp: Whether the batch is spread over the processes of the default group.
        weight_ce: Weight of the cross-entropy.
        weight_dice: Weight of Dice.

    Raises:
        LossError: Members or ignore label that no loss can have.

    >>> loss = PartialDiceCELoss(3, batch_dice=False)
    >>> logits, target = torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    >>> with loss.annotated_in(torch.tensor([[False, True, False]])):  # output 2 may be anywhere
    ...     round(float(loss(logits, target)), 4)  # -log(2/3), and a Dice of nearly 0
    0.4055
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
        self.batch_dice, self.smooth, self.ignore_label, self.ddp = batch_dice, smooth, ignore_label, ddp
        self.weight_ce, self.weight_dice = weight_ce, weight_dice
        if ignore_label is not None and 0 <= ignore_label < len(self.members):
            got = f"{ignore_label} is an ignore label that stands for outputs"
            raise LossError(f"{got}: give it the value {len(self.members)}, as nnU-Net does")
        self._annotated: Tensor | None = None
        self._counting: WholeBatch | None = None
        self._whole: WholeBatch | None = None

    @property
    def counts_probabilities(self) -> bool:
        """Whether counting a micro-batch takes its logits; elsewhere the targets are enough."""
        return self.batch_dice

    def annotated_in(self, annotated: Tensor | None) -> AbstractContextManager[None]:
        """Within this context, the batch annotates these labels; outside, every case annotates every output.

        Args:
            annotated: ``(B, L)``, boolean: which label values each case annotates. Label 0 is not read. None where each
                case annotates every single output.
        """
        return self._within("_annotated", annotated)

    def counted_in(self, whole: WholeBatch) -> AbstractContextManager[None]:
        """Within this context, the calls add one micro-batch to the sums over its batch, and return 0.

        Logits are read with ``batch_dice`` only; elsewhere anything may stand in their place.

        Args:
            whole: The batch.

        Raises:
            LossError: Some micro-batch has been computed already.
        """
        whole.begin_counting()
        return self._within("_counting", whole)

    def as_part_of(self, whole: WholeBatch) -> AbstractContextManager[None]:
        """Within this context, the calls return what one micro-batch contributes to the loss of its batch.

        The first time, with ``ddp``, the processes add up their sums, so each of them must come here.

        Args:
            whole: The batch, all of whose micro-batches are counted.
        """
        whole.begin_computing(ddp=self.ddp)
        return self._within("_whole", whole)

    @contextmanager
    def _within(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: ``(B, C, X, Y[, Z])``, output 0 being the background.
            target: ``(B, X, Y[, Z])`` or ``(B, 1, X, Y[, Z])``, label values of any type.

        Returns:
            The loss, a scalar.

        Raises:
            LossError: An empty batch, shapes that do not fit together, values that are no labels, a case that annotates
                labels with a common output, or ``ddp`` without a process group.
        """
        if self._counting is None or self.batch_dice:
            target = self._check_shapes(logits, target)
        target = self._check_labels(target).flatten(1)
        annotated = self._check_annotated(len(target))
        partitions = [partition_outputs(self.members, row, case) for case, row in enumerate(annotated)]
        annotated = annotated.to(target.device)
        if self._counting is not None:
            self._counting.add(self._count(logits, target, annotated, partitions))
            return torch.zeros((), device=target.device)
        if self.ddp and not (dist.is_available() and dist.is_initialized()):
            raise LossError("ddp=True without a process group: set ddp=False, or start with -num_gpus or torchrun")
        if is_transformed():
            return self._by_operations(logits, target, annotated, partitions, self._whole)
        loss: Tensor = _PartialDiceCE.apply(logits, target, annotated, partitions, self, self._whole)
        return loss

    def _check_shapes(self, logits: Tensor, target: Tensor) -> Tensor:
        n_outputs = self.members.shape[1]
        if logits.ndim < 3 or logits.shape[1] != n_outputs or not logits.is_floating_point():
            got = f"{logits.dtype} {tuple(logits.shape)} are logits that do not fit the labels"
            raise LossError(f"{got}: give floating point (B, {n_outputs}, X, Y[, Z])")
        if target.ndim == logits.ndim and target.shape[1] == 1:
            target = target[:, 0]
        if target.shape != logits.shape[:1] + logits.shape[2:]:
            got = f"target {tuple(target.shape)} has another shape than logits {tuple(logits.shape)}"
            raise LossError(f"{got}: give label values, with deep supervision for each output")
        return target

    def _check_labels(self, target: Tensor) -> Tensor:
        """Return the target in a type that PyTorch computes with, all its values being labels."""
        if not target.numel():
            raise LossError(f"an empty batch of shape {tuple(target.shape)}: leave it out")
        if target.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which it can hardly do more with than store
            target = target.long()
        n_labels = len(self.members)
        wrong = ~((target >= 0) & (target < n_labels))  # negated, so that NaN is found as well
        if self.ignore_label is not None:
            wrong &= target != self.ignore_label
        if target.is_floating_point():
            wrong |= target != target.floor()
        if bool(wrong.any()):
            got = ", ".join(f"{value:g}" for value in sorted(set(target[wrong].tolist()))[:5])
            ignored = "" if self.ignore_label is None else f", or {self.ignore_label} to ignore"
            raise LossError(f"no output stands for label values {got}: give whole numbers to {n_labels - 1}{ignored}")
        return target

    def _check_annotated(self, batch_size: int) -> Tensor:
        """Return the annotation on the CPU, with nothing said of the background."""
        shape = (batch_size, len(self.members))
        if (annotated := self._annotated) is None:
            annotated = (self.members.sum(1) == 1).expand(shape)
        if annotated.shape != shape or annotated.dtype != torch.bool:
            got = f"{annotated.dtype} {tuple(annotated.shape)} is an annotation that does not fit"
            raise LossError(f"{got}: give boolean {shape}, a row for each case and a column for each label value")
        annotated = annotated.detach().cpu().clone()
        annotated[:, 0] = False
        return annotated

    def _cases(self, logits: Tensor, target: Tensor, partitions: list[Partition]) -> list[Case]:
        rows = zip(logits.flatten(2), target, partitions, strict=True)
        return [Case(one, labels, partition, self.ignore_label) for one, labels, partition in rows]

    def _count(self, logits: Tensor, target: Tensor, annotated: Tensor, partitions: list[Partition]) -> Tensor:
        if not self.batch_dice:
            rows = zip(target, partitions, strict=True)
            return _counts(torch.stack([count_voxels(row, p, self.ignore_label) for row, p in rows]).sum(), annotated)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            return self._total(batch_sums(self._cases(logits, target, partitions)), annotated)

    def _total(self, sums: list[Sums], annotated: Tensor) -> Tensor:
        """Return what adds up: :func:`_counts`, and with ``batch_dice`` ``(L,)`` pairs and ``(3, L)`` sums."""
        counts = _counts(torch.stack([s.voxels for s in sums]).sum(), annotated)
        if not self.batch_dice:
            return counts
        mask = annotated.to(counts)
        by_label = torch.stack([s.by_label for s in sums], 1) * mask
        return torch.cat([counts, mask.sum(0), by_label.sum(1).flatten()])

    def _combine(
        self, sums: list[Sums], annotated: Tensor, whole: WholeBatch | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the loss, and its derivatives nu ``()``, alpha ``(B, L)`` and beta ``(B, L)`` by the cases' sums.

        Args:
            sums: Of the cases at hand.
            annotated: ``(B, L)``, of these cases.
            whole: The batch that they are a micro-batch of; None where they are all that this process has of it.
        """
        world = dist.get_world_size() if self.ddp else 1
        if whole is not None:
            total = whole.next_total()
        else:
            total = self._total(sums, annotated)
            if self.ddp:
                dist.all_reduce(total)
        n_labels = annotated.shape[1]
        voxels, n_pairs = total[0].clamp_min(1), total[1]
        mask = annotated.to(total)
        if self.batch_dice:
            pairs, by_label = total[None, 2 : 2 + n_labels], total[2 + n_labels :].view(3, 1, n_labels)
        else:
            pairs, by_label = mask, torch.stack([s.by_label for s in sums], 1) * mask
        present = (pairs > 0).to(mask.dtype)
        count = (present.sum() if self.batch_dice else n_pairs).clamp_min(1)

        intersection, prediction, reference = by_label
        denominator = reference + prediction + self.smooth
        bounded = denominator.clamp_min(_SMALLEST_DENOMINATOR)
        dice = (2 * intersection + self.smooth) / bounded * present / count
        alpha = 2 * present / bounded / count
        beta = torch.where(denominator >= _SMALLEST_DENOMINATOR, dice / bounded, 0)
        scale = world * self.weight_dice
        # The joint Dice is each process's value; its micro-batches share it evenly.
        shares = 1 if whole is None else whole.micro_batches
        value_dice = dice.sum() * (1 / shares if self.batch_dice else world)
        cross_entropy = torch.stack([s.cross_entropy for s in sums]).sum()
        value = self.weight_ce * world * cross_entropy / voxels - self.weight_dice * value_dice
        return value, (self.weight_ce * world / voxels, scale * alpha * mask, scale * beta * mask)

    def _by_operations(
        self, logits: Tensor, target: Tensor, annotated: Tensor, partitions: list[Partition], whole: WholeBatch | None
    ) -> Tensor:
        """Compute the loss by operations that PyTorch can differentiate in any way, with all maps in memory."""
        if self.ddp or whole is not None:
            raise LossError("second derivatives and torch.func need ddp=False and a batch that is not in micro-batches")
        with torch.autocast(logits.device.type, enabled=False):
            sums = [_differentiable_sums(case) for case in self._cases(logits, target, partitions)]
            return self._combine(sums, annotated, None)[0].to(torch.promote_types(logits.dtype, torch.float32))


def partial_dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor | None = None,
    *,
    members: Tensor | None = None,
    batch_dice: bool,
    **settings: Any,
) -> Tensor:
    """Compute :class:`PartialDiceCELoss` once.

    Args:
        logits: ``(B, C, X, Y[, Z])``, output 0 being the background.
        target: ``(B, X, Y[, Z])`` or ``(B, 1, X, Y[, Z])``, label values of any type.
        annotated: As for :meth:`PartialDiceCELoss.annotated_in`.
        members: ``(L, C)`` of :func:`label_members`; None where each label is an output.
        batch_dice: Dice of each structure over the batch, as one image, instead of in each case.
        **settings: Further arguments of :class:`PartialDiceCELoss`.

    Returns:
        The loss, a scalar.

    Raises:
        LossError: As of :class:`PartialDiceCELoss` and its call.
    """
    if members is None:
        members = label_members(logits.shape[1] if logits.ndim > 1 else 0)
    loss = PartialDiceCELoss(members, batch_dice=batch_dice, **settings)
    with loss.annotated_in(annotated):
        value: Tensor = loss(logits, target)
    return value


def _counts(voxels: Tensor, annotated: Tensor) -> Tensor:
    """Return ``(2,)``: voxels, and pairs of a case and a label that it annotates."""
    return torch.stack([voxels, annotated.to(voxels).sum()])


def _differentiable_sums(case: Case) -> Sums:
    """Return what :func:`batch_sums` does, by operations that PyTorch can differentiate."""
    labels = case.look_up(slice(None))[0]
    is_kept = labels < case.n_labels
    z, labels = case.logits[:, is_kept].to(case.dtype), labels[is_kept]
    owner = case.owner if case.order is None else case.owner[case.order.argsort()]
    means = owner == torch.arange(case.n_labels, device=owner.device)[:, None]
    log_q = z.masked_fill(~means[labels].T, -torch.inf).logsumexp(0) - z.logsumexp(0)
    zeros = z.new_zeros(case.n_labels)
    intersection = zeros.index_add(0, labels, log_q.exp())
    prediction = zeros.index_add(0, owner, z.softmax(0).sum(1))
    reference = torch.bincount(labels, minlength=case.n_labels).to(z.dtype)
    return Sums(-log_q.sum(), torch.stack([intersection, prediction, reference]), reference.sum())


class _PartialDiceCE(torch.autograd.Function):
    """The loss with its gradient computed anew from the logits, so that nothing of their size is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        annotated: Tensor,
        partitions: list[Partition],
        loss: PartialDiceCELoss,
        whole: WholeBatch | None,
    ) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            sums = batch_sums(loss._cases(logits, target, partitions))
            value, coefficients = loss._combine(sums, annotated, whole)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ctx.save_for_backward(logits, target, annotated, *(c.to(dtype) for c in coefficients))
        ctx.partitions, ctx.loss, ctx.whole = partitions, loss, whole
        return value.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, annotated, *coefficients = ctx.saved_tensors
        if is_recorded(grad_output):  # second derivatives, or many gradients at once
            again, (logits,) = torch.is_grad_enabled(), aliases(logits)
            with torch.enable_grad():
                value = ctx.loss._by_operations(logits, target, annotated, ctx.partitions, ctx.whole)
            (gradient,) = torch.autograd.grad(value, logits, grad_output, create_graph=again)
            return gradient, None, None, None, None, None
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            # Scaled before the gradient is rounded to the logits' precision, which may be half.
            nu, alpha, beta = (c * grad_output for c in coefficients)
            by = [Coefficients(nu, *pair) for pair in zip(alpha, beta, strict=True)]
            batch_gradient(ctx.loss._cases(logits, target, ctx.partitions), by, gradient.flatten(2))
        return gradient, None, None, None, None, None
