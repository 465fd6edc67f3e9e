"""Figures of segmentations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stunet.files import atomic_path

__all__ = ["drawing", "side_by_side"]

Array = npt.NDArray[Any]
Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")


def drawing(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn | None]:
    """Decorate what draws or saves a figure: a ``$`` in a name is a dollar, and a failure costs the picture alone."""

    @wraps(draw)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn | None:
        try:
            with mpl.rc_context({"text.parse_math": False}):
                return draw(*args, **kwargs)
        except Exception as error:  # whatever it is, the results beside the picture are whole
            warnings.warn(f"no picture: {type(error).__name__}: {str(error)[:200]}", stacklevel=2)
            return None

    return call


@drawing
def side_by_side(
    cases: Sequence[tuple[str, Array, Array, Array]],
    labels: Mapping[str, int],
    path: str | os.PathLike[str],
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Draw image, truth and prediction of each case beside each other, in the plane with most structure in it.

    Args:
        cases: Name, image, truth and prediction; arrays of one shape ``(Z, Y, X)``.
        labels: Label value of each structure, background (0) included or not.
        path: PNG to write, whole or not at all.
        spacing: mm along ``(z, y, x)``, for the proportions of the picture.
    """
    figure = Figure(figsize=(10, 3.3 * len(cases) + 0.6), layout="constrained")
    axes = figure.subplots(len(cases), 3, squeeze=False)
    colours = {value: colormaps["tab10"]((value - 1) % 10) for value in labels.values() if value > 0}
    for row, (name, image, truth, prediction) in zip(axes, cases, strict=True):
        plane = int(np.argmax((truth > 0).sum(axis=(1, 2))))
        low, high = np.percentile(image.astype(np.float64), [1, 99.5])
        for axis, title, overlay in zip(row, ("image", "truth", "prediction"), (None, truth, prediction), strict=True):
            aspect = spacing[1] / spacing[2]
            axis.imshow(image[plane].astype(np.float64), cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if overlay is not None:
                axis.imshow(_colour(overlay[plane], colours), aspect=aspect, interpolation="nearest")
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.set_axis_off()
    handles = [Patch(color=colours[value], label=name) for name, value in labels.items() if value > 0]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    FigureCanvasAgg(figure)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _colour(labels: Array, colours: Mapping[int, tuple[float, ...]]) -> npt.NDArray[np.float64]:
    rgba = np.zeros((*labels.shape, 4))
    for value, colour in colours.items():
        rgba[labels == value] = (*colour[:3], 0.6)
    return rgba
