"""Steps in pieces against steps with the whole batch, by the same trainer and by nnU-Net's own step and loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_trainers import make, narrow_plans
from memory_events import allocated
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from together import together
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from plans import DATASET_JSON
from stunet.errors import LossError, SettingsError
from stunet.files import write_json
from stunet.labels.annotations import order_manifest
from stunet.loss import PartialDiceCELoss, WholeBatch, label_members
from stunet.training.distributed import Ranks

LABELS = {"background": 0, "liver": 1, "left": 2, "right": 3, "kidney": 4, "ignore": 5}
DATASET = {**DATASET_JSON, "labels": LABELS}
CONTENT = {
    "version": 1,
    "cases": {"a": ["liver", "left", "right"], "b": ["liver"], "c": ["kidney"], "d": ["right"], "e": ["left", "right"]},
    "superclasses": {"kidney": ["left", "right"]},
}
PATCH = [128, 64]


@pytest.fixture
def annotated(dataset: Path) -> Path:
    write_json(order_manifest(CONTENT), dataset / "annotated_labels.json")
    (dataset / "dataset.json").write_text(json.dumps(DATASET))
    return dataset


def made(pieces: int, *, batch_size: int, batch_dice: bool, partial: bool = False, **settings: Any) -> Any:
    """A trainer in double precision, so that nothing but a wrong sum makes a difference."""
    plans = narrow_plans(batch_size=batch_size, batch_dice=batch_dice, gradient_accumulation=pieces, **settings)
    torch.manual_seed(0)
    trainer = make(plans=plans, configuration="2d", dataset_json=DATASET if partial else DATASET_JSON)
    torch.set_default_dtype(torch.float64)
    try:
        trainer.initialize()
    finally:
        torch.set_default_dtype(torch.float32)
    return trainer


def make_batch(trainer: Any, step: int, size: int, n_labels: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    full = torch.randint(0, n_labels, (size, 1, *PATCH), generator=generator).short()
    scales = trainer._get_deep_supervision_scales()
    targets = [full[(..., *(slice(None, None, round(1 / s)) for s in scale))] for scale in scales]
    data = torch.randn(size, 1, *PATCH, generator=generator, dtype=torch.float64)
    return {"data": data, "target": targets, "keys": list("abcde"[:size])}


def train(trainer: Any, size: int, *, n_labels: int = 3, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    losses = [float(trainer.train_step(make_batch(trainer, i, size, n_labels))["loss"]) for i in range(steps)]
    return losses, [p.detach().clone() for p in trainer.network.parameters()]


def assert_same_training(got: Any, expected: Any) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-9)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_pieces_make_the_step_of_the_whole_batch(annotated: Path, batch_dice: bool, partial: bool) -> None:
    if not partial:
        (annotated / "annotated_labels.json").unlink()
    kwargs: Any = {"batch_size": 5, "batch_dice": batch_dice, "partial": partial}
    n_labels = 6 if partial else 3
    start = [p.detach().clone() for p in made(1, **kwargs).network.parameters()]
    whole = train(made(1, **kwargs), 5, n_labels=n_labels)
    assert max(float((a - b).abs().max()) for a, b in zip(start, whole[1], strict=True)) > 1e-2
    assert_same_training(train(made(2, **kwargs), 5, n_labels=n_labels), whole)  # unequal pieces
    assert_same_training(train(made(5, **kwargs), 5, n_labels=n_labels), whole)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_pieces_make_the_step_of_nnunets_own_loss(dataset: Path, batch_dice: bool) -> None:
    stock = made(1, batch_size=3, batch_dice=batch_dice)
    stock.loss = nnUNetTrainer._build_loss(stock)
    expected = []
    for i in range(3):
        expected.append(float(nnUNetTrainer.train_step(stock, make_batch(stock, i, 3, 3))["loss"]))
    got, weights = train(made(2, batch_size=3, batch_dice=batch_dice), 3)
    # nnU-Net's Dice adds up in the order of the tensors, ours case by case.
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(weights, [p.detach() for p in stock.network.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["frozen-encoder", "all"])
def test_pieces_with_frozen_parameters_or_checkpointing(dataset: Path, where: str) -> None:
    settings = {"fine_tune": where} if where == "frozen-encoder" else {"activation_checkpointing": where}
    kwargs: Any = {"batch_size": 3, "batch_dice": True, **settings}
    assert_same_training(train(made(3, **kwargs), 3, steps=2), train(made(1, **kwargs), 3, steps=2))


def test_mixed_precision_and_scaled_gradients(dataset: Path) -> None:
    """As on CUDA, in bfloat16: half copies of weights, a scaler, and a step that is left out where it overflows."""
    results = []
    for pieces in (1, 2):
        trainer = made(pieces, batch_size=2, batch_dice=True)
        trainer.network.float()
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        batch = make_batch(trainer, 0, 2, 3)
        batch["data"] = batch["data"].float()
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.precision = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        trainer.train_step(batch)
        moved = torch.cat([(p - b).flatten() for p, b in zip(trainer.network.parameters(), before, strict=True)])
        results.append(moved.detach())
        after = [p.detach().clone() for p in trainer.network.parameters()]
        batch["data"][0, 0, 0, 0] = torch.inf
        trainer.train_step(batch)
        torch.testing.assert_close([p.detach() for p in trainer.network.parameters()], after, rtol=0, atol=0)
        assert trainer.grad_scaler.get_scale() == 2.0**11
    assert results[0].abs().max() > 1e-3
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


def test_the_peak_of_activations_is_that_of_a_piece(dataset: Path) -> None:
    piece = peak(made(1, batch_size=1, batch_dice=False), 1)
    # A quarter more for the gradients of the pieces before.
    assert peak(made(4, batch_size=4, batch_dice=False), 4) < 1.25 * piece
    assert peak(made(1, batch_size=4, batch_dice=False), 4) > 1.5 * piece


def peak(trainer: Any, size: int) -> int:
    """Bytes allocated in a step, weights and momentum left out."""
    batch = make_batch(trainer, 0, size, 3)
    trainer.train_step(batch)
    return allocated(lambda: trainer.train_step(batch))


def test_pieces_that_cannot_be(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    made(2, batch_size=2, batch_dice=True).on_train_start()
    with pytest.raises(SettingsError, match=r"gradient_accumulation=3 for 2 samples .*at most 2"):
        made(3, batch_size=2, batch_dice=True).on_train_start()
    regions = {**DATASET_JSON, "labels": {"background": 0, "all": [1, 2], "spleen": 2}, "regions_class_order": [1, 2]}
    trainer = make(plans=narrow_plans(gradient_accumulation=2), dataset_json=regions)
    with pytest.raises(SettingsError, match="regions"):
        trainer.on_train_start()


def test_every_piece_is_counted_before_one_is_computed() -> None:
    loss, whole = PartialDiceCELoss(3, batch_dice=True), WholeBatch()
    logits, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(LossError, match="was not counted"), loss.as_part_of(WholeBatch()):
        loss(logits, target)
    with loss.counted_in(whole):
        assert float(loss(logits, target)) == 0
    with loss.as_part_of(whole):
        assert float(loss(logits, target)) == pytest.approx(
            float(PartialDiceCELoss(3, batch_dice=True)(logits, target))
        )
    with pytest.raises(LossError, match="comes too late"), loss.counted_in(whole):
        loss(logits, target)


def test_labels_are_checked_before_they_are_counted() -> None:
    loss = PartialDiceCELoss(label_members(3), batch_dice=False)
    target = torch.full((1, 4, 4), 7)
    with pytest.raises(LossError, match="no output stands for"), loss.counted_in(WholeBatch()):
        loss(target, target)


def train_in_pieces(ranks: Ranks, folder: str) -> dict[Any, Any]:
    rank, exchanged = ranks.rank, 0
    all_reduce = dist.all_reduce
    results: dict[Any, Any] = {}

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal exchanged
        exchanged += 1
        return all_reduce(*args, **kwargs)

    def counted_gradients(state: None, bucket: dist.GradBucket) -> Any:
        nonlocal exchanged
        exchanged += 1
        return allreduce_hook(None, bucket)

    counted_gradients.__annotations__.clear()  # DDP compares them with the class, and here they are strings
    dist.all_reduce = counted
    for batch_dice in (True, False):
        for pieces in (1, 2):
            exchanged = 0
            trainer = made(pieces, batch_size=5, batch_dice=batch_dice, partial=True)
            assert trainer.batch_size == 3 - rank
            trainer.network.register_comm_hook(None, counted_gradients)
            batch = make_batch(trainer, 0, 5, 6)
            mine = slice(0, 3) if rank == 0 else slice(3, 5)
            share = {
                "data": batch["data"][mine], "target": [t[mine] for t in batch["target"]], "keys": batch["keys"][mine],
            }  # fmt: skip
            losses = [float(trainer.train_step(share)["loss"]) for _ in range(2)]
            network: nn.Module = trainer.plain_network
            results[batch_dice, pieces] = (losses, [p.detach().clone() for p in network.parameters()], exchanged)
    return results


def test_two_processes_with_unequal_shares_in_pieces(annotated: Path, tmp_path: Path) -> None:
    ranks = together(2, tmp_path, train_in_pieces)
    for batch_dice in (True, False):
        for rank in ranks:
            whole, pieces = rank[batch_dice, 1], rank[batch_dice, 2]
            assert_same_training(pieces[:2], whole[:2])
            assert pieces[2] == whole[2]  # as many exchanges as for the whole batch, of sums and of gradients
        torch.testing.assert_close(ranks[0][batch_dice, 2][1], ranks[1][batch_dice, 2][1], rtol=0, atol=0)
