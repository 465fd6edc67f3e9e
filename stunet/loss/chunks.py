"""One case's sums and gradient, computed over chunks of voxels so that no map of all outputs is made but the gradient.

Notation: z logits, p = softmax(z), y a voxel's label, E the set of outputs that y stands for in this case, and
q = sum of p over E. Cross-entropy is -log q = LSE(z) - LSE(z over E). Where a loss depends on the probabilities through
sum_v(-log q), I_l = sum_v [y = l] q and P_l = sum_v (sum of p over the outputs of l), its gradient at a voxel is

    p_c (beta_c - sum_j p_j beta_j + alpha_y q + nu) - [c in E] (p_c / q) (alpha_y q + nu)

with nu the derivative by the sum of cross-entropies, -alpha_l and beta_l those by I_l and P_l, and beta_c the beta_l of
the label that owns output c. p_c / q is the softmax over E alone, and computed as such: q may underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from stunet.loss.partition import Partition

T = TypeVar("T")

# Elements of a chunk: on the CPU few enough for a core's share of the cache, on a GPU enough to fill the device.
_CHUNK_ELEMENTS = {"cpu": 2**19}
_CHUNK_ELEMENTS_ELSEWHERE = 2**23
_SMALLEST_CHUNK = 1024  # voxels
_CHUNKS_PER_STRIPE = 8  # at least, on the CPU, so that all threads' chunks together are small beside the logits


@dataclass(frozen=True)
class Sums:
    """What the loss needs to know of one case or batch.

    Attributes:
        cross_entropy: ``()``, sum of -log q over the voxels.
        by_label: ``(3, L)``: I, P and number of voxels of each label; P only of annotated ones.
        voxels: ``()``, voxels that are not left out.
    """

    cross_entropy: Tensor
    by_label: Tensor
    voxels: Tensor


@dataclass(frozen=True)
class Coefficients:
    """Derivatives of the loss by one case's sums, as in the module's formula.

    Attributes:
        cross_entropy: nu, ``()``.
        intersection: alpha, ``(L,)``.
        prediction: beta, ``(L,)``.
    """

    cross_entropy: Tensor
    intersection: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class _Span:
    """The probabilities of one set of outputs, or of all single ones, in a chunk: ``exponentials * weight``.

    Attributes:
        start, stop: Where the outputs are in the partition's order.
        exponentials: ``(stop - start, n)``, exp(z - their maximum at the voxel).
        total: ``(n,)``, sum of the exponentials.
        weight: ``(n,)``, 0 where a voxel is left out.
    """

    start: int
    stop: int
    exponentials: Tensor
    total: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Chunk:
    """A chunk of n voxels, the softmax taken.

    Attributes:
        voxels: Which voxels of the case.
        x: ``(C, n)``, the exponentials of all spans.
        spans: Sets, then the single outputs if there are any.
        label: ``(n,)``, label that a voxel counts as, L where it is left out.
        set_of: ``(n,)``, the set that it stands for; the number of sets where that is a single output.
        output: ``(n,)``, that output.
        nll: ``(n,)``, -log q; 0 where a voxel is left out.
    """

    voxels: slice
    x: Tensor
    spans: list[_Span]
    label: Tensor
    set_of: Tensor
    output: Tensor
    nll: Tensor


class Case:
    """One case's logits and labels, read in chunks.

    Args:
        logits: ``(C, N)``.
        target: ``(N,)``, label values of any type.
        partition: How the case's annotation divides the outputs.
        ignore_label: Label value of voxels to be left out.
    """

    def __init__(self, logits: Tensor, target: Tensor, partition: Partition, ignore_label: int | None) -> None:
        device = logits.device
        self.logits = logits
        self.target = target
        self.ignore_label = ignore_label
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.n_outputs, self.n_voxels = logits.shape
        self.n_labels = partition.tables.shape[1] - 1
        self.n_sets = len(partition.sets)
        # The first set is then the background's, of which there is no Dice.
        self.merges_background = self.n_sets > 0 and int(partition.owner[0]) == 0
        self.spans = list(partition.sets)
        if partition.singles < self.n_outputs:
            self.spans.append((partition.singles, self.n_outputs))
        self.leaves_out = ignore_label is not None or bool((partition.tables[0, :-1] == self.n_labels).any())
        self.order = None if partition.order is None else partition.order.to(device)
        self.owner = partition.owner.to(device)
        # Rows looked up one by one: a lookup of all at once is several times slower.
        self.tables = partition.tables.to(device).unbind()
        self.n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        chunk_size = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE) // self.n_outputs
        if device.type == "cpu":
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
        label, set_of, output = self.look_up(voxels)
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
        spans = [
            _Span(start, stop, x[start:stop], total, weight)
            for (start, stop), total, weight in zip(self.spans, totals, weights, strict=True)
        ]
        return _Chunk(voxels, x, spans, label, set_of, output, nll)

    def look_up(self, voxels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return label, set and output of some voxels, as in :class:`Partition`."""
        labels = self.target[voxels].long()
        if self.ignore_label is not None:
            labels = labels.masked_fill(labels == self.ignore_label, self.n_labels)
        label, set_of, output = (table.index_select(0, labels) for table in self.tables)
        return label, set_of, output


