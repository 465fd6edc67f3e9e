"""Features at sampled points of a case: what every transferability metric is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError

__all__ = ["CaseFeatures", "check_cases", "mean_over_scales", "pool_probabilities", "pool_scale", "unit_norm"]

Array = NDArray[np.float64]
PooledMetric = Callable[[Array, NDArray[np.int64]], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseFeatures:
    """What a candidate makes of one case of the target dataset, at points.

    Attributes:
        case: The case's identifier.
        labels: `(n,)` class of each class-balanced point; 0 is background, which is among them.
        scales: `(n, C_d)` float32 features at these points, for each scale, finest first.
        variety: `(m, C_d)` float32 features at points of the whole volume, for each scale.
        probabilities: `(n, K)` float32 softmax outputs of the candidate's own head at the class-balanced points, which
            LEEP needs, or None.

    Raises:
        TransferabilityError: The arrays do not fit each other, or hold NaN or infinity.
    """

    case: str
    labels: NDArray[np.integer]
    scales: tuple[NDArray[np.float32], ...]
    variety: tuple[NDArray[np.float32], ...]
    probabilities: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        labels = self.labels
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
            raise self._error("labels that are no classes", f"{labels.dtype} {labels.shape}", "(n,) whole numbers >= 0")
        if not self.scales or len(self.scales) != len(self.variety):
            raise self._error(
                "scales that do not fit each other",
                f"{len(self.scales)} scales of class-balanced points, {len(self.variety)} of the whole volume",
                "the same number, at least one",
            )
        for d, (balanced, volume) in enumerate(zip(self.scales, self.variety, strict=True)):
            self._check_array(f"scale {d}", balanced, len(labels), None)
            self._check_array(f"scale {d} of the whole volume", volume, None, balanced.shape[1])
        if self.probabilities is not None:
            self._check_array("probabilities", self.probabilities, len(labels), None)
            self._check_distribution(self.probabilities)

    def points(self, scale: int, label: int) -> NDArray[np.float32]:
        """Features `(n_k, C_d)` at the points of one class."""
        points: NDArray[np.float32] = self.scales[scale][self.labels == label]
        return points

    def _check_array(self, what: str, array: NDArray[np.float32], rows: int | None, columns: int | None) -> None:
        fits = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[-1])
        if not fits or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
            shape = f"({'m' if rows is None else rows}, {'C' if columns is None else columns})"
            raise self._error(f"features of a wrong shape: {what}", f"{array.dtype} {array.shape}", f"floating {shape}")
        n_bad = int(array.size - np.isfinite(array).sum())
        if n_bad:
            raise TransferabilityError(
                f"features that are not finite: {what}",
                got=f"{n_bad} of {array.size} values are NaN or infinite in case {self.case}",
                expected="finite numbers",
                remedy="Check the candidate's weights and the case's image; with half precision, use single precision.",
            )

    def _check_distribution(self, probabilities: NDArray[np.float32]) -> None:
        # A hundredth, since half precision rounds each output to 3 digits.
        if probabilities.min() < 0 or np.abs(probabilities.sum(1, dtype=np.float64) - 1).max() > 0.01:
            sums = probabilities.sum(1, dtype=np.float64)
            raise self._error(
                "probabilities that are none",
                f"rows that sum up to {sums.min():g} to {sums.max():g}, lowest value {probabilities.min():g}",
                "softmax outputs: values from 0 on, rows that sum up to 1",
            )

    def _error(self, problem: str, got: str, expected: str) -> TransferabilityError:
        return TransferabilityError(
            problem,
            got=f"{got} in case {self.case}",
            expected=expected,
            remedy="Give one row for each point, and one array for each scale.",
        )


def check_cases(cases: Sequence[CaseFeatures]) -> None:
    """Check that cases come from the same candidate and are different cases.

    Raises:
        TransferabilityError: There is none, a case occurs twice, or scales differ in number or width.
    """
    if not cases:
        raise _cases_error("no cases", "0 cases", "features of at least one case")
    names = [case.case for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _cases_error("a case that occurs twice", ", ".join(twice[:5]), "different cases")
    widths = {tuple(scale.shape[1] for scale in case.scales): case.case for case in cases}
    if len(widths) > 1:
        got = "; ".join(f"{list(width)} in {case}" for width, case in widths.items())
        raise _cases_error("cases with different scales", got, "the same channels at each scale in all cases")


def _cases_error(problem: str, got: str, expected: str) -> TransferabilityError:
    return TransferabilityError(
        problem, got=got, expected=expected, remedy="Give each case of the target once, all from one candidate."
    )


def unit_norm(features: NDArray[np.floating]) -> Array:
    """Rows scaled to the unit sphere, float64. A row of zeros stays what it is."""
    rows = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def pool_scale(cases: Sequence[CaseFeatures], scale: int) -> tuple[Array, NDArray[np.int64]]:
    """Class-balanced points of all cases at one scale.

    Returns:
        Features `(n, C)` in float64 and labels `(n,)`, in the order of the cases.
    """
    features = np.concatenate([case.scales[scale] for case in cases]).astype(np.float64)
    return features, np.concatenate([case.labels for case in cases]).astype(np.int64)


def pool_probabilities(cases: Sequence[CaseFeatures]) -> tuple[Array, NDArray[np.int64]]:
    """Source probabilities of all cases at the class-balanced points.

    Returns:
        Probabilities `(n, K)` in float64 and labels `(n,)`, in the order of the cases.

    Raises:
        TransferabilityError: A case has none, or another number of outputs than the first.
    """
    given = [(case.case, case.probabilities) for case in cases]
    missing = [name for name, values in given if values is None]
    if missing:
        raise TransferabilityError(
            "no source probabilities",
            got=f"none in {len(missing)} of {len(cases)} cases, {missing[0]} for one",
            expected="softmax outputs of the source model at the points of every case",
            remedy="Leave LEEP out for candidates without a head, or extract features with probabilities.",
        )
    arrays = [values for _, values in given if values is not None]
    outputs = {values.shape[1] for values in arrays}
    if len(outputs) > 1:
        raise _cases_error("probabilities of different models", f"{sorted(outputs)} outputs", "the same outputs")
    return np.concatenate(arrays).astype(np.float64), np.concatenate([case.labels for case in cases]).astype(np.int64)


def mean_over_scales(cases: Sequence[CaseFeatures], metric: PooledMetric) -> float:
    """A metric of pooled features, averaged over scales.

    Args:
        cases: The cases, pooled at each scale.
        metric: Takes features `(n, C)` and labels `(n,)`.
    """
    check_cases(cases)
    return float(np.mean([metric(features, labels) for features, labels in _scales(cases)]))


def _scales(cases: Sequence[CaseFeatures]) -> Iterator[tuple[Array, NDArray[np.int64]]]:
    # One scale in memory at a time: the finest points times the widest features would add up.
    for scale in range(len(cases[0].scales)):
        yield pool_scale(cases, scale)
