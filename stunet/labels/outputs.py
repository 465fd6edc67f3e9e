"""What each output of a network stands for, read off a ``dataset.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stunet.errors import LabelError

__all__ = ["BACKGROUND", "Outputs", "declared_values", "outputs_of"]

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


def declared_values(dataset_json: Mapping[str, Any], source: str) -> list[int]:
    """The values that label maps of a dataset may have, background and ignore label included.

    nnU-Net's rules: whole numbers from 0 without a gap, background 0, the ignore label the highest; with regions a
    ``regions_class_order`` that has an entry for each region but the background.

    Args:
        dataset_json: Content of a ``dataset.json``.
        source: Where it was read, for messages.

    Raises:
        LabelError: A rule is broken: training would stop at the first batch.
    """

    def refuse(problem: str, got: object, expected: str, remedy: str) -> LabelError:
        return LabelError(problem, got=f"{source}: {got}", expected=expected, remedy=remedy)

    labels = dataset_json.get("labels")
    try:
        values = {n: list(map(int, v)) if isinstance(v, list | tuple) else [int(v)] for n, v in dict(labels).items()}  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise refuse("labels that are no label values", labels, "a value, or a list of values, for each name",
                     "Correct dataset.json.") from None  # fmt: skip
    if values.get(BACKGROUND) != [0]:
        raise refuse("background must be label 0", f"{BACKGROUND}: {values.get(BACKGROUND, 'missing')}", "0",
                     "Correct dataset.json.")  # fmt: skip
    plain = sorted({v for name, several in values.items() if name != _IGNORE for v in several})
    everything = plain + values.get(_IGNORE, [])
    if everything != list(range(len(everything))):
        lacking = sorted(set(range(max(everything))) - set(everything))
        raise refuse(
            "labels must be consecutive",
            ", ".join(map(str, everything[:20])) + (" …" if len(everything) > 20 else ""),
            "0, 1, 2 and so on without a gap" + (", and ignore as the highest" if _IGNORE in values else ""),
            f"Renumber them in dataset.json and in the label maps{f'; {lacking[0]} is missing' if lacking else ''}.",
        )
    regions = [name for name, several in values.items() if name != _IGNORE and set(several) != {0}]
    order = dataset_json.get("regions_class_order")
    if any(len(several) > 1 for several in values.values()) and (
        not isinstance(order, list) or len(order) != len(regions)
    ):
        raise refuse("regions without a regions_class_order", order, f"{len(regions)} values, one for each region",
                     "Add it to dataset.json (nnU-Net, documentation/region_based_training.md).")  # fmt: skip
    return everything
