"""Random input for losses, and comparison of values and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

#: Labels 6 and 7, which stand for several of six outputs.
SUPERCLASSES = {6: (1, 2), 7: (3, 4, 5)}


def value_and_gradient(loss: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    """Values and gradients to a tolerance relative to the greatest."""
    for one, other in zip(got, expected, strict=True):
        scale = max(float(other.abs().max()), 1e-12)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


def random_case(
    seed: int, shape: tuple[int, ...] = (3, 4, 5), *, batch: int = 2, outputs: int = 6, labels: int = 6
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, outputs, *shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(labels, (batch, 1, *shape), generator=generator)


def random_annotation(seed: int, batch: int) -> Tensor:
    """Of each superclass and its members, either the one or some of the others, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    annotated = torch.zeros(batch, 8, dtype=torch.bool)
    for row, (label, outputs) in itertools.product(annotated, SUPERCLASSES.items()):
        if torch.rand((), generator=generator) < 0.4:
            row[label] = True
        else:
            row[list(outputs)] = torch.rand(len(outputs), generator=generator) < 0.6
    return annotated
