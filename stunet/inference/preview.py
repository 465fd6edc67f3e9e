"""A picture of a prediction: three planes through the image, the labels over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stunet.inference.label_names import LabelNames, colour_of

__all__ = ["draw_preview"]

_TITLES = ("first axis", "second axis", "third axis")
_MAX_IN_LEGEND = 60


@mpl.rc_context({"text.parse_math": False})  # a $ in a name is a dollar
def draw_preview(
    image: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    names: LabelNames,
    spacing: Sequence[float],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw the planes along each axis that hold most labelled voxels.

    Args:
        image: ``(Z, Y, X)``.
        labels: ``(Z, Y, X)``.
        names: The structures; those with voxels are in the legend.
        spacing: mm between voxels along ``(Z, Y, X)``, for the proportions.
        path: PNG to write.
        title: Name of the case.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    step = max(1, image.size // 2**20)
    low, high = np.percentile(image.reshape(-1)[::step].astype(np.float64), [1, 99])
    seen: set[int] = set()
    for axis, plot in enumerate(axes):
        index = _fullest_plane(labels, axis)
        grey, plane = (np.take(volume, index, axis=axis) for volume in (image, labels))
        height, width = (float(s) for i, s in enumerate(spacing) if i != axis)
        seen.update(int(value) for value in np.unique(plane) if value)
        plot.imshow(grey, cmap="gray", vmin=low, vmax=high, aspect=height / width, origin="lower")
        plot.imshow(_colours(plane), aspect=height / width, origin="lower", interpolation="nearest")
        plot.set_title(f"{_TITLES[axis]}, plane {index}", fontsize=9)
        plot.set_axis_off()
    shown = [(name, values[0]) for name, values in names.structures.items() if seen & set(values)]
    handles = [Patch(color=colour_of(value), label=name) for name, value in shown[:_MAX_IN_LEGEND]]
    figure.suptitle(title)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110)


def _fullest_plane(labels: npt.NDArray[Any], axis: int) -> int:
    counts = [int(np.count_nonzero(np.take(labels, i, axis=axis))) for i in range(labels.shape[axis])]
    return int(np.argmax(counts)) if max(counts) else labels.shape[axis] // 2


def _colours(plane: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    values, where = np.unique(plane, return_inverse=True)
    table = np.array([(*colour_of(int(v)), 0.55) if v else (0, 0, 0, 0) for v in values])
    return table[where.reshape(plane.shape)]
