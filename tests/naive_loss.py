"""The partial-label loss written down as it is defined, with every map in memory and the gradient left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from stunet.loss import label_members


def counts_as(label: int, members: list[set[int]], annotated: set[int]) -> int | None:
    """The label that a voxel counts as in a case; None where it is left out."""
    if label == 0 or label in annotated:
        return label
    for other in annotated:
        if members[label] <= members[other]:
            return other
    return 0 if all(members[label].isdisjoint(members[other]) for other in annotated) else None


def naive_loss(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor | None = None,
    *,
    members: Tensor | None = None,
    batch_dice: bool,
    smooth: float = 1e-5,
    ignore_label: int | None = None,
) -> Tensor:
    members = label_members(logits.shape[1]) if members is None else members
    sets = [set(row.nonzero().flatten().tolist()) for row in members]
    if annotated is None:
        annotated = torch.tensor([[len(outputs) == 1 for outputs in sets]] * len(logits))
    target = target.reshape(len(logits), -1)
    cross_entropies: list[Tensor] = []
    terms: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for b, z in enumerate(logits.flatten(2)):
        p = z.softmax(0)
        known = {label for label in range(1, len(sets)) if annotated[b, label]}
        covered = set().union(*(sets[label] for label in known))
        meaning = dict(enumerate(sets)) | {0: set(range(len(p))) - covered}
        labels = [None if y == ignore_label else counts_as(y, sets, known) for y in target[b].long().tolist()]
        for v, label in enumerate(labels):
            if label is not None:
                of = sorted(meaning[label])
                cross_entropies.append(z[:, v].logsumexp(0) - z[of, v].logsumexp(0))
        counted = torch.tensor([label is not None for label in labels])
        for label in known:
            q = p[sorted(sets[label])].sum(0)[counted]
            y = torch.tensor([other == label for other in labels])[counted]
            terms[b, label] = (q[y].sum(), q.sum(), y.sum())
    if batch_dice:
        joint: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        for (_, label), own in terms.items():
            before = joint.get((0, label), (torch.zeros(()),) * 3)
            joint[0, label] = (before[0] + own[0], before[1] + own[1], before[2] + own[2])
        terms = joint
    dice = [(2 * i + smooth) / (p + g + smooth) for i, p, g in terms.values()]
    zero = logits.sum() * 0
    mean_ce = sum(cross_entropies, zero) / max(len(cross_entropies), 1)
    return mean_ce - sum(dice, zero) / max(len(dice), 1)
