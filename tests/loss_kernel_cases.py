"""Tests of the kernels of the loss, in a process with ``TRITON_INTERPRET=1``: ``test_loss_kernels.py`` runs them."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from loss_cases import SUPERCLASSES, assert_same, random_annotation, random_case, value_and_gradient
from naive_loss import naive_loss
from torch import Tensor

from stunet.errors import LossError
from stunet.loss import PartialDiceCELoss, WholeBatch, label_members, partial_dice_ce_loss

MEMBERS = label_members(6, SUPERCLASSES)
#: Of the gradient, which has the logits' type; relative to the greatest. (The interpreter cuts bfloat16 off.)
PRECISION = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 6)])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_partial_annotations_in_each_precision(dtype: torch.dtype, shape: tuple[int, ...], batch_dice: bool) -> None:
    logits, target = random_case(3, shape, batch=3, labels=8)
    logits, target = logits.to(dtype), target.masked_fill(target == 2, -1).to(torch.int16)
    annotated = random_annotation(3, 3)
    kwargs: dict[str, Any] = {"members": MEMBERS, "batch_dice": batch_dice, "ignore_label": -1}

    def scaled(loss: Any) -> Any:  # as mixed precision does it
        return lambda x: 2**8 * loss(x, target, annotated, **kwargs)

    value, gradient = value_and_gradient(scaled(partial_dice_ce_loss), logits)
    expected = value_and_gradient(scaled(naive_loss), logits.double())
    assert "stunet.loss_kernels" in sys.modules
    assert gradient.dtype == dtype
    assert_same((value, value), (expected[0],) * 2, min(PRECISION[dtype], 1e-6))
    assert_same((gradient, gradient), (expected[1],) * 2, PRECISION[dtype])


def test_several_programs() -> None:
    logits, target = random_case(0, (33, 32), batch=1, outputs=6, labels=7)
    expected = value_and_gradient(naive_loss, logits, target, batch_dice=True, ignore_label=6)
    assert_same(
        value_and_gradient(partial_dice_ce_loss, logits, target, batch_dice=True, ignore_label=6), expected, 1e-12
    )


def test_more_outputs_than_a_tile_has_room_for() -> None:
    logits, target = random_case(0, (3, 3, 2), batch=1, outputs=1100, labels=1100)
    annotated = torch.rand(1, 1100, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = value_and_gradient(naive_loss, logits, target, annotated, batch_dice=True)
    assert_same(value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=True), expected, 1e-12)


def test_sums_over_many_voxels() -> None:
    n, foreground = 2**19 + 5, 2**18
    logits = torch.tensor([0.0, math.log(3)])[None, :, None, None].expand(1, 2, n, 1)
    target = (torch.arange(n) < foreground).view(1, n, 1)
    got = partial_dice_ce_loss(logits, target, batch_dice=True, smooth=0)
    cross_entropy = (foreground * math.log(4 / 3) + (n - foreground) * math.log(4)) / n
    dice = 2 * 0.75 * foreground / (0.75 * n + foreground)
    assert float(got) == pytest.approx(cross_entropy - dice, rel=1e-6)


@pytest.mark.parametrize("wrong", [7.0, -1.0, 1.5, 1e9, math.nan, math.inf])
def test_wrong_labels_give_nan_and_are_named_when_asked_for(wrong: float) -> None:
    logits, target = random_case(1, (5, 6))
    target = target.float()
    target[1, 0, 2, 3] = wrong
    loss = PartialDiceCELoss(6, batch_dice=False, ignore_label=6)
    value, gradient = value_and_gradient(loss, logits, target)
    assert value.isnan()
    assert gradient[1, :, 2, 3].isnan().all()
    with pytest.raises(LossError, match="no output stands for label values"):
        loss.check_labels([target, target])
    loss.check_labels(target.nan_to_num(6, posinf=6).clamp(0, 6).floor())


@pytest.mark.parametrize("batch_dice", [True, False])
def test_micro_batches_with_several_outputs(batch_dice: bool) -> None:
    cases = [random_case(i, shape, batch=3, labels=9) for i, shape in enumerate([(4, 6), (2, 3)])]
    outputs, targets = zip(*cases, strict=True)
    annotated, factors = random_annotation(5, 3), (0.75, 0.25)
    loss = PartialDiceCELoss(MEMBERS, batch_dice=batch_dice, ignore_label=8, weight_factors=factors)
    expected = sum(
        factor * naive_loss(z, y, annotated, members=MEMBERS, batch_dice=batch_dice, ignore_label=8)
        for factor, z, y in zip(factors, outputs, targets, strict=True)
    )
    whole, values = WholeBatch(), list[Tensor]()
    for context in (loss.counted_in, loss.as_part_of):
        for cut in (slice(0, 2), slice(2, 3)):
            with context(whole), loss.annotated_in(annotated[cut]):
                values.append(loss([z[cut] for z in outputs], [y[cut] for y in targets]))
    assert float(sum(values[2:])) == pytest.approx(float(expected), rel=1e-12)


def test_targets_and_logits_that_are_views() -> None:
    logits, target = random_case(2, (4, 6, 8))
    expected = value_and_gradient(partial_dice_ce_loss, logits, target, batch_dice=False)
    wide = torch.stack([target, target], -1)[..., 0]
    turned = logits.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert_same(value_and_gradient(partial_dice_ce_loss, turned, wide, batch_dice=False), expected, 1e-12)
