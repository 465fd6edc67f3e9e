"""The cheapest way to train a network within the memory of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stunet.network.estimate import Estimate, estimate
from stunet.network.training_memory import Parallel
from stunet.sizes import STUNetSize

__all__ = ["USABLE_SHARE", "Recommendation", "recommend"]

USABLE_SHARE = 0.9
"""Part of a GPU's memory that tensors may take; the rest is for what estimates leave out."""


@dataclass(frozen=True)
class Recommendation:
    """Settings for one size.

    Attributes:
        fits: Whether a process needs no more than it has with these settings; else they are those that need least.
        settings: Training settings other than the defaults, by the names that plans have for them.
        estimate: With these settings.
    """

    fits: bool
    settings: dict[str, Any]
    estimate: Estimate


def recommend(
    size: STUNetSize,
    gpu_bytes: int,
    *,
    batch_size: int,
    ranks: int = 1,
    parallel: Parallel | None = None,
    batch_dice: bool = False,
    **kwargs: Any,
) -> Recommendation:
    """Find the settings that cost least time among those that fit.

    A step is about three forward passes. In this order, each way with as few pieces as fit:

    1. nothing; then ``fused_optimizer``, which is no slower and computes the same;
    2. ``gradient_accumulation``: as many operations, on fewer samples at a time;
    3. ``activation_checkpointing=encoder``, which runs less than half of the network forward once more, then
       ``all``, which runs nearly all of it;
    4. ``momentum_dtype=bf16``: little time, but the first that changes the training, by rounding at random;
    5. ``parallel=fsdp``, where there are several processes: parameters travel before each use.

    With ``batch_dice``, accumulation itself takes a forward pass more, and comes after checkpointing in 3.

    Args:
        size: Size of the network.
        gpu_bytes: Memory of a GPU, of which :data:`USABLE_SHARE` counts.
        batch_size: Patches in the batch of all processes.
        ranks: Processes, each with a GPU of its own.
        parallel: ``fsdp`` where nothing else is wanted; else DDP comes first where there are several processes.
        batch_dice: Whether Dice is computed over the whole batch.
        **kwargs: Further arguments of :func:`stunet.network.estimate`.

    Raises:
        ArchitectureError: As of :func:`stunet.network.estimate`.
    """
    limit = USABLE_SHARE * gpu_bytes
    most_pieces = max(1, batch_size // ranks)
    least: Recommendation | None = None
    for family in _families(ranks, parallel, batch_dice and most_pieces > 1):
        in_pieces = family.pop("in_pieces")
        pieces = _useful_pieces(batch_size, ranks, most_pieces) if in_pieces else [1]
        # If the most pieces do not fit, fewer will not.
        for n in (pieces[-1], *pieces[:-1]):
            settings = {**family, **({"gradient_accumulation": n} if n > 1 else {})}
            arguments = {"parallel": "none" if ranks == 1 else "ddp", **settings}
            got = estimate(size, batch_size=batch_size, ranks=ranks, **arguments, **kwargs)
            found = Recommendation(got.training_bytes <= limit, settings, got)
            if least is None or got.training_bytes < least.estimate.training_bytes:
                least = found
            if n == pieces[-1]:
                if not found.fits:
                    break
                smallest = found
            elif found.fits:
                return found
        else:
            return smallest
    assert least is not None
    return least


def _families(ranks: int, parallel: Parallel | None, pieces_cost_time: bool) -> Iterator[dict[str, Any]]:
    ways: list[dict[str, Any]] = [] if parallel == "fsdp" else [{}]
    if ranks > 1:
        ways.append({"parallel": "fsdp"})
    for way in ways:
        if way == ways[0]:
            yield {**way, "in_pieces": False}
        for momentum in ({}, {"momentum_dtype": "bf16"}):
            for in_pieces in (False, True) if pieces_cost_time else (True,):
                for where in ("none", "encoder", "all"):
                    checkpointing = {} if where == "none" else {"activation_checkpointing": where}
                    # PyTorch has no such step for sharded parameters; that in bf16 has few temporary tensors as it is.
                    fused = {} if momentum or way else {"fused_optimizer": True}
                    yield {**way, **fused, **momentum, **checkpointing, "in_pieces": in_pieces}


def _useful_pieces(batch_size: int, ranks: int, most: int) -> list[int]:
    """Numbers of pieces, from 1, that make the largest piece smaller than the number before."""
    share = -(-batch_size // ranks)
    kept: dict[int, int] = {}
    for n in range(1, most + 1):
        kept.setdefault(-(-share // n), n)
    return list(kept.values())
