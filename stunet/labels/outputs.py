"""What each output of a network stands for, read off a ``dataset.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKGROUND", "Outputs", "outputs_of"]

BACKGROUND = "background"
_IGNORE = "ignore"


@dataclass(frozen=True)
class Outputs:
    """Names of a network's outputs.

    Attributes:
        names: One for each output, in order.
        exclusive: Whether a softmax over the outputs, the first of them background, assigns each voxel to one of them;
            otherwise each is a region with a sigmoid of its own.
    """

    names: tuple[str, ...]
    exclusive: bool


def outputs_of(dataset_json: Mapping[str, Any]) -> Outputs:
    """The outputs of a network that nnU-Net trains on a dataset.

    nnU-Net trains regions where a label has several values; then neither background nor the ignore label has an output.

    Args:
        dataset_json: Content of a ``dataset.json``: ``labels`` with one value or a list of values by name.
    """
    labels = {
        name: list(values) if isinstance(values, list | tuple) else [values]
        for name, values in dataset_json["labels"].items()
        if name != _IGNORE
    }
    if any(len(values) > 1 for values in labels.values()):
        return Outputs(tuple(name for name, values in labels.items() if set(values) != {0}), exclusive=False)
    return Outputs(tuple(sorted(labels, key=lambda name: labels[name][0])), exclusive=True)
