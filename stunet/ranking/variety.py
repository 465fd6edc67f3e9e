"""How widely features spread: the hyperspherical energy of points, and feature variety (arXiv 2307.11958)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.samples import CaseFeatures, check_cases, unit_norm

__all__ = ["case_varieties", "feature_variety", "hyperspherical_energy"]

Array = NDArray[np.float64]

#: Distances below this share of the points' root mean square norm count as this share.
FLOOR = 0.01
_ROWS = 512


def hyperspherical_energy(points: ArrayLike, *, s: float = 1.0, floor: float = FLOOR) -> float:
    """Mean over ordered pairs of different points of ``|v_i - v_j|^-s``, or of ``-log |v_i - v_j|`` for ``s = 0``.

    The points are taken as they are: scale them to the unit sphere first where their norms shall not count. Points that
    coincide, as in air outside of the patient, would make the energy infinite, and a few that nearly do would be all
    that it tells. So distances have a floor. With the default, a hundredth of the radius, a pair adds 100 at most for
    ``s = 1``, where orthogonal points add 0.7. It changes the uniform distribution on the sphere in 3 dimensions, where
    near points are common, by 1/400, and those in more dimensions by much less.

    Args:
        points: `(m, C)`, at least 2. Memory is that of the points and of 512 rows of distances.
        s: The power, at least 0.
        floor: Lowest distance, as a share of the root mean square norm of the points.

    Raises:
        TransferabilityError: Fewer than 2 points, all zero or not finite; or a power or floor out of range.
    """
    if s < 0 or floor <= 0:
        raise TransferabilityError(
            "an energy that is not defined",
            got=f"power {s:g}, floor {floor:g}",
            expected="a power from 0 on and a floor above 0",
            remedy="Choose s=1 and the default floor.",
        )
    rows = np.asarray(points, dtype=np.float64)
    radius = float(np.sqrt(np.square(rows).sum() / len(rows))) if rows.ndim == 2 and len(rows) > 1 else 0.0
    if not 0 < radius < np.inf:
        raise TransferabilityError(
            "points without an energy",
            got=f"{rows.shape} with root mean square norm {radius:g}",
            expected="finite (m, C) with at least 2 points that are not all zero",
            remedy="Sample more points; features that are all zero come from a dead layer.",
        )
    rows = (rows - rows.mean(0)) / radius  # near the origin, so that the products below lose no digits
    norms = np.square(rows).sum(1)
    total = 0.0
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        squares = norms[part, None] + norms[start:] - 2 * rows[part] @ rows[start:].T
        np.clip(squares, floor**2, None, out=squares)
        terms = -0.5 * np.log(squares) if s == 0 else squares ** (-s / 2)
        np.fill_diagonal(terms, 0)  # no point pairs with itself
        # Pairs within the block occur twice already, those with later blocks once.
        total += terms[:, : len(terms)].sum() + 2 * terms[:, len(terms) :].sum()
    mean = float(total) / (len(rows) * (len(rows) - 1))
    return mean - float(np.log(radius)) if s == 0 else mean * radius**-s


def case_varieties(cases: Sequence[CaseFeatures], *, normalise: bool = True, s: float = 1.0) -> Array:
    """``1 / E_s`` of each case at each scale.

    Args:
        cases: The cases.
        normalise: Scale features to the unit sphere first, as the energy's name says. Without, variety grows with the
            scale of the layer.
        s: The energy's power, above 0.

    Returns:
        `(D, N)`.

    Raises:
        TransferabilityError: The power is 0, where the energy can be negative; or see :func:`hyperspherical_energy`.
    """
    check_cases(cases)
    if s <= 0:
        raise TransferabilityError(
            "a variety that is not defined",
            got=f"power {s:g}",
            expected="a power above 0, for which the energy is positive",
            remedy="Choose s=1.",
        )
    return np.array(
        [
            [1 / hyperspherical_energy(unit_norm(points) if normalise else points, s=s) for points in scale]
            for scale in zip(*(case.variety for case in cases), strict=True)
        ]
    )


def feature_variety(cases: Sequence[CaseFeatures], *, normalise: bool = True, s: float = 1.0) -> tuple[float, ...]:
    """Feature variety ``F_v = 1/N sum 1/E_s(case)`` of each scale, finest first (arXiv 2307.11958)."""
    return tuple(case_varieties(cases, normalise=normalise, s=s).mean(1).tolist())
