"""Features of made cases, for tests of transferability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stunet.ranking import CaseFeatures
from stunet.ranking.points import CasePoints, SourceHead

__all__ = ["make_case", "make_cases", "replaced", "scaled"]


def make_case(
    name: str,
    rng: np.random.Generator,
    *,
    classes: Sequence[int] = (0, 1, 2),
    points: int = 20,
    widths: Sequence[int] = (6, 10),
    shift: float = 0.5,
    outputs: int | None = 4,
) -> CaseFeatures:
    """A case whose features depend on the class and on the case."""
    labels = np.repeat(classes, points)
    scales, variety = [], []
    for width in widths:
        of_class = np.array([np.roll(np.linspace(1, 2, width), label) for label in labels])
        of_case = shift * rng.standard_normal(width)
        scales.append((of_class + of_case + rng.standard_normal((len(labels), width))).astype(np.float32))
        variety.append((of_case + rng.standard_normal((30, width))).astype(np.float32))
    probabilities = None if outputs is None else rng.dirichlet(np.ones(outputs), len(labels)).astype(np.float32)
    places = np.random.default_rng(len(labels)).integers(0, 40, (len(labels) + 30, 3))
    read_at = CasePoints(
        case=name, shape=(40, 40, 40), balanced=places[:-30], labels=labels, whole=places[-30:],
        whole_labels=np.full(30, classes[0]), per_class=points, n_whole=30,
        voxels={label: 900 if label == 0 else 50 + label for label in classes}, annotated=frozenset(classes) - {0},
    )  # fmt: skip
    weight = torch.from_numpy(np.random.default_rng(3).standard_normal((4, widths[0])).astype(np.float32))
    return CaseFeatures(
        case=name, labels=labels, scales=tuple(scales), variety=tuple(variety), probabilities=probabilities,
        points=read_at, head=SourceHead(weight, torch.zeros(4)),
    )  # fmt: skip


def make_cases(n: int = 4, seed: int = 0, **kwargs: object) -> list[CaseFeatures]:
    rng = np.random.default_rng(seed)
    return [make_case(f"case{i}", rng, **kwargs) for i in range(n)]  # type: ignore[arg-type]


def scaled(case: CaseFeatures, scale: int, factor: float) -> CaseFeatures:
    """The case with the features of one scale multiplied by a factor, as if the layer's weights were."""

    def multiplied(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(array * np.float32(factor) if d == scale else array for d, array in enumerate(arrays))

    return replaced(case, scales=multiplied(case.scales), variety=multiplied(case.variety))


def replaced(case: CaseFeatures, **changes: object) -> CaseFeatures:
    names = ("case", "labels", "scales", "variety", "probabilities", "points", "head")
    return CaseFeatures(**{**{name: getattr(case, name) for name in names}, **changes})  # type: ignore[arg-type]
