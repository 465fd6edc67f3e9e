"""The loss of a batch, and its derivatives, by sums over its cases, wherever these were computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from stunet.errors import LossError
from stunet.loss.chunks import Sums

__all__ = ["Joint", "LossSettings", "combine", "count_of", "total_of"]

# nnU-Net's bound of the denominator of Dice.
_SMALLEST_DENOMINATOR = 1e-8


@dataclass(frozen=True)
class LossSettings:
    """Arguments of :func:`stunet.loss.partial_dice_ce_loss` that do not change from batch to batch."""

    batch_dice: bool
    smooth: float
    ignore_label: int | None
    ddp: bool
    weight_ce: float
    weight_dice: float

    def check(self, members: Tensor) -> None:
        """Refuse an ignore label that is among the labels.

        Raises:
            LossError: It is.
        """
        if self.ignore_label is not None and 0 <= self.ignore_label < len(members):
            raise LossError(
                "an ignore label that stands for outputs",
                got=self.ignore_label,
                expected=f"a value that is none of the {len(members)} labels",
                remedy=f"Give it the value {len(members)}, as nnU-Net does.",
            )


@dataclass(frozen=True)
class Joint:
    """What adds up over the cases of a whole batch.

    Attributes:
        total: :func:`total_of` of all its cases, on all processes.
        pieces: Into how many pieces each process divides its cases.
    """

    total: Tensor
    pieces: int = 1


def count_of(voxels: Tensor, annotated: Tensor) -> Tensor:
    """What adds up without ``batch_dice``: voxels, and pairs of a case and a label that it annotates; ``(2,)``.

    Args:
        voxels: ``()``, voxels of some cases that are not left out.
        annotated: ``(B, L)``, of these cases.
    """
    return torch.stack([voxels, annotated.to(voxels).sum()])


def total_of(sums: list[Sums], annotated: Tensor, settings: LossSettings) -> Tensor:
    """What adds up: :func:`count_of`; with ``batch_dice`` also ``(L,)`` pairs and ``(3, L)`` sums of each label.

    Args:
        sums: Of some cases.
        annotated: ``(B, L)``, of these cases.
        settings: Of the loss.
    """
    counts = count_of(torch.stack([s.voxels for s in sums]).sum(), annotated)
    if not settings.batch_dice:
        return counts
    mask = annotated.to(counts)
    by_label = torch.stack([s.by_label for s in sums], 1) * mask
    return torch.cat([counts, mask.sum(0), by_label.sum(1).flatten()])


def combine(
    sums: list[Sums], annotated: Tensor, settings: LossSettings, joint: Joint | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss and its derivatives nu ``()``, alpha ``(B, L)`` and beta ``(B, L)`` by the cases' sums.

    Args:
        sums: Of the cases at hand.
        annotated: ``(B, L)``, of these cases.
        settings: Of the loss.
        joint: Of the whole batch that they are a piece of; None where they are all that this process has of it.
    """
    world = dist.get_world_size() if settings.ddp else 1
    if joint is None:
        total = total_of(sums, annotated, settings)
        if settings.ddp:
            dist.all_reduce(total)
        joint = Joint(total)
    total, n_labels = joint.total, annotated.shape[1]
    voxels, n_pairs = total[0].clamp_min(1), total[1]
    mask = annotated.to(total)
    if settings.batch_dice:
        pairs, by_label = total[None, 2 : 2 + n_labels], total[2 + n_labels :].view(3, 1, n_labels)
    else:
        pairs, by_label = mask, torch.stack([s.by_label for s in sums], 1) * mask
    present = (pairs > 0).to(mask.dtype)
    count = (present.sum() if settings.batch_dice else n_pairs).clamp_min(1)

    intersection, prediction, reference = by_label
    denominator = reference + prediction + settings.smooth
    bounded = denominator.clamp_min(_SMALLEST_DENOMINATOR)
    dice = (2 * intersection + settings.smooth) / bounded * present / count
    alpha = 2 * present / bounded / count
    beta = torch.where(denominator >= _SMALLEST_DENOMINATOR, dice / bounded, 0)
    scale = world * settings.weight_dice
    # The joint Dice is each process's value; its pieces share it evenly.
    value_dice = dice.sum() * (1 / joint.pieces if settings.batch_dice else world)
    cross_entropy = torch.stack([s.cross_entropy for s in sums]).sum()
    value = settings.weight_ce * world * cross_entropy / voxels - settings.weight_dice * value_dice
    return value, (settings.weight_ce * world / voxels, scale * alpha * mask, scale * beta * mask)
