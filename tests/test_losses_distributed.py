"""The loss over two processes (gloo) against one process with the joined batch, and against nnU-Net's over two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from together import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stunet.loss import PartialDiceCELoss, label_members
from stunet.training.distributed import Ranks

SHAPES = [(4, 3, 5), (2, 3, 2)]  # of two outputs of deep supervision
WEIGHTS = [2 / 3, 1 / 3]
OUTPUTS, SUPERCLASS, IGNORE = 5, 5, 6
ANNOTATED = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
NOTHING = torch.zeros(3, 6, dtype=torch.bool)

# Name: (cases of either process, what the three cases annotate)
SCENARIOS = {
    "unequal": ([[0, 1], [2]], ANNOTATED),
    "one annotates nothing": ([[0, 1], [2]], ANNOTATED & torch.tensor([[True], [True], [False]])),
    "nothing is annotated": ([[0], [1, 2]], NOTHING),
    "equal": ([[0], [1]], ANNOTATED),
}


def make_batch() -> tuple[list[Tensor], list[Tensor]]:
    """Logits and targets of three cases, for each output."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, OUTPUTS, *shape, generator=generator) for shape in SHAPES]
    targets = [torch.randint(IGNORE + 1, (3, 1, *shape), generator=generator) for shape in SHAPES]
    return logits, targets


def make_loss(*, batch_dice: bool, ddp: bool) -> tuple[PartialDiceCELoss, DeepSupervisionWrapper]:
    members = label_members(OUTPUTS, {SUPERCLASS: (1, 2)})
    loss = PartialDiceCELoss(members, batch_dice=batch_dice, ignore_label=IGNORE, ddp=ddp)
    return loss, DeepSupervisionWrapper(loss, WEIGHTS)


def partial(cases: list[int], annotated: Tensor, *, batch_dice: bool, ddp: bool) -> dict[str, Tensor]:
    """Value, gradient by the logits of these cases, and gradient by the parameters of a network upon them."""
    logits, targets = make_batch()
    loss, wrapper = make_loss(batch_dice=batch_dice, ddp=ddp)
    leaves = [level[cases].requires_grad_() for level in logits]
    mine = [target[cases] for target in targets]
    with loss.annotated_in(annotated[cases]):
        value = wrapper(leaves, mine)
        by_logits = torch.cat([g.flatten(1) for g in torch.autograd.grad(value, leaves)], 1)
        torch.manual_seed(0)
        network: nn.Module = nn.Conv3d(OUTPUTS, OUTPUTS, 1)
        parameters = list(network.parameters())
        if ddp:
            network = DistributedDataParallel(network)
        loss(network(leaves[0].detach()), mine[0]).backward()
    by_parameters = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return {"value": value.detach(), "by_logits": by_logits, "by_parameters": by_parameters}


def complete(rank: int, *, batch_dice: bool, stock: bool) -> dict[str, Tensor]:
    """One of two equal shares of a batch in which everything is annotated."""
    logits, targets = make_batch()
    leaf = logits[0][[rank]].requires_grad_()
    if stock:
        settings = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": True}
        loss: nn.Module = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        loss = PartialDiceCELoss(OUTPUTS, batch_dice=batch_dice, ddp=True)
    value = loss(leaf, targets[0][[rank]] % OUTPUTS)
    return {"value": value.detach(), "by_logits": torch.autograd.grad(value, leaf)[0]}


def work(ranks: Ranks, folder: str) -> dict[Any, dict[str, Tensor]]:
    rank = ranks.rank
    results: dict[Any, dict[str, Tensor]] = {}
    for batch_dice in (True, False):
        for name, (shares, annotated) in SCENARIOS.items():
            results[name, batch_dice] = partial(shares[rank], annotated, batch_dice=batch_dice, ddp=True)
        for stock in (True, False):
            results["stock" if stock else "ours", batch_dice] = complete(rank, batch_dice=batch_dice, stock=stock)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Tensor]]]:
    return together(2, tmp_path_factory.mktemp("ranks"), work)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("name", SCENARIOS)
def test_mean_over_processes_is_the_joined_batch(ranks: Any, name: str, batch_dice: bool) -> None:
    shares, annotated = SCENARIOS[name]
    cases = [case for share in shares for case in share]
    joined = partial(cases, annotated, batch_dice=batch_dice, ddp=False)
    first, second = (rank[name, batch_dice] for rank in ranks)
    torch.testing.assert_close((first["value"] + second["value"]) / 2, joined["value"], rtol=1e-6, atol=1e-7)
    # Each case is in one process; the other's gradient by it is zero.
    mean = torch.cat([first["by_logits"], second["by_logits"]]) / 2
    torch.testing.assert_close(mean, joined["by_logits"], rtol=1e-5, atol=1e-8)
    for rank in (first, second):
        torch.testing.assert_close(rank["by_parameters"], joined["by_parameters"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_equals_nnunet_in_each_process(ranks: Any, batch_dice: bool) -> None:
    for rank in ranks:
        stock, ours = rank["stock", batch_dice], rank["ours", batch_dice]
        torch.testing.assert_close(ours["value"], stock["value"], rtol=1e-6, atol=0)
        scale = float(stock["by_logits"].abs().max())
        torch.testing.assert_close(ours["by_logits"], stock["by_logits"], rtol=0, atol=1e-6 * scale)
