"""Figures of segmentations and of scores, and pages that hold all they show: nothing in them is from elsewhere."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from stunet.evaluation import METRICS, EvaluationResults
from stunet.files import atomic_path

Array = npt.NDArray[Any]

_TITLES = {"Dice": "Dice", "NSD": "normalised surface Dice", "HD95": "95th percentile Hausdorff distance (mm)"}
_ROW = 0.26  # inches
_MOST_CASES_FOR_OPAQUE_DOTS = 20


@contextmanager
def drawing() -> Iterator[None]:
    """Draw within, or decorate what draws: a ``$`` in a name is a dollar, and a failure costs the picture alone."""
    try:
        with mpl.rc_context({"text.parse_math": False}):
            yield
    except Exception as error:  # whatever it is, the results beside the picture are whole
        warnings.warn(f"no picture: {type(error).__name__}: {str(error)[:200]}", stacklevel=4)  # above contextlib


@drawing()
def side_by_side(
    cases: Sequence[tuple[str, Array, Mapping[str, Array]]],
    labels: Mapping[str, int],
    path: str | os.PathLike[str],
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    plane_name: str = "",
) -> None:
    """Draw each case's image and label maps beside each other, in the plane that has most of the first label map.

    Args:
        cases: Name, image, and label maps by title, the truth first; arrays of one shape ``(Z, Y, X)``.
        labels: Label value of each structure, background (0) included or not.
        path: PNG to write, atomically.
        spacing: mm along ``(z, y, x)``, for the proportions of the picture.
        plane_name: What the plane is: axial, coronal or sagittal.
    """
    n_columns = 1 + len(cases[0][2])
    figure = Figure(figsize=(3.3 * n_columns, 3.0 * len(cases) + 0.6), layout="constrained")
    axes = figure.subplots(len(cases), n_columns, squeeze=False)
    colours = {value: colormaps["tab10"]((value - 1) % 10) for value in labels.values() if value > 0}
    aspect = spacing[1] / spacing[2]
    for row, (name, image, maps) in zip(axes, cases, strict=True):
        truth = next(iter(maps.values())) > 0
        plane = int(np.argmax(truth.sum(axis=(1, 2))))
        # The contrast is that of the structures: air is far away in CT, and most of the image.
        low, high = np.percentile(image[truth] if truth.any() else image, [1, 99]).astype(np.float64)
        low -= (high - low) / 2
        for axis, (title, overlay) in zip(row, [("image", None), *maps.items()], strict=True):
            axis.imshow(image[plane].astype(np.float64), cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if overlay is not None:
                shown = np.ma.masked_where(~np.isin(overlay[plane], list(colours)), (overlay[plane] - 1) % 10)
                axis.imshow(shown, cmap="tab10", vmin=-0.5, vmax=9.5, alpha=0.6, aspect=aspect, interpolation="nearest")
            axis.set_title(f"{name}: {title}{f', {plane_name}' if plane_name else ''}", fontsize=9)
            axis.set_axis_off()
    handles = [Patch(color=colours[value], label=name) for name, value in labels.items() if value > 0]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@drawing()
def draw_scores(results: EvaluationResults, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw the scores of each structure: a dot for each case, and a bar at the mean.

    Args:
        results: The scores. Structures that no case has are drawn as empty rows; infinite distances are counted beside
            their row, since they have no place on the axis.
        path: PNG to write, atomically.
        title: Title of the figure.
    """
    n = len(results.structures)
    figure = Figure(figsize=(11, _ROW * n + 1.3), layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, METRICS, strict=True):
        _draw_metric(panel, results, metric)
    panels[0].set_yticks(range(n), [structure.comparison.name for structure in results.structures])
    panels[0].set_ylim(n - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_metric(panel: Axes, results: EvaluationResults, metric: str) -> None:
    alpha = 0.8 if len(results.cases) <= _MOST_CASES_FOR_OPAQUE_DOTS else 0.3
    for row, (structure, values) in enumerate(zip(results.structures, results.values(metric).values(), strict=True)):
        # Spread over the row's height, in the order of cases, so that equal scores do not hide each other.
        heights = row + np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [float(row)] * len(values)
        panel.scatter(values, heights, s=9, color="tab:blue", alpha=alpha, linewidths=0, zorder=2)
        if (mean := structure.mean[metric]) is not None:
            panel.plot([mean, mean], [row - 0.38, row + 0.38], color="tab:red", linewidth=1.6, zorder=3)
        if metric == "HD95" and structure.infinite:
            text, beside = f"{structure.infinite} infinite", panel.get_yaxis_transform()
            panel.text(0.99, row, text, transform=beside, ha="right", va="center", fontsize=7, color="dimgray")
    panel.set_title(_TITLES[metric], fontsize=9)
    panel.set_xlim(*((0, None) if metric == "HD95" else (-0.02, 1.02)))
    panel.grid(visible=True, axis="x", linewidth=0.4)
    panel.tick_params(labelsize=8)


def draw_curves(
    curves: Mapping[str, Sequence[float]], x: str, y: str, styles: Iterable[Mapping[str, Any]], start: int = 0
) -> Figure:
    """Draw a line for each sequence, by name, over whole numbers from ``start`` on, each in a style of its own."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(start, start + len(values)), values, marker="o", label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_page(template: str, path: str | os.PathLike[str], **content: Any) -> None:
    """Fill a template with all that it names, escaped, and write the page, atomically."""
    environment = Environment(loader=PackageLoader("stunet.reports"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(template).render(**content)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def inline_svg(figure: Figure) -> Markup:
    """Return a figure as ``<svg>``, letters as shapes to look the same everywhere; equal figures give equal text."""
    buffer = io.StringIO()
    # A fixed salt: matplotlib names the shapes by a random number otherwise.
    with mpl.rc_context({"svg.hashsalt": "stunet", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # noqa: S704 - matplotlib escapes the text in its figures


def inline_png(path: str | os.PathLike[str], alternative: str) -> Markup:
    """Return a picture as ``<img>`` that holds its data."""
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alternative, data)
