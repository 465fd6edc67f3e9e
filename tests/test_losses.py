"""The partial-label loss against closed forms, a naive version with autograd, and nnU-Net's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import SUPERCLASSES, assert_same, random_annotation, random_case, value_and_gradient
from naive_loss import naive_loss
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from stunet.errors import LossError
from stunet.loss import PartialDiceCELoss, WholeBatch, label_members, partial_dice_ce_loss


def stock_loss(*, batch_dice: bool, ignore_label: int | None) -> nn.Module:
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


# Two voxels, three classes: voxel 0 is background, voxel 1 of structure 1. Probabilities are chosen, logits their logs.
PROBABILITIES = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], dtype=torch.float64)
LOGITS = PROBABILITIES.log().T.reshape(1, 3, 1, 2)
TARGET = torch.tensor([[[0, 1]]])


def test_two_voxels_and_three_classes_all_annotated() -> None:
    got = partial_dice_ce_loss(LOGITS, TARGET, batch_dice=True, smooth=0.5)
    cross_entropy = -(math.log(0.5) + math.log(0.6)) / 2
    dice_1 = (2 * 0.6 + 0.5) / (0.2 + 0.6 + 1 + 0.5)
    dice_2 = 0.5 / (0.3 + 0.3 + 0.5)
    assert float(got) == pytest.approx(cross_entropy - (dice_1 + dice_2) / 2, rel=1e-12)


def test_two_voxels_and_three_classes_one_annotated() -> None:
    annotated = torch.tensor([[True, True, False]])
    got, gradient = value_and_gradient(partial_dice_ce_loss, LOGITS, TARGET, annotated, batch_dice=True, smooth=0.5)
    # Structure 2 is merged into the background: q of voxel 0 is 0.5 + 0.3.
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    denominator = 0.2 + 0.6 + 1 + 0.5
    dice = (2 * 0.6 + 0.5) / denominator
    assert float(got) == pytest.approx(cross_entropy - dice, rel=1e-12)
    # By hand: dCE/dz_c = (p_c - [c in E] p_c / q) / 2, dDice/dp_1 = (2 [y = 1] - Dice) / denominator.
    by_p = [(0 - dice) / denominator, (2 - dice) / denominator]
    expected = torch.empty(2, 3, dtype=torch.float64)
    for v, (e, q) in enumerate([((0, 2), 0.8), ((1,), 0.6)]):
        p = PROBABILITIES[v].tolist()
        for c in range(3):
            from_ce = (p[c] - (p[c] / q if c in e else 0)) / 2
            expected[v, c] = from_ce - by_p[v] * p[1] * ((c == 1) - p[c])
    torch.testing.assert_close(gradient[0, :, 0].T, expected)


def test_two_voxels_and_a_superclass() -> None:
    members = label_members(3, {3: (1, 2)})
    annotated = torch.tensor([[False, False, False, True]])
    got = partial_dice_ce_loss(LOGITS, torch.tensor([[[0, 3]]]), annotated, members=members, batch_dice=False)
    dice = (2 * 0.9 + 1e-5) / (0.5 + 0.9 + 1 + 1e-5)
    assert float(got) == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2 - dice, rel=1e-12)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore_label", [None, 6])
@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 6)])
def test_equals_nnunet_where_everything_is_annotated(
    batch_dice: bool, ignore_label: int | None, shape: tuple[int, ...]
) -> None:
    logits, target = random_case(0, shape, labels=6 + (ignore_label is not None))
    logits, target = logits.float(), target.to(torch.int16)
    ours = PartialDiceCELoss(6, batch_dice=batch_dice, ignore_label=ignore_label)
    stock = stock_loss(batch_dice=batch_dice, ignore_label=ignore_label)
    expected = value_and_gradient(stock, logits, target)
    assert_same(value_and_gradient(ours, logits, target), expected)
    assert_same(value_and_gradient(ours, logits, target[:, 0].float()), expected)
    with ours.annotated_in(torch.ones(2, 6, dtype=torch.bool)):
        assert_same(value_and_gradient(ours, logits, target), expected)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore_label", [None, 6])
def test_equals_nnunet_with_deep_supervision(batch_dice: bool, ignore_label: int | None) -> None:
    sizes, weights = [(8, 6, 4), (4, 3, 2), (2, 3, 1)], [2 / 3, 1 / 3, 0.0]
    cases = [random_case(i, size, labels=6 + (ignore_label is not None)) for i, size in enumerate(sizes)]
    targets = [target for _, target in cases]
    settings: dict[str, Any] = {"batch_dice": batch_dice, "ignore_label": ignore_label}
    results = []
    for loss in (
        PartialDiceCELoss(6, **settings, weight_factors=weights),
        DeepSupervisionWrapper(PartialDiceCELoss(6, **settings), weights),
        DeepSupervisionWrapper(stock_loss(**settings), weights),
    ):
        outputs = [logits.float().requires_grad_() for logits, _ in cases]
        value = loss(outputs, targets)
        value.backward()
        assert outputs[2].grad is None
        results.append((value.detach(), torch.cat([o.grad.flatten() for o in outputs[:2] if o.grad is not None])))
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


def test_equals_nnunet_over_several_chunks() -> None:
    logits, target = random_case(1, (71, 60, 47), outputs=3, labels=4)
    logits = logits.float()
    ours = PartialDiceCELoss(3, batch_dice=True, ignore_label=3)
    expected = value_and_gradient(stock_loss(batch_dice=True, ignore_label=3), logits, target)
    assert_same(value_and_gradient(ours, logits, target), expected)


def test_equals_nnunet_for_large_logits() -> None:
    logits, target = random_case(2)
    logits = 40 * logits.float()
    ours = PartialDiceCELoss(6, batch_dice=False)
    expected = value_and_gradient(stock_loss(batch_dice=False, ignore_label=None), logits, target)
    assert_same(value_and_gradient(ours, logits, target), expected)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_equals_nnunet_where_all_voxels_are_ignored(batch_dice: bool) -> None:
    logits, target = random_case(3)
    target = torch.full_like(target, 6)
    ours = PartialDiceCELoss(6, batch_dice=batch_dice, ignore_label=6)
    value, gradient = value_and_gradient(ours, logits.float(), target)
    assert float(value) == float(stock_loss(batch_dice=batch_dice, ignore_label=6)(logits.float(), target)) == -1
    assert not gradient.any()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore_label", [None, -1])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_naive_form(batch_dice: bool, ignore_label: int | None, seed: int) -> None:
    members = label_members(6, SUPERCLASSES)
    logits, target = random_case(seed, batch=3, labels=8)
    if ignore_label is not None:
        target[target == seed] = ignore_label
    annotated = random_annotation(seed, 3)
    kwargs: dict[str, Any] = {"members": members, "batch_dice": batch_dice, "ignore_label": ignore_label}
    expected = value_and_gradient(naive_loss, logits, target, annotated, **kwargs)
    assert_same(value_and_gradient(partial_dice_ce_loss, logits, target, annotated, **kwargs), expected, 1e-12)


def test_equals_the_naive_form_over_several_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 300, 1500, 1, generator=generator, dtype=torch.float64)
    target = torch.randint(300, (1, 1500, 1), generator=generator)
    annotated = torch.rand(1, 300, generator=generator) < 0.1
    got = value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=True)
    assert_same(got, value_and_gradient(naive_loss, logits, target, annotated, batch_dice=True), 1e-12)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_gradient_by_finite_differences(batch_dice: bool, seed: int) -> None:
    logits, target = random_case(seed, (2, 3), labels=8)
    target[0, 0, 0, 0] = 8
    annotated = random_annotation(seed, 2)
    kwargs: dict[str, Any] = {"members": label_members(6, SUPERCLASSES), "batch_dice": batch_dice, "ignore_label": 8}

    def loss(x: Tensor) -> Tensor:
        return 3 * partial_dice_ce_loss(x, target, annotated, smooth=0.1, **kwargs)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_background_pulls_on_the_sum_of_what_is_not_annotated() -> None:
    logits, target = random_case(4)
    annotated = torch.tensor([[False, True, False, False, True, False]] * 2)
    _, gradient = value_and_gradient(
        partial_dice_ce_loss, logits, torch.zeros_like(target), annotated, batch_dice=True
    )  # fmt: skip
    merged = [0, 2, 3, 5]
    share = logits[:, merged].softmax(1)
    torch.testing.assert_close(gradient[:, merged], gradient[:, merged].sum(1, keepdim=True) * share)
    assert (gradient[:, merged] < 0).all()
    assert (gradient[:, [1, 4]] > 0).all()


def test_where_nothing_is_annotated_there_is_nothing_to_learn() -> None:
    logits, target = random_case(5)
    annotated = torch.zeros(2, 6, dtype=torch.bool)
    for batch_dice in (True, False):
        value, gradient = value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=batch_dice)
        assert float(value) == 0
        assert float(gradient.abs().max()) < 1e-16


def test_gradient_survives_probabilities_that_underflow() -> None:
    logits = torch.tensor([0.0, 500.0, -300.0, 1.0])[None, :, None, None].expand(1, 4, 1, 2)
    annotated = torch.tensor([[False, True, False, False]])
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    expected = value_and_gradient(naive_loss, logits.double(), target, annotated, batch_dice=True)
    got = value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=True)
    assert float(got[1][0, 0, 0, 0]) == pytest.approx(-0.5 / (1 + math.e), rel=1e-5)
    assert_same(got, expected)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_order_of_classes_does_not_matter(batch_dice: bool) -> None:
    logits, target = random_case(6)
    annotated = torch.tensor([[False, True, False, True, True, False], [False, False, False, True, False, True]])
    order = torch.tensor([0, 4, 2, 5, 1, 3])  # new channel i is old channel order[i]
    renamed = order.argsort()[target]
    value, gradient = value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=batch_dice)
    other = value_and_gradient(
        partial_dice_ce_loss, logits[:, order], renamed, annotated[:, order], batch_dice=batch_dice
    )  # fmt: skip
    assert_same(other, (value, gradient[:, order]), 1e-12)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("kind", ["empty", "all background", "single voxel"])
def test_small_and_absent_structures(kind: str, batch_dice: bool) -> None:
    logits, target = random_case(7)
    target[target == 3] = 0
    if kind != "empty":
        target[:] = 0
    if kind == "single voxel":
        target[0, 0, 1, 2, 3] = 3
    annotated = torch.tensor([[False, True, False, True, True, False], [False, False, False, True, False, True]])
    for smooth in (1e-5, 0.0):
        kwargs: dict[str, Any] = {"batch_dice": batch_dice, "smooth": smooth}
        expected = value_and_gradient(naive_loss, logits, target, annotated, **kwargs)
        assert_same(value_and_gradient(partial_dice_ce_loss, logits, target, annotated, **kwargs), expected, 1e-12)


def test_weights_of_the_terms() -> None:
    logits, target = random_case(11)
    both, ce, dice = (
        value_and_gradient(PartialDiceCELoss(6, batch_dice=True, weight_ce=ce, weight_dice=dice), logits, target)
        for ce, dice in ((0.3, 2), (1, 0), (0, 1))
    )
    assert_same(both, (0.3 * ce[0] + 2 * dice[0], 0.3 * ce[1] + 2 * dice[1]), 1e-12)
    assert float(ce[0]) == pytest.approx(float(nn.functional.cross_entropy(logits, target[:, 0])), rel=1e-12)


def test_labels_that_their_case_does_not_annotate() -> None:
    members = label_members(4, {4: (1, 2)})
    logits, _ = random_case(12, (1, 1), batch=1, outputs=4)
    p = logits.softmax(1)[0, :, 0, 0]

    def q(label: int, *annotated: int) -> float:
        mask = torch.zeros(1, 5, dtype=torch.bool)
        mask[0, list(annotated)] = True
        target = torch.full((1, 1, 1), label)
        loss = partial_dice_ce_loss(logits, target, mask, members=members, batch_dice=True, weight_dice=0)
        return math.exp(-float(loss))

    assert q(3, 1, 2) == pytest.approx(float(p[0] + p[3]))  # as background
    assert q(4, 3) == pytest.approx(float(p[0] + p[1] + p[2]))  # likewise, all members being merged into it
    assert q(1, 4) == pytest.approx(float(p[1] + p[2]))  # as the superclass that has it
    assert q(4, 1, 3) == 1  # neither background nor annotated: left out


def test_members_of_labels() -> None:
    got = label_members(3, {4: (2, 1), 3: [1, 2]}).int().tolist()
    assert got == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float32])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_labels_of_any_type(dtype: torch.dtype, batch_dice: bool) -> None:
    expected = partial_dice_ce_loss(LOGITS, TARGET, batch_dice=batch_dice)
    assert torch.equal(partial_dice_ce_loss(LOGITS, TARGET.to(dtype), batch_dice=batch_dice), expected)
    loss, whole = PartialDiceCELoss(LOGITS.shape[1], batch_dice=batch_dice), WholeBatch()
    with loss.counted_in(whole):
        loss(LOGITS, TARGET.to(dtype))
    with loss.as_part_of(whole):
        torch.testing.assert_close(loss(LOGITS, TARGET.to(dtype)), expected)


FUNCTIONAL = torch.autograd.functional
DERIVATIVES: dict[str, Callable[[Any, Tensor], Any]] = {
    "hvp": lambda loss, z: FUNCTIONAL.hvp(loss, z, z),
    "vhp": lambda loss, z: FUNCTIONAL.vhp(loss, z, z),
    "torch.func.grad": lambda loss, z: torch.func.grad(loss)(z),
    "jvp": lambda loss, z: torch.func.jvp(loss, (z,), (z,)),
    "vectorized": lambda loss, z: FUNCTIONAL.jacobian(lambda z: torch.stack([loss(z), loss(2 * z)]), z, vectorize=True),
    "vmap": lambda loss, z: torch.func.vmap(torch.func.grad(loss))(torch.stack([z, z])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("batch_dice", [True, False])
def test_other_derivatives_than_the_first_are_refused(kind: str, batch_dice: bool) -> None:
    logits, target = random_case(0)
    with pytest.raises((RuntimeError, LossError)):
        DERIVATIVES[kind](lambda z: partial_dice_ce_loss(z, target, batch_dice=batch_dice), logits)
