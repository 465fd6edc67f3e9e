"""Left and right, told by the image's own axes and by scores: signs of images that were stored mirrored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stunet.evaluation.volumes import LabelVolume
from stunet.labels.aliases import canonical_name

__all__ = ["CaseOrientation", "Sides", "count_reversed", "orientation_warnings", "sided_pairs"]

#: How much higher the mean Dice of sided structures must be with left and right swapped before a case is suspicious.
_MUCH_BETTER = 0.2
_SHOWN = 8


@dataclass(frozen=True)
class Sides:
    """How many pairs of a left and a right structure were looked at in a case, and how many lie the wrong way round."""

    pairs: int = 0
    reversed: int = 0

    @property
    def suspicious(self) -> bool:
        """Whether most pairs lie the wrong way round."""
        return 2 * self.reversed > self.pairs


@dataclass(frozen=True)
class CaseOrientation:
    """What a case says about left and right.

    Attributes:
        reference: Pairs in its label map.
        prediction: Pairs in its prediction.
        dice: Mean Dice of the sided structures that the label map has; None where it has none.
        swapped_dice: The same with left and right of the prediction swapped.
    """

    reference: Sides = Sides()
    prediction: Sides = Sides()
    dice: float | None = None
    swapped_dice: float | None = None

    @property
    def better_swapped(self) -> bool:
        """Whether swapping left and right of the prediction would score much better."""
        if self.dice is None or self.swapped_dice is None:
            return False
        return self.swapped_dice > self.dice + _MUCH_BETTER


def sided_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that mean the left and the right one of the same structure."""
    by_canonical = {canonical_name(name): name for name in names}
    return [
        (name, by_canonical[other])
        for canonical, name in by_canonical.items()
        if canonical.endswith("_left") and (other := canonical.removesuffix("left") + "right") in by_canonical
    ]


def count_reversed(
    volume: LabelVolume, boxes: Sequence[tuple[slice, ...] | None], pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Sides:
    """Count the pairs whose left structure lies to the patient's right of its partner, by their centres of mass.

    Args:
        volume: A label map.
        boxes: Bounding box of each label value from 1, as ``scipy.ndimage.find_objects`` gives them.
        pairs: Label values of the left and of the right structure; pairs that are not whole are passed over.
    """
    n = n_reversed = 0
    for left, right in pairs:
        centres = [_leftward(volume, boxes, values) for values in (left, right)]
        if centres[0] is not None and centres[1] is not None:
            n += 1
            n_reversed += centres[0] < centres[1]
    return Sides(n, n_reversed)


def _leftward(volume: LabelVolume, boxes: Sequence[tuple[slice, ...] | None], values: Sequence[int]) -> float | None:
    """How far to the patient's left the centre of mass of some label values lies, in mm."""
    total, n = np.zeros(3), 0
    for value in values:
        box = boxes[value - 1] if 1 <= value <= len(boxes) else None
        if box is not None:
            inside = volume.labels[box] == value
            n += int(inside.sum())
            for axis, side in enumerate(box):
                profile = inside.sum(axis=tuple(other for other in range(3) if other != axis))
                total[axis] += profile @ np.arange(side.start, side.stop)
    if n == 0:
        return None
    z, y, x = total / n
    return float((volume.affine @ [x, y, z, 1.0])[0])


def orientation_warnings(cases: Mapping[str, CaseOrientation]) -> list[str]:
    """What the cases of a dataset say about left and right, for people; nothing where all is well.

    Args:
        cases: What each case says, by its name.
    """
    warnings = []
    wrong = [name for name, case in cases.items() if case.reference.suspicious]
    n = sum(case.reference.pairs > 0 for case in cases.values())
    if wrong:
        warnings.append(
            f"left and right are swapped in the label maps of {len(wrong)} of {n} cases: by the image's own axes, what "
            f"is labelled left lies to the patient's right ({_shortened(wrong)}). Their names are swapped, or the "
            "image's direction is wrong."
        )
    wrong = [name for name, case in cases.items() if case.prediction.suspicious]
    n = sum(case.prediction.pairs > 0 for case in cases.values())
    if 2 * len(wrong) > n:
        warnings.append(
            f"left and right are swapped in the predictions of {len(wrong)} of {n} cases: by the image's own axes, "
            f"what is predicted as left lies to the patient's right ({_shortened(wrong)}). The model was trained on "
            "images with another orientation, or the image's direction is wrong."
        )
    wrong = [name for name, case in cases.items() if case.better_swapped]
    n = sum(case.dice is not None for case in cases.values())
    if 2 * len(wrong) > n:
        dice, swapped = (
            float(np.mean([value for case in cases.values() if (value := getattr(case, key)) is not None]))
            for key in ("dice", "swapped_dice")
        )
        warnings.append(
            f"with left and right of the predictions swapped, sided structures would score a Dice of {swapped:.3f} "
            f"instead of {dice:.3f}; {len(wrong)} of {n} cases would score much better ({_shortened(wrong)})."
        )
    return warnings


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