def batch_sums(cases: list[Case]) -> list[Sums]:
    """Sums of each case."""
    stripes = [(case, starts) for case in cases for starts in case.stripes()]
    parts = _run(cases, [partial(_stripe_sums, case, starts) for case, starts in stripes])
    result = []
    for case in cases:
        own = [part for (other, _), part in zip(stripes, parts, strict=True) if other is case]
        cross_entropy, intersection, reference, prediction = (
            torch.stack(values).sum(0) for values in zip(*own, strict=True)
        )
        by_owner = torch.zeros_like(intersection).index_add_(0, case.owner, prediction)
        # Without the last label, which has what is left out.
        by_label = torch.stack([intersection, by_owner, reference])[:, :-1]
        result.append(Sums(cross_entropy, by_label, by_label[2].sum()))
    return result


def count_voxels(target: Tensor, partition: Partition, ignore_label: int | None) -> Tensor:
    """:attr:`Sums.voxels` of one case, which its target ``(N,)`` alone decides."""
    counts_as = partition.tables[0].to(target.device)
    labels = target.long()
    if ignore_label is not None:
        labels = labels.masked_fill(labels == ignore_label, len(counts_as) - 1)
    kept = counts_as.index_select(0, labels) < len(counts_as) - 1
    return kept.sum().to(torch.float32 if target.device.type == "mps" else torch.float64)


def _stripe_sums(case: Case, starts: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy ``()``, I and number of voxels ``(L + 1,)`` and sum of each output ``(C,)``."""
    device = case.logits.device
    # A case has millions of voxels: one after the other, they would not add up right in fp32. (MPS has no fp64.)
    dtype = case.dtype if device.type == "mps" else torch.float64
    cross_entropy = torch.zeros((), dtype=dtype, device=device)
    prediction = cross_entropy.new_zeros(case.n_outputs)
    intersection, reference = cross_entropy.new_zeros(2, case.n_labels + 1)
    for chunk in case.chunks(starts):
        cross_entropy += chunk.nll.sum()
        for span in chunk.spans:
            prediction[span.start : span.stop] += span.exponentials.mv(span.weight)
        q = (-chunk.nll).exp_().to(dtype)
        intersection.index_add_(0, chunk.label, q)
        reference.index_add_(0, chunk.label, torch.ones_like(q))
    return cross_entropy, intersection, reference, prediction


def batch_gradient(cases: list[Case], by: list[Coefficients], out: Tensor) -> None:
    """Gradient of the loss by the logits of all cases.

    Args:
        cases: The B cases.
        by: Derivatives of the loss by each case's sums.
        out: ``(B, C, N)``, filled with the gradient.
    """
    _run(
        cases,
        [
            partial(_stripe_gradient, case, starts, coefficients, one)
            for case, coefficients, one in zip(cases, by, out, strict=True)
            for starts in case.stripes()
        ],
    )


def _stripe_gradient(case: Case, starts: range, by: Coefficients, out: Tensor) -> None:
    alpha = torch.cat([by.intersection, by.intersection.new_zeros(1)])
    beta = by.prediction[case.owner]
    buffer = beta.new_empty(case.n_outputs * case.chunk_size)
    back = None if case.order is None else case.order.argsort()
    for chunk in case.chunks(starts):
        factor = buffer[: chunk.x.numel()].view(chunk.x.shape)
        pull = alpha[chunk.label].mul_((-chunk.nll).exp_()).add_(by.cross_entropy)
        if case.leaves_out:
            pull.masked_fill_(chunk.label == case.n_labels, 0)
        push = pull.clone()
        first = int(case.merges_background)
        for span in chunk.spans[first:]:
            push -= span.exponentials.T.mv(beta[span.start : span.stop]).mul_(span.weight)
        # Where nothing is to be converted or sorted, the gradient is written once, to its place.
        in_place = back is None and out.dtype == case.dtype
        gradient = out[:, chunk.voxels] if in_place else factor
        for i, span in enumerate(chunk.spans):
            rows = slice(span.start, span.stop)
            by_voxel = push * span.weight
            if i < case.n_sets:
                by_voxel -= torch.where(chunk.set_of == i, pull / span.total, 0)
            if i >= first:
                by_voxel = torch.addcmul(by_voxel, beta[rows, None], span.weight, out=factor[rows])
            torch.mul(span.exponentials, by_voxel, out=gradient[rows])
        pull_of_single = torch.where(chunk.set_of == case.n_sets, -pull, 0) if case.n_sets else -pull
        gradient.scatter_add_(0, chunk.output[None], pull_of_single[None])
        if not in_place:
            out[:, chunk.voxels] = gradient if back is None else torch.index_select(gradient, 0, back, out=chunk.x)


def _run(cases: list[Case], tasks: list[Callable[[], T]]) -> list[T]:
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
