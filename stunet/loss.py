"""Dice and cross-entropy where each case annotates only some structures.

In three parts: what a label says about the outputs, given what its case annotates; the loss, one function of the logits
with a gradient of its own; one case's sums and gradient, over chunks of voxels so that the gradient is the only map of
all outputs that is made. On GPUs these are two kernels, in :mod:`stunet.loss_kernels`.

Notation: z logits, p = softmax(z), y a voxel's label, E the set of outputs that y stands for in this case, and
q = sum of p over E. Cross-entropy is -log q = LSE(z) - LSE(z over E). Where a loss depends on the probabilities through
sum_v(-log q), I_l = sum_v [y = l] q and P_l = sum_v (sum of p over the outputs of l), its gradient at a voxel is

    p_c (beta_c - sum_j p_j beta_j + alpha_y q + nu) - [c in E] (p_c / q) (alpha_y q + nu)

with nu the derivative by the sum of cross-entropies, -alpha_l and beta_l those by I_l and P_l, and beta_c the beta_l of
the label that owns output c. p_c / q is the softmax over E alone, and computed as such: q may underflow.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._triton import has_triton

from stunet.errors import LossError

T = TypeVar("T")

# nnU-Net's bound of the denominator of Dice.
_SMALLEST_DENOMINATOR = 1e-8

# Elements of a chunk: on the CPU few enough for a core's share of the cache, on a GPU enough to fill the device.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_CHUNK_ELEMENTS_ELSEWHERE = 2**23
_SMALLEST_CHUNK = 1024  # voxels
_CHUNKS_PER_STRIPE = 8  # at least, on the CPU, so that all threads' chunks together are small beside the logits


# --- What a label says about the outputs ---


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
        LossError: Label values with gaps, or a superclass of fewer than two outputs, or of one that does not exist.

    >>> label_members(3, {3: (1, 2)}).int()[3]
    tensor([0, 1, 1], dtype=torch.int32)
    """
    superclasses = superclasses or {}
    if sorted(superclasses) != (expected := list(range(num_outputs, num_outputs + len(superclasses)))):
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
    members = members.detach().cpu()
    fits = (
        (members.ndim, members.dtype) == (2, torch.bool)
        and min(members.shape) >= 2
        and members[0].nonzero().tolist() == members[:, 0].nonzero().tolist() == [[0]]
        and bool(members.any(1).all())
        and len(torch.unique(members, dim=0)) == len(members)
    )
    if not fits:
        got = f"{members.dtype} {tuple(members.shape)} are members that do not say which outputs a label stands for"
        raise LossError(f"{got}: make them with stunet.loss.label_members")
    return members


class Partition(NamedTuple):
    """How one case's annotation divides the outputs C into those told apart and those known only by their sum.

    The background is a set together with all outputs that the case does not annotate, an annotated superclass a set of
    its outputs. All other annotated outputs are single.

    Attributes:
        order: ``(C,)``, the outputs set by set, then the single ones; None where that is their own order.
        sets: Where each set starts and stops in that order.
        owner: ``(C,)``: the label of which Dice counts an output, 0 for none.
        tables: ``(3, L + 1)``, looked up by label value, the last column for voxels that are to be left out: the label
            that a voxel counts as (L: it is left out), its set (``len(sets)``: a single output), its output in that
            order (single ones only).
        annotated: ``(L,)``, boolean: what the case annotates, less the background.
        merges_background: Whether the first set is the background's, of which there is no Dice.
        leaves_out: Whether voxels of some label are left out.
    """

    order: Tensor | None
    sets: tuple[tuple[int, int], ...]
    owner: Tensor
    tables: Tensor
    annotated: Tensor
    merges_background: bool
    leaves_out: bool

    def to(self, device: torch.device) -> Partition:
        """Copy it to a device."""
        order = None if self.order is None else to_device(self.order, device)
        owner, tables, annotated = (to_device(each, device) for each in (self.owner, self.tables, self.annotated))
        return self._replace(order=order, owner=owner, tables=tables, annotated=annotated)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU without waiting: a GPU fetches it from pinned memory when it comes there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def partition_outputs(members: Tensor, annotated: Tensor, case: int = 0) -> Partition:
    """Divide the outputs for one case.

    A voxel with a label that the case does not annotate counts as the annotated superclass that contains all its
    outputs; where it shares no output with an annotated label, as background; otherwise it says nothing certain, and is
    left out.

    Args:
        members: ``(L, C)``, as of :func:`label_members`.
        annotated: ``(L,)``, boolean, on the CPU, False for label 0.
        case: Index in the batch, for the message.

    Raises:
        LossError: Two annotated labels share an output.
    """
    n_labels, n_outputs = members.shape
    owned = members & annotated[:, None]
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
        owner=owner,
        tables=torch.stack([counts_as, set_of[counts_as], output_of[counts_as]]),
        annotated=annotated,
        merges_background=bool(size[0] > 1),
        leaves_out=bool((counts_as[:-1] == n_labels).any()),
    )


