"""Figures of segmentations and of scores, and pages that hold all they show: nothing in them is from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from stunet.evaluation import METRICS, EvaluationResults
from stunet.files import atomic_path, write_json
from stunet.labels.labels import Labels

if TYPE_CHECKING:
    from stunet.ranking import CandidateScores, Ranking

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


#: Differences of mean Dice below this are called none.
_CLEAR = 0.05
#: A structure with a lower mean Dice was not learned.
_LEARNED = 0.1


@dataclass(frozen=True)
class StructureDice:
    """Mean, lowest and highest Dice of a structure over the ``n_cases`` that have a score; NaN where none has."""

    name: str
    mean: float
    lowest: float
    highest: float
    n_cases: int


def read_dice(summary: str | os.PathLike[str], labels: Mapping[str, Any]) -> list[StructureDice]:
    """Read the Dice of each structure.

    Args:
        summary: nnU-Net's ``summary.json``.
        labels: ``labels`` of ``dataset.json``: a value, or a list of values for a region, by name.

    Returns:
        One row for each structure, in the order of the labels, without background and ignore label.
    """
    cases = json.loads(Path(summary).read_text(encoding="utf-8"))["metric_per_case"]
    rows = []
    described = Labels({"labels": labels})
    for name in described.structures:
        values = described.values[name]
        keys = [str(values), str(values[0])]  # a region of one value counts as a region only where others have several
        found = [case["metrics"][key]["Dice"] for case in cases for key in keys if key in case["metrics"]]
        scores = [score for score in found if score is not None and not math.isnan(score)]
        mean = sum(scores) / len(scores) if scores else math.nan
        lowest, highest = min(scores, default=math.nan), max(scores, default=math.nan)
        rows.append(StructureDice(name, mean, lowest, highest, len(scores)))
    return rows


def mean_dice(rows: Sequence[StructureDice]) -> float:
    """Return the mean over the structures that have a score, NaN where none has."""
    means = [row.mean for row in rows if not math.isnan(row.mean)]
    return sum(means) / len(means) if means else math.nan


def conclude(dice: Mapping[str, Sequence[StructureDice]], *, n_cases: int, iterations: int) -> str:
    """Say what the scores ``from scratch`` and ``fine-tuned`` on unseen cases say, whichever way they fall."""
    scratch, tuned = mean_dice(dice["from scratch"]), mean_dice(dice["fine-tuned"])
    gain = tuned - scratch
    verdict = "Pre-training helped" if gain >= _CLEAR else "Pre-training made no clear difference here"
    if gain <= -_CLEAR:
        verdict = "Pre-training did harm here"
    lost = [f"{row.name} ({name})" for name, rows in dice.items() for row in rows if not row.mean >= _LEARNED]
    return (
        f"{verdict}: with {n_cases} labelled cases and {iterations} iterations, the fine-tuned network reaches a mean "
        f"Dice of {tuned:.2f} on unseen cases, and the same network trained from scratch {scratch:.2f}"
        + (f"; not learned: {', '.join(lost)}." if lost else ".")
    )


def draw_story(
    ranking: Mapping[str, Any], pretraining: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Draw Dice by epoch of the pre-training, scores, and Dice by epoch of each model on the target, with captions."""
    candidates, styles = ranking["candidates"], [{"color": "#0b6e8f"}, {"color": "#b7791f"}]
    names, logme = [c["name"] for c in candidates], [c["scores"]["logme"] for c in candidates]
    before = draw_curves({"pre-training": pretraining}, "epoch of pre-training", "mean Dice", styles, start=1)
    after = draw_curves(curves, "epoch on the target", "mean Dice", styles, start=1)
    for figure in (before, after):
        figure.axes[0].set_ylim(0, 1)
    figures = {
        "Mean Dice on validation patches during pre-training.": before,
        # Without intervals: those in ranking.json are of CC-FV.
        "Scores of the checkpoints.": score_bars(names, logme, [None] * len(names), "LogME, higher is better"),
        "Mean Dice on validation patches of the target, with the same budget.": after,
    }
    return [{"svg": inline_svg(figure), "caption": caption} for caption, figure in figures.items()]


