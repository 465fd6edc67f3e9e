"""Features of one case, as the scores take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CaseFeatures"]


@dataclass(frozen=True, kw_only=True)
class CaseFeatures:
    """Features of one case at sampled points.

    Attributes:
        case: Name of the case.
        labels: ``(n,)``, class of each class-balanced point; background is 0, foreground 1 or more.
        scales: For each scale, finest first, ``(n, C_d)`` float32: the features at these points.
        variety: For each scale ``(m, C_d)`` float32: the features at points over the whole volume.
        probabilities: ``(n, K)`` float32: what the source model's own softmax gives at the class-balanced points;
            None where it has none.
    """

    case: str
    labels: npt.NDArray[Any]
    scales: tuple[npt.NDArray[np.float32], ...]
    variety: tuple[npt.NDArray[np.float32], ...]
    probabilities: npt.NDArray[np.float32] | None = None