class _Annotation(NamedTuple):
    """What a batch annotates: the partition of each case, and of all of them ``(B, L + 1)``, ``(B, C)``, ``(B, L)``."""

    partitions: list[Partition]
    counts_as: Tensor
    owner: Tensor
    mask: Tensor


# --- The loss ---


class WholeBatch:
    """What the micro-batches of one batch must know of each other; see :meth:`PartialDiceCELoss.counted_in`."""

    def __init__(self) -> None:
        self.micro_batches = 0
        self.is_counted = False
        self._totals: list[Tensor] = []

    def add(self, total: Tensor) -> None:
        """Add the sums of the present micro-batch, ``(S, K)`` for S outputs."""
        if len(self._totals) == self.micro_batches:
            raise LossError("a micro-batch comes in several calls: give the loss all its outputs at once")
        self._totals.append(total)

    def finish(self, *, ddp: bool) -> None:
        """Add up all micro-batches, the first time; with ``ddp`` those of all processes."""
        if self._totals and not self.is_counted:
            self._totals = [torch.stack(self._totals).sum(0)]
            if ddp:
                dist.all_reduce(self._totals[0])
        self.is_counted = True

    def total(self, n_outputs: int) -> Tensor:
        """Return the sums over the whole batch."""
        if [len(total) for total in self._totals] != [n_outputs]:
            raise LossError("an output of a micro-batch was not counted: count all of a batch before one is computed")
        return self._totals[0]


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

    It takes logits and target alone, as nnU-Net's losses do; what the batch annotates is set around the call
    (:meth:`annotated_in`). With deep supervision these are lists, and the outputs' losses are added up as nnU-Net's
    ``DeepSupervisionWrapper`` does it. A batch that is too large can be computed in micro-batches, of which each is
    counted before the first is computed::

        whole = WholeBatch()
        with torch.no_grad(), loss.counted_in(whole):  # for each micro-batch
            loss(logits, target)
        with loss.as_part_of(whole):  # for each micro-batch
            loss(logits, target).backward()

    The micro-batches' losses and gradients add up to the whole batch's, whatever their sizes and annotations.

    With ``ddp`` the batch is that of all processes, whose shares of it may differ in size and annotation: sums are
    added up in one collective a call. The mean of the processes' losses is the loss of the joined batch, and so is the
    mean of their gradients, which ``DistributedDataParallel`` forms. The losses must be scaled alike before
    ``backward``, which communicates nothing.

    Memory beyond the logits is their gradient and chunks of constant size. Softmax and gradient are computed in fp32 or
    the logits' precision, whichever is higher. There is a first derivative, by ``backward`` or ``torch.autograd.grad``;
    second ones and ``torch.func`` are refused.

    On CUDA nothing waits for the GPU. Values that are no labels, an error elsewhere, there make the loss and its
    gradient NaN; :meth:`check_labels` tells which they are. Without Triton, as on Windows, labels are checked and the
    loss is computed in chunks as on a CPU.

    Args:
        members: ``(L, C)`` of :func:`label_members`, or the number of outputs where each label is an output.
        batch_dice: Dice of each structure over the batch, as one image, instead of in each case.
        smooth: Added to numerator and denominator of Dice.
        ignore_label: Label value of voxels that count in neither term.
        ddp: Whether the batch is spread over the processes of the default group.
        weight_ce: Weight of the cross-entropy.
        weight_dice: Weight of Dice.
        weight_factors: Weights of the outputs where there are several; one that weighs 0 is not looked at.

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
        weight_factors: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.members = check_members(label_members(members) if isinstance(members, int) else members)
        self.batch_dice, self.smooth, self.ignore_label, self.ddp = batch_dice, smooth, ignore_label, ddp
        self.weight_ce, self.weight_dice, self.weight_factors = weight_ce, weight_dice, tuple(weight_factors)
        if ignore_label is not None and 0 <= ignore_label < len(self.members):
            got = f"{ignore_label} is an ignore label that stands for outputs"
            raise LossError(f"{got}: give it the value {len(self.members)}, as nnU-Net does")
        self._annotated: Tensor | None = None
        self._whole: WholeBatch | None = None
        # Made once: of each annotation that comes, and of the outputs' weights.
        self._partitions: dict[tuple[bytes, torch.device], Partition] = {}
        self._weights: dict[tuple[Any, ...], Tensor] = {}

    def annotated_in(self, annotated: Tensor | None) -> AbstractContextManager[None]:
        """Within this context, cases annotate these labels, ``(B, L)``, boolean; None and outside, every single output.

        Label 0 is not read.
        """
        return self._within("_annotated", annotated)

    def counted_in(self, whole: WholeBatch) -> AbstractContextManager[None]:
        """Within this context, the calls add one micro-batch to the sums over its batch, and return 0.

        Logits are read with ``batch_dice`` only; elsewhere anything may stand in their place.

        Raises:
            LossError: Some micro-batch has been computed already, with the sums as they were.
        """
        if whole.is_counted:
            raise LossError("a micro-batch comes too late: count all of a batch before the first is computed")
        whole.micro_batches += 1
        return self._within("_whole", whole)

    def as_part_of(self, whole: WholeBatch) -> AbstractContextManager[None]:
        """Within this context, the calls return what one micro-batch contributes to the loss of its counted batch.

        The first time, with ``ddp``, the processes add up their sums, so each of them must come here.
        """
        whole.finish(ddp=self.ddp)
        return self._within("_whole", whole)

    @contextmanager
    def _within(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute the loss.

        Args:
            logits: ``(B, C, X, Y[, Z])``, output 0 being the background; with deep supervision one for each output.
            target: ``(B, X, Y[, Z])`` or ``(B, 1, X, Y[, Z])``, label values of any type; likewise.

        Returns:
            The loss, a scalar.

        Raises:
            LossError: An empty batch, shapes that do not fit together, values that are no labels, a case that annotates
                labels with a common output, or ``ddp`` without a process group.
        """
        whole = None if self._whole is None or self._whole.is_counted else self._whole  # that is being counted
        pairs = [(logits, target)] if isinstance(target, Tensor) else zip(logits, target, strict=False)
        factors = (1.0,) if isinstance(target, Tensor) else self.weight_factors
        outputs, targets, weights = [], [], []
        for i, (z, y) in enumerate(pairs):
            if factors[i] == 0:
                continue
            y = self._check_shapes(z, y) if whole is None or self.batch_dice else y
            outputs.append(cast(Tensor, z).flatten(2))
            targets.append(self._readable(y).flatten(1))
            weights.append(factors[i])
        annotation = self._annotation(len(targets[0]), targets[0].device)
        if whole is not None:
            whole.add(self._count(outputs, targets, annotation))
            return torch.zeros((), device=targets[0].device)
        if self.ddp and not (dist.is_available() and dist.is_initialized()):
            raise LossError("ddp=True without a process group: set ddp=False, or start with -num_gpus or torchrun")
        return cast(Tensor, _PartialDiceCE.apply(self, targets, annotation, weights, *outputs))

    def check_labels(self, target: Tensor | Sequence[Tensor]) -> None:
        """Refuse a target, or one of several, with values that are no labels. This waits for the GPU.

        Raises:
            LossError: There are such values.
        """
        for each in [target] if isinstance(target, Tensor) else target:
            wrong = ~self._is_label(each)
            if self.ignore_label is not None:
                wrong &= each != self.ignore_label
            if bool(wrong.any()):
                got = ", ".join(f"{value:g}" for value in sorted(set(each[wrong].tolist()))[:5])
                ignored = "" if self.ignore_label is None else f", or {self.ignore_label} to ignore"
                known = f"whole numbers to {len(self.members) - 1}{ignored}"
                raise LossError(f"no output stands for label values {got}: give {known}")

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

    def _is_label(self, target: Tensor) -> Tensor:
        is_label = (target >= 0) & (target < len(self.members))  # false for NaN
        return is_label & (target == target.floor()) if target.is_floating_point() else is_label

    def _readable(self, target: Tensor) -> Tensor:
        """Return the target in a type to compute with; without kernels checked, and L where it is to be ignored."""
        if not target.numel():
            raise LossError(f"an empty batch of shape {tuple(target.shape)}: leave it out")
        if target.dtype in (
            torch.bool,
            torch.uint16,
            torch.uint32,
            torch.uint64,
        ):  # which can hardly do more than store
            target = target.long()
        if _kernels(target.device.type) is not None:
            return target
        self.check_labels(target)
        n_labels = len(self.members)
        if self.ignore_label in (None, n_labels):  # as nnU-Net has it
            return target
        return target.long().masked_fill(target == self.ignore_label, n_labels)

    def _annotation(self, batch_size: int, device: torch.device) -> _Annotation:
        shape = (batch_size, len(self.members))
        if (annotated := self._annotated) is None:
            annotated = (self.members.sum(1) == 1).expand(shape)
        if annotated.shape != shape or annotated.dtype != torch.bool:
            got = f"{annotated.dtype} {tuple(annotated.shape)} is an annotation that does not fit"
            raise LossError(f"{got}: give boolean {shape}, a row for each case and a column for each label value")
        annotated = annotated.detach().cpu().clone()
        annotated[:, 0] = False  # nothing is said of the background
        partitions = []
        for case, row in enumerate(annotated):
            key = (row.numpy().tobytes(), device)
            if key not in self._partitions:
                self._partitions[key] = partition_outputs(self.members, row, case).to(device)
            partitions.append(self._partitions[key])
        tables = zip(*((p.tables[0], p.owner, p.annotated) for p in partitions), strict=True)
        return _Annotation(partitions, *(torch.stack(rows) for rows in tables))

    def _cases(self, logits: Tensor, target: Tensor, annotation: _Annotation) -> list[_Case]:
        rows, ignores = zip(logits, target, annotation.partitions, strict=True), self.ignore_label is not None
        return [_Case(*row, ignores=ignores) for row in rows]

    def _sums(self, logits: Tensor, target: Tensor, annotation: _Annotation) -> Tensor:
        """Return the sums of each case, ``(B, 2L + C + 1)``: I and voxels by label, P by output, and -log q."""
        if (kernels := _kernels(logits.device.type)) is None:
            return _batch_sums(self._cases(logits, target, annotation))
        counts_as, owner = annotation.counts_as, annotation.owner
        by_program = kernels.loss_sums(logits, target, counts_as, owner, self.ignore_label)
        return cast(Tensor, by_program.sum(1, dtype=torch.float64))

    def _gradient(
        self, logits: Tensor, target: Tensor, annotation: _Annotation, nu: Tensor, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        """Return the gradient ``(B, C, N)``, given nu ``()`` and alpha and beta ``(B, L)``."""
        if (kernels := _kernels(logits.device.type)) is not None:
            tables = annotation.counts_as, annotation.owner, self.ignore_label
            return cast(Tensor, kernels.loss_gradient(logits, target, *tables, nu, alpha, beta))
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        nu, alpha, beta = (c.to(torch.promote_types(logits.dtype, torch.float32)) for c in (nu, alpha, beta))
        cases = self._cases(logits, target, annotation)
        rows = zip(cases, alpha, beta, gradient, strict=True)
        _run(cases, [partial(_stripe_gradient, c, s, nu, *row) for c, *row in rows for s in c.stripes()])
        return gradient

    def _count(self, outputs: list[Tensor], targets: list[Tensor], annotation: _Annotation) -> Tensor:
        """Return :meth:`_total` of these cases; without ``batch_dice`` from the targets alone."""
        if not self.batch_dice:
            return _counts(torch.stack([self._count_voxels(y, annotation) for y in targets]), annotation.mask)
        with torch.no_grad(), torch.autocast(targets[0].device.type, enabled=False):
            rows = zip(outputs, targets, strict=True)
            sums = torch.stack([self._sums(z, y, annotation) for z, y in rows])
            return self._total(_by_label(sums, annotation.owner, len(self.members)), annotation.mask)

    def _count_voxels(self, target: Tensor, annotation: _Annotation) -> Tensor:
        n_labels = len(self.members)
        labels = torch.where(self._is_label(target), target.long(), n_labels)
        kept = annotation.counts_as.gather(1, labels) < n_labels
        return kept.sum().to(_sum_dtype(target))

    def _total(self, by_label: Tensor, mask: Tensor) -> Tensor:
        """Return what adds up over cases: :func:`_counts`, or with ``batch_dice`` voxels, pairs and sums by label.

        These are ``(S, 1 + 4L)``.
        """
        voxels = by_label[2].sum((1, 2))
        if not self.batch_dice:
            return _counts(voxels, mask)
        pairs = mask.sum(0, dtype=voxels.dtype).expand(len(voxels), -1)
        return torch.cat([voxels[:, None], pairs, *by_label.sum(2)], 1)

    def _combine(self, sums: Tensor, annotation: _Annotation, weights: Sequence[float]) -> tuple[Tensor, ...]:
        """Return the loss, and its derivatives nu ``(S,)``, alpha and beta ``(S, 1 or B, L)`` in one process.

        Args:
            sums: ``(S, B, 2L + C + 1)``, of the outputs and the cases at hand.
            annotation: Of these cases.
            weights: Of the outputs.
        """
        world = dist.get_world_size() if self.ddp else 1
        by_label = _by_label(sums, annotation.owner, len(self.members))
        if self._whole is not None:
            total = self._whole.total(len(sums))
        else:
            total = self._total(by_label, annotation.mask)
            if self.ddp:
                dist.all_reduce(total)
        key = (*weights, sums.device)
        if key not in self._weights:
            factors = torch.tensor([[self.weight_ce], [self.weight_dice]], dtype=sums.dtype)
            self._weights[key] = to_device(factors * torch.tensor(weights, dtype=sums.dtype), sums.device)
        weight_ce, weight_dice = self._weights[key]  # (S,) each

        if self.batch_dice:  # one image for each output
            pairs, intersection, prediction, reference = (each[:, None] for each in total[:, 1:].chunk(4, 1))
            present = pairs > 0
            count = present.sum(2, keepdim=True, dtype=sums.dtype)
        else:
            intersection, prediction, reference = by_label
            present, count = annotation.mask, total[:, 1, None, None]
        share = present * weight_dice[:, None, None] / count.clamp_min(1)
        denominator = reference + prediction + self.smooth
        bounded = denominator.clamp_min(_SMALLEST_DENOMINATOR)
        rate = share / bounded
        dice = (2 * intersection + self.smooth) * rate
        beta = (dice / bounded).masked_fill(denominator < _SMALLEST_DENOMINATOR, 0)
        nu = weight_ce / total[:, 0].clamp_min(1)
        # The joint Dice is each process's value; its micro-batches share it evenly.
        shares = 1 if self._whole is None else self._whole.micro_batches
        value_ce = world * (sums[..., -1].sum(1) * nu).sum()
        return value_ce - dice.sum() * (1 / shares if self.batch_dice else world), nu, 2 * rate, beta


def partial_dice_ce_loss(
    logits: Tensor, target: Tensor, annotated: Tensor | None = None, *, members: Tensor | None = None, **settings: Any
) -> Tensor:
    """Compute :class:`PartialDiceCELoss` once, a scalar, for ``(B, C, X, Y[, Z])`` and ``(B, X, Y[, Z])``.

    ``annotated`` is as for :meth:`PartialDiceCELoss.annotated_in`; ``members`` and ``settings`` are the class's
    arguments, each label being an output where there are no members.
    """
    loss = PartialDiceCELoss(logits.shape[1] if members is None else members, **settings)
    with loss.annotated_in(annotated):
        return cast(Tensor, loss(logits, target))


def _counts(voxels: Tensor, mask: Tensor) -> Tensor:
    """Return ``(S, 2)``: voxels ``(S,)``, and pairs of a case and a label that it annotates."""
    return torch.stack([voxels, mask.sum(dtype=voxels.dtype).expand(len(voxels))], 1)


def _by_label(sums: Tensor, owner: Tensor, n_labels: int) -> Tensor:
    """Return I, P and voxels by label, ``(3, S, B, L)``, of ``(S, B, 2L + C + 1)``."""
    intersection, reference, by_output, _ = torch.split(sums, [n_labels, n_labels, owner.shape[1], 1], 2)
    prediction = torch.zeros_like(intersection).scatter_add_(2, owner.expand(len(sums), -1, -1), by_output)
    return torch.stack([intersection, prediction, reference])


@cache
def _kernels(device_type: str) -> Any:
    """Return :mod:`stunet.loss_kernels` where Triton runs: on CUDA with a C compiler, or in its interpreter."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not is_interpreted and not (device_type == "cuda" and has_triton() and compiler):
        return None
    from stunet import loss_kernels

    return loss_kernels


class _PartialDiceCE(torch.autograd.Function):
    """The loss with its gradient computed anew from the logits, so that nothing of their size is kept for it."""

    @staticmethod
    def forward(ctx: Any, loss: Any, targets: Any, annotation: Any, weights: Any, *outputs: Tensor) -> Tensor:
        with torch.autocast(outputs[0].device.type, enabled=False):
            sums = torch.stack([loss._sums(z, y, annotation) for z, y in zip(outputs, targets, strict=True)])
            value, *coefficients = loss._combine(sums, annotation, weights)
        ctx.save_for_backward(*outputs, *targets, *coefficients)
        ctx.loss, ctx.annotation, ctx.world = loss, annotation, dist.get_world_size() if loss.ddp else 1
        return cast(Tensor, value.to(torch.promote_types(outputs[0].dtype, torch.float32)))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LossError("PartialDiceCELoss has no second derivatives: differentiate it without create_graph=True")
        *maps, nu, alpha, beta = ctx.saved_tensors
        outputs, targets = maps[: len(nu)], maps[len(nu) :]
        with torch.autocast(grad_output.device.type, enabled=False):
            # Scaled before the gradient is rounded to the logits' precision, which may be half.
            scale = grad_output * ctx.world
            nu, alpha, beta = (c * scale for c in (nu, alpha, beta))
            alpha, beta = (c.expand(-1, len(outputs[0]), -1) for c in (alpha, beta))
            rows = zip(outputs, targets, nu, alpha, beta, strict=True)
            gradients = [ctx.loss._gradient(z, y, ctx.annotation, *of_output) for z, y, *of_output in rows]
        return (None, None, None, None, *gradients)


# --- Chunks of voxels ---


class _Chunk(NamedTuple):
    """A chunk of n voxels, the softmax taken: in each span of outputs ``exponentials * weight``.

    Attributes:
        voxels: Which voxels of the case.
        exponentials: ``(C, n)``, exp(z - the span's maximum at the voxel).
        totals: For each span ``(n,)``, sum of its exponentials.
        weights: For each span ``(n,)``, 0 where a voxel is left out.
        label: ``(n,)``, label that a voxel counts as, L where it is left out.
        set_of: ``(n,)``, the set that it stands for; the number of sets where that is a single output.
        output: ``(n,)``, that output.
        nll: ``(n,)``, -log q; 0 where a voxel is left out.
    """

    voxels: slice
    exponentials: Tensor
    totals: list[Tensor]
    weights: list[Tensor]
    label: Tensor
    set_of: Tensor
    output: Tensor
    nll: Tensor


class _Case:
    """One case's logits and labels, read in chunks.

    Args:
        logits: ``(C, N)``.
        target: ``(N,)``, label values of any type.
        partition: How the case's annotation divides the outputs.
        ignores: Whether some voxels may be left out by their label.
    """

    def __init__(self, logits: Tensor, target: Tensor, partition: Partition, *, ignores: bool) -> None:
        self.logits, self.target = logits, target
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.n_outputs, self.n_voxels = logits.shape
        self.n_labels = partition.tables.shape[1] - 1
        self.n_sets = len(partition.sets)
        self.merges_background = partition.merges_background
        #: Where each set of outputs starts and stops, and last the single outputs if there are any.
        self.spans = list(partition.sets)
        if (first_single := self.spans[-1][1] if self.spans else 0) < self.n_outputs:
            self.spans.append((first_single, self.n_outputs))
        self.leaves_out = ignores or partition.leaves_out
        self.order = partition.order
        self.owner = partition.owner if self.order is None else partition.owner[self.order]
        # Rows looked up one by one: a lookup of all at once is several times slower.
        self.tables = partition.tables.unbind()
        is_cpu = logits.device.type == "cpu"
        self.n_threads = torch.get_num_threads() if is_cpu else 1
        chunk_size = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // self.n_outputs
        if is_cpu:
            chunk_size = min(chunk_size, self.n_voxels // (_CHUNKS_PER_STRIPE * self.n_threads))
        self.chunk_size = min(max(chunk_size, _SMALLEST_CHUNK), self.n_voxels)

    def stripes(self) -> list[range]:
        """Where the chunks of each stripe start: as many stripes as there are threads on the CPU, elsewhere one."""
        starts = range(0, self.n_voxels, self.chunk_size)
        n = min(self.n_threads, len(starts))
        return [starts[len(starts) * i // n : len(starts) * (i + 1) // n] for i in range(n)]

    def chunks(self, starts: range) -> Iterator[_Chunk]:
        """The chunks that start there, in memory that the next one uses again."""
        buffer = self.logits.new_empty(self.n_outputs * self.chunk_size, dtype=self.dtype)
        for i in starts:
            yield self._softmax(slice(i, min(i + self.chunk_size, self.n_voxels)), buffer)

    def _softmax(self, voxels: slice, buffer: Tensor) -> _Chunk:
        labels = self.target[voxels].long()
        label, set_of, output = (table.index_select(0, labels) for table in self.tables)
        z = self.logits[:, voxels]
        x = buffer[: z.numel()].view(z.shape)
        if self.order is not None:
            z = torch.index_select(z, 0, self.order, out=x if z.dtype == x.dtype else None)
        # Each span has a maximum of its own, so that the softmax within a set is exact where q underflows.
        peaks = [z[start:stop].amax(0).to(self.dtype) for start, stop in self.spans]
        # After the maxima, which have brought the logits into the cache row by row.
        own = z.gather(0, output[None])[0].to(self.dtype)
        totals = []
        for (start, stop), peak in zip(self.spans, peaks, strict=True):
            totals.append(torch.sub(z[start:stop], peak, out=x[start:stop]).exp_().sum(0))
        # Relative to the greatest, so that large logits cost no digits.
        greatest = peaks[0] if len(peaks) == 1 else torch.stack(peaks).amax(0)
        logs = [total.log().add_(peak - greatest) for total, peak in zip(totals, peaks, strict=True)]
        normalizer = logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0)
        own -= greatest
        if self.n_sets:
            of_set = torch.stack(logs[: self.n_sets]).gather(0, set_of.clamp_max(self.n_sets - 1)[None])[0]
            own = torch.where(set_of < self.n_sets, of_set, own)
        nll = normalizer - own
        weights = [(peak - greatest).sub_(normalizer).exp_() for peak in peaks]
        if self.leaves_out:
            left_out = label == self.n_labels
            for tensor in (nll, *weights):
                tensor.masked_fill_(left_out, 0)
        return _Chunk(voxels, x, totals, weights, label, set_of, output, nll)


def _batch_sums(cases: list[_Case]) -> Tensor:
    """Return what :meth:`PartialDiceCELoss._sums` does, of cases in chunks."""
    tasks = [partial(_stripe_sums, case, starts) for case in cases for starts in case.stripes()]
    parts = iter(_run(cases, tasks))
    rows = []
    for case in cases:
        own = zip(*(next(parts) for _ in case.stripes()), strict=True)
        cross_entropy, intersection, reference, prediction = (torch.stack(values).sum(0) for values in own)
        if case.order is not None:
            prediction = torch.empty_like(prediction).index_copy_(0, case.order, prediction)
        # Without the last label, which has what is left out.
        rows.append(torch.cat([intersection[:-1], reference[:-1], prediction, cross_entropy[None]]))
    return torch.stack(rows)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    # A case has millions of voxels: one after the other, they would not add up right in fp32. (MPS has no fp64.)
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _stripe_sums(case: _Case, starts: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy ``()``, I and number of voxels ``(L + 1,)`` and sum of each output ``(C,)``."""
    device = case.logits.device
    dtype = _sum_dtype(case.logits)
    cross_entropy = torch.zeros((), dtype=dtype, device=device)
    prediction = cross_entropy.new_zeros(case.n_outputs)
    intersection, reference = cross_entropy.new_zeros(2, case.n_labels + 1)
    for chunk in case.chunks(starts):
        cross_entropy += chunk.nll.sum()
        for (start, stop), weight in zip(case.spans, chunk.weights, strict=True):
            prediction[start:stop] += chunk.exponentials[start:stop].mv(weight)
        q = (-chunk.nll).exp_().to(dtype)
        intersection.index_add_(0, chunk.label, q)
        reference.index_add_(0, chunk.label, torch.ones_like(q))
    return cross_entropy, intersection, reference, prediction


def _stripe_gradient(case: _Case, starts: range, nu: Tensor, alpha: Tensor, beta: Tensor, out: Tensor) -> None:
    """Fill ``(C, N)`` with the gradient, given nu ``()`` and the case's alpha and beta ``(L,)``."""
    alpha, beta = torch.cat([alpha, alpha.new_zeros(1)]), beta[case.owner]
    buffer = beta.new_empty(case.n_outputs * case.chunk_size)
    back = None if case.order is None else case.order.argsort()
    for chunk in case.chunks(starts):
        factor = buffer[: chunk.exponentials.numel()].view(chunk.exponentials.shape)
        pull = alpha[chunk.label].mul_((-chunk.nll).exp_()).add_(nu)
        if case.leaves_out:
            pull.masked_fill_(chunk.label == case.n_labels, 0)
        push = pull.clone()
        first = int(case.merges_background)
        for (start, stop), weight in zip(case.spans[first:], chunk.weights[first:], strict=True):
            push -= chunk.exponentials[start:stop].T.mv(beta[start:stop]).mul_(weight)
        # Where nothing is to be converted or sorted, the gradient is written once, to its place.
        in_place = back is None and out.dtype == case.dtype
        gradient = out[:, chunk.voxels] if in_place else factor
        for i, (span, total, weight) in enumerate(zip(case.spans, chunk.totals, chunk.weights, strict=True)):
            rows = slice(*span)
            by_voxel = push * weight
            if i < case.n_sets:
                by_voxel -= torch.where(chunk.set_of == i, pull / total, 0)
            if i >= first:
                by_voxel = torch.addcmul(by_voxel, beta[rows, None], weight, out=factor[rows])
            torch.mul(chunk.exponentials[rows], by_voxel, out=gradient[rows])
        pull_of_single = torch.where(chunk.set_of == case.n_sets, -pull, 0) if case.n_sets else -pull
        gradient.scatter_add_(0, chunk.output[None], pull_of_single[None])
        if not in_place:
            in_order = gradient if back is None else torch.index_select(gradient, 0, back, out=chunk.exponentials)
            out[:, chunk.voxels] = in_order


def _run(cases: list[_Case], tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks, none of which needs gradients, and return their results in order; on the CPU in threads.

    PyTorch's own threads wait for each other at the end of every operation. Where an operation takes a fraction of a
    millisecond and other processes want the cores too, as those that load data, nearly all time goes into waiting.
    """
    elements, n_threads = sum(case.n_voxels * case.n_outputs for case in cases), torch.get_num_threads()
    is_large = cases[0].logits.device.type == "cpu" and elements > _CHUNK_ELEMENTS["cpu"]
    if not is_large or min(len(tasks), n_threads) < 2:
        return [task() for task in tasks]

    def run(task: Callable[[], T]) -> T:
        with torch.no_grad():  # a setting of each thread
            return task()

    try:
        # That each thread keeps to itself is its own setting, but also the default of threads that start later.
        with ThreadPoolExecutor(min(n_threads, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, tasks))
    finally:
        torch.set_num_threads(n_threads)