_BEST, _OTHERS = "#0b6e8f", "#9fb3c1"


def write_ranking(ranking: Ranking, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``ranking.json``, ``ranking.csv`` and ``ranking.html``, each atomically, and return their paths.

    And, as the last one, ``study.yaml``, which measures the first few, where there is anything to compare.
    """
    from stunet.ranking.ranking import MEASURED

    paths = [Path(folder) / f"ranking.{ending}" for ending in ("json", "csv", "html")]
    write_json(ranking.as_dict(), paths[0])
    ranking.to_csv(paths[1])
    (study := Path(folder) / "study.yaml").unlink(missing_ok=True)
    if ranking.study is not None:
        with atomic_path(study) as temporary:
            temporary.write_text(yaml.safe_dump(ranking.study, sort_keys=False, allow_unicode=True), encoding="utf-8")
        paths.append(study)
    scored = [row for row in ranking.rows if row.ccfv]
    write_page(
        "ranking.html",
        paths[2],
        title=f"Which checkpoint for {ranking.about['dataset']}?",
        ranking=ranking,
        names=short_names([row.name for row in ranking.rows], 32),
        scored=scored,
        figures=_figures(ranking, scored) or [],
        mean_consistency=_mean_consistency,
        measured=MEASURED,
    )
    return paths


def _mean_consistency(row: CandidateScores, label: str) -> float:
    values: list[float] = [scale[label] for scale in row.ccfv["class_consistency"]]
    return sum(values) / len(values)


@drawing()
def _figures(ranking: Ranking, scored: Sequence[CandidateScores]) -> list[dict[str, Any]]:
    metric, figures = ranking.metric, []
    if shown := [(row, score) for row in ranking.rows if (score := row.scores.get(metric)) is not None]:
        intervals = [row.interval if metric == "ccfv" else None for row, _ in shown]
        bars = score_bars([row.name for row, _ in shown], [score for _, score in shown], intervals, metric)
        caption = "The score of each candidate, with its interval if it has one."
        figures.append({"svg": inline_svg(bars), "caption": caption})
    if scored:
        names = short_names([row.name for row in scored])
        curves = {name: row.ccfv["per_scale"] for name, row in zip(names, scored, strict=True)}
        styles: list[dict[str, Any]] = [
            {"color": _BEST, "linewidth": 2.5, "zorder": 3},
            *[{"linewidth": 1.2, "alpha": 0.8}] * len(curves),
        ]
        lines = draw_curves(curves, "scale, 0 is the finest", "log(variety / consistency)", styles)
        figures.append({"svg": inline_svg(lines), "caption": "CC-FV at each scale; the score is their mean."})
    return figures


def score_bars(
    names: Sequence[str], scores: Sequence[float], intervals: Sequence[tuple[float, float] | None], label: str
) -> Figure:
    """Draw a dot for the score of each checkpoint, best on top, with the lower and upper end of its interval."""
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    # CC-FV is a logarithm: 0 means nothing, so dots and not bars from 0 on.
    for place, (score, interval) in enumerate(zip(scores, intervals, strict=True)):
        colour = _BEST if place == 0 else _OTHERS
        if interval is not None:
            axes.plot(interval, (place, place), color=colour, linewidth=5, alpha=0.45, solid_capstyle="round")
        axes.plot(score, place, "o", color=colour, markersize=8)
    axes.set_yticks(list(range(len(names))), short_names(names))
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def short_names(names: Sequence[str], most: int = 40) -> list[str]:
    """Shorten names to ``most`` characters that still differ: ends of long ones, else beginnings with a number.

    >>> short_names(["a", "models/liver/checkpoint_final", "models/heart/checkpoint_final"], 12)
    ['a', '…liver/final', '…heart/final']
    """
    short = [name if len(name) <= most else name.replace("checkpoint_", "") for name in names]
    short = [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]
    if len(set(short)) == len(short):
        return short
    return [f"{n} {name}"[: most - 1] + "…" if len(name) > most else name for n, name in enumerate(names, start=1)]
