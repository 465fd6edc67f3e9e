"""The partial-label loss as training calls it: precision, layout, threads, memory, its context, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from loss_cases import assert_same, random_annotation, random_case, value_and_gradient
from torch import Tensor

from stunet.errors import LossError
from stunet.loss import PartialDiceCELoss, label_members, partial_dice_ce_loss


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("everything", [True, False])
def test_half_precision_logits(dtype: torch.dtype, precision: float, everything: bool) -> None:
    logits, target = random_case(8)
    rounded = logits.to(dtype)
    annotated = None if everything else random_annotation(8, 2)[:, :6]

    def loss(x: Tensor) -> Tensor:
        return 2**10 * partial_dice_ce_loss(x, target, annotated, batch_dice=True)  # scaled, as mixed precision does

    value, gradient = value_and_gradient(loss, rounded)
    expected_value, expected = value_and_gradient(loss, rounded.float())
    assert gradient.dtype == dtype
    assert value.dtype == torch.float32
    assert float(value) == float(expected_value)
    # One rounding, of each element.
    torch.testing.assert_close(gradient.float(), expected, rtol=precision, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    logits, target = random_case(9)
    expected = value_and_gradient(partial_dice_ce_loss, logits.float(), target, batch_dice=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(partial_dice_ce_loss, logits.float(), target, batch_dice=True)
    assert_same(got, expected, 0)


def test_layout_of_the_logits_and_inputs_left_as_they_were() -> None:
    logits, target = random_case(10, labels=7)
    copies = logits.clone(), target.clone()
    loss = PartialDiceCELoss(6, batch_dice=True, ignore_label=6)
    expected = value_and_gradient(loss, logits, target)
    assert_same(value_and_gradient(loss, logits.to(memory_format=torch.channels_last_3d), target), expected, 1e-12)
    assert torch.equal(logits, copies[0])
    assert torch.equal(target, copies[1])
    with torch.no_grad():
        assert float(loss(logits, target)) == float(expected[0])


def test_annotation_holds_within_its_context_only() -> None:
    logits, target = random_case(13)
    loss = PartialDiceCELoss(6, batch_dice=True)
    everything = float(loss(logits, target))
    annotated = torch.tensor([[False, True, False, True, True, False]] * 2)
    with pytest.raises(RuntimeError, match="inside"), loss.annotated_in(annotated):  # noqa: PT012
        assert float(loss(logits, target)) == pytest.approx(
            float(partial_dice_ce_loss(logits, target, annotated, batch_dice=True))
        )
        assert float(loss(logits, target)) != everything
        raise RuntimeError("inside")
    assert float(loss(logits, target)) == everything


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_nothing(threads: Callable[[int], None]) -> None:
    logits, target = random_case(14, (60, 61, 62), outputs=4, labels=4)
    annotated = torch.tensor([[False, True, False, True], [False, False, False, True]])
    results = []
    for n in (1, 3):
        threads(n)
        results.append(value_and_gradient(partial_dice_ce_loss, logits, target, annotated, batch_dice=True))
        assert torch.get_num_threads() == n
        started = []
        thread = Thread(target=lambda started=started: started.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert started == [n]
    assert_same(*results, 1e-12)


def test_memory_is_the_gradient_and_little_more(threads: Callable[[int], None]) -> None:
    threads(1)  # the profiler sees no other
    logits = torch.randn(2, 105, 40, 40, 40, requires_grad=True)
    target = torch.randint(105, (2, 1, 40, 40, 40), dtype=torch.int16)
    annotated = torch.rand(2, 105) < 0.5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        partial_dice_ce_loss(logits, target, annotated, batch_dice=True).backward()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    size = logits.numel() * 4
    assert size <= peak < 1.1 * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 5, 2, 2)}, "logits that do not fit"),
        ({"logits": torch.zeros(2, 4, 2, 2, dtype=torch.long)}, "logits that do not fit"),
        ({"target": torch.zeros(2, 2, 3)}, "another shape"),
        ({"target": torch.zeros(2, 4, 2, 2)}, "another shape"),
        ({"target": torch.full((2, 2, 2), 5)}, "no output stands for label values"),
        ({"target": torch.full((2, 2, 2), -1)}, "no output stands for label values"),
        ({"target": torch.full((2, 2, 2), math.nan)}, "no output stands for label values"),
        ({"target": torch.full((2, 2, 2), 1.5)}, r"no output stands for label values 1\.5[\s\S]*whole numbers"),
        ({"logits": torch.zeros(0, 4, 2, 2), "target": torch.zeros(0, 2, 2), "annotated": None}, "an empty batch"),
        ({"logits": torch.zeros(2, 4, 0, 2), "target": torch.zeros(2, 0, 2)}, "an empty batch"),
        ({"annotated": torch.ones(2, 4, dtype=torch.bool)}, "annotation that does not fit"),
        ({"annotated": torch.ones(1, 5, dtype=torch.bool)}, "annotation that does not fit"),
        ({"annotated": torch.ones(2, 5)}, "annotation that does not fit"),
        ({"annotated": torch.ones(2, 5, dtype=torch.bool)}, "case 0 of the batch annotates labels that share outputs"),
        ({"members": torch.eye(4)}, "members that do not say"),
        ({"members": torch.eye(4, dtype=torch.bool)[:, [1, 0, 2, 3]]}, "members that do not say"),
        ({"members": torch.eye(4, dtype=torch.bool)[[0, 1, 1, 2, 3]]}, "members that do not say"),
        ({"ignore_label": 4}, "ignore label that stands for outputs"),
        ({"ddp": True}, "without a process group"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 4, 2, 2),
        "target": torch.zeros(2, 2, 2, dtype=torch.long),
        "annotated": torch.tensor([[False, True, True, True, False]] * 2),
        "members": label_members(4, {4: (1, 2)}),
        "batch_dice": True,
    }
    partial_dice_ce_loss(**arguments)
    with pytest.raises(LossError, match=message):
        partial_dice_ce_loss(**(arguments | change))


@pytest.mark.parametrize("superclasses", [{5: (1, 2)}, {3: (1, 2)}, {4: (1, 4)}, {4: (0, 1)}, {4: (2,)}])
def test_impossible_superclasses(superclasses: dict[int, tuple[int, ...]]) -> None:
    with pytest.raises(LossError, match="superclass"):
        label_members(4, superclasses)
