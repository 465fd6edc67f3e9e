"""One case's sums and gradient, computed over chunks of voxels so that no map of all outputs is made but the gradient.

Notation: z logits, p = softmax(z), y a voxel's label, E the set of outputs that y stands for in this case, and
q = sum of p over E. Cross-entropy is -log q = LSE(z) - LSE(z over E). A voxel's gradient of any loss that depends on the
probabilities through sum_v(-log q), I_l = sum_v [y = l] q and P_l = sum_v (sum of p over the outputs of l) is

    p_c (beta_c - sum_j p_j beta_j + alpha_y q + nu) - [c in E] (p_c / q) (alpha_y q + nu)

with nu the derivative by the sum of cross-entropies, -alpha_l and beta_l those by I_l and P_l, and beta_c the beta_l of
the label that owns output c. p_c / q is the softmax over E alone, and computed as such: q may underflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stunet.losses.annotation import Partition

__all__ = ["Case", "Coefficients", "Sums", "case_gradient", "case_sums"]

# Elements of a chunk: on the CPU it has to stay in a core's second-level cache, on a GPU to fill the device.
_CHUNK_ELEMENTS = {"cpu": 2**17}
_CHUNK_ELEMENTS_ELSEWHERE = 2**23


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


class Case:
    """One case's logits and labels, read in chunks.

    Args:
        logits: ``(C, N)``.
        target: ``(N,)``, label values of any type.
        partition: How the case's annotation divides the outputs.
        ignore_label: Label value of voxels to be left out.
        dtype: Precision to compute in.
    """

    def __init__(
        self, logits: Tensor, target: Tensor, partition: Partition, ignore_label: int | None, dtype: torch.dtype
    ) -> None:
        device = logits.device
        self.logits = logits
        self.target = target
        self.ignore_label = ignore_label
        self.sets = partition.sets
        self.singles = partition.singles
        self.n_outputs, self.n_voxels = logits.shape
        self.n_labels = partition.tables.shape[1] - 1
        self.leaves_out = ignore_label is not None or bool((partition.tables[0, :-1] == self.n_labels).any())
        self.order = None if partition.order is None else partition.order.to(device)
        self.owner = partition.owner.to(device)
        self.tables = partition.tables.to(device)
        elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        self.chunk = min(self.n_voxels, max(elements // self.n_outputs, 1024))
        self._buffer = logits.new_empty(self.chunk * self.n_outputs, dtype=dtype)

    def __iter__(self) -> Iterator[slice]:
        """The voxels of each chunk."""
        return (slice(i, min(i + self.chunk, self.n_voxels)) for i in range(0, self.n_voxels, self.chunk))

    def load(self, voxels: slice) -> Tensor:
        """``(C, n)`` logits in the partition's order, in memory that the next call uses again."""
        source = self.logits[:, voxels]
        chunk = self._buffer[: source.numel()].view(source.shape)
        if self.order is None:
            return chunk.copy_(source)
        if source.dtype == chunk.dtype:
            return torch.index_select(source, 0, self.order, out=chunk)
        return chunk.copy_(source.index_select(0, self.order))

    def look_up(self, voxels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """``(n,)`` each: label that a voxel counts as, its set, its output."""
        labels = self.target[voxels].long()
        if self.ignore_label is not None:
            labels = labels.masked_fill_(labels == self.ignore_label, self.n_labels)
        label, set_of, output = self.tables.index_select(1, labels)
        return label, set_of, output


def case_sums(case: Case, log_normalizer: Tensor, nll: Tensor) -> Sums:
    """Sums of one case.

    Args:
        case: The case.
        log_normalizer: ``(N,)``, filled with LSE(z), which is infinite where a voxel is left out.
        nll: ``(N,)``, filled with -log q, 0 where a voxel is left out.
    """
    prediction = nll.new_zeros(case.n_outputs)
    by_label = nll.new_zeros(case.n_labels + 1, 2)
    for voxels in case:
        x = case.load(voxels)
        label, set_of, output = case.look_up(voxels)
        own = x.gather(0, output[None])[0]
        spans = [*case.sets, *([(case.singles, case.n_outputs)] if case.singles < case.n_outputs else [])]
        peaks, log_sums = [], []
        for start, stop in spans:
            rows = x[start:stop]
            peaks.append(rows.amax(0))
            log_sums.append(rows.sub_(peaks[-1]).exp_().sum(0).log_().add_(peaks[-1]))
        if case.sets:
            by_set = torch.stack(log_sums[: len(case.sets)])
            of_set = by_set.gather(0, set_of.clamp_max(len(case.sets) - 1)[None])[0]
            own = torch.where(set_of < len(case.sets), of_set, own)
        total = log_sums[0] if len(spans) == 1 else torch.stack(log_sums).logsumexp(0)
        minus_log_q = total - own
        if case.leaves_out:
            left_out = label == case.n_labels
            minus_log_q.masked_fill_(left_out, 0)
            total = total.masked_fill(left_out, torch.inf)
        for (start, stop), peak in zip(spans, peaks, strict=True):
            prediction[start:stop] += x[start:stop].mv((peak - total).exp_())
        q = (-minus_log_q).exp_()
        by_label.index_add_(0, label, torch.stack([q, torch.ones_like(q)], 1))
        log_normalizer[voxels] = total
        nll[voxels] = minus_log_q
    intersection, reference = by_label[:-1].T
    by_owner = torch.zeros_like(intersection).index_add_(0, case.owner, prediction)
    return Sums(nll.sum(), torch.stack([intersection, by_owner, reference]), reference.sum())


def case_gradient(case: Case, log_normalizer: Tensor, nll: Tensor, by: Coefficients, out: Tensor) -> None:
    """Gradient of the loss by one case's logits.

    Args:
        case: The case.
        log_normalizer: As filled by :func:`case_sums`.
        nll: Likewise.
        by: Derivatives of the loss by the case's sums.
        out: ``(C, N)``, filled with the gradient.
    """
    alpha = torch.cat([by.intersection, by.intersection.new_zeros(1)])
    beta = by.prediction[case.owner]
    factors = beta.new_empty(case.chunk * case.n_outputs)
    back = None if case.order is None else case.order.argsort()
    for voxels in case:
        x = case.load(voxels)
        label, set_of, output = case.look_up(voxels)
        total, minus_log_q = log_normalizer[voxels], nll[voxels]
        q = (-minus_log_q).exp_()
        pull = alpha[label].mul_(q).add_(by.cross_entropy)
        if case.leaves_out:
            pull.masked_fill_(label == case.n_labels, 0)
        factor = factors[: x.numel()].view(x.shape)
        # In the rows of a voxel's own set, x becomes p / q and share is q; everywhere else p and 1.
        shares = []
        push = pull.clone()
        for i, (start, stop) in enumerate(case.sets):
            own = set_of == i
            x[start:stop].sub_(torch.where(own, total - minus_log_q, total)).exp_()
            shares.append(torch.where(own, q, 1))
            push -= x[start:stop].T.mv(beta[start:stop]).mul_(shares[-1])
        singles = x[case.singles :]
        singles.sub_(total).exp_()
        push -= singles.T.mv(beta[case.singles :])
        for i, (start, stop) in enumerate(case.sets):
            shift = push * shares[i] - torch.where(set_of == i, pull, 0)
            torch.addcmul(shift, beta[start:stop, None], shares[i], out=factor[start:stop])
        torch.add(beta[case.singles :, None], push, out=factor[case.singles :])
        x.mul_(factor)
        x.scatter_add_(0, output[None], torch.where(set_of == len(case.sets), -pull, 0)[None])
        out[:, voxels] = x if back is None else torch.index_select(x, 0, back, out=factor)
