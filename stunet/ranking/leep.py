"""LEEP: how well a source model's own outputs predict the target's labels (arXiv 2002.12462)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stunet.errors import TransferabilityError
from stunet.ranking.pooled import check_pooled

__all__ = ["leep"]


def leep(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean log likelihood of the labels under ``P(y) = sum_z P(y | z) theta_z``, at most 0.

    ``P(y | z)`` comes from the same points: the joint distribution of label and source output, divided by the output's
    marginal.

    Args:
        probabilities: ``theta``, `(n, K)` softmax outputs of the source model, rows that sum up to 1.
        labels: `(n,)`, at least two classes.

    Raises:
        TransferabilityError: The arrays do not fit, there is one class only, or rows are no distributions.
    """
    theta, classes = check_pooled(probabilities, labels)
    if theta.min() < 0 or np.abs(theta.sum(1) - 1).max() > 0.01:
        raise TransferabilityError(
            "probabilities that are none",
            got=f"values from {theta.min():g}, rows that sum up to {theta.sum(1).min():g} to {theta.sum(1).max():g}",
            expected="softmax outputs: values from 0 on, rows that sum up to 1",
            remedy="Apply softmax to the source model's logits.",
        )
    theta = theta / theta.sum(1, keepdims=True)
    joint = np.eye(int(classes.max()) + 1)[classes].T @ theta
    marginal = joint.sum(0)
    given = joint / np.where(marginal > 0, marginal, 1.0)  # an output that never fires predicts nothing
    return float(np.log((theta * given[classes]).sum(1)).mean())
