"""Figures of a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

__all__ = ["scale_lines", "score_bars", "short_names"]

_BEST, _OTHERS = "#0b6e8f", "#9fb3c1"


def score_bars(
    names: Sequence[str], scores: Sequence[float], intervals: Sequence[tuple[float, float] | None], label: str
) -> Figure:
    """One bar for each candidate, best on top, with its interval.

    Args:
        names: Candidates, best first.
        scores: Their scores.
        intervals: Lower and upper end, or None.
        label: What the score is.
    """
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    # CC-FV is a logarithm: 0 means nothing, so dots and not bars from 0 on.
    for place, score, interval in zip(places, scores, intervals, strict=True):
        colour = _BEST if place == 0 else _OTHERS
        if interval is not None:
            axes.plot(interval, (place, place), color=colour, linewidth=5, alpha=0.45, solid_capstyle="round")
        axes.plot(score, place, "o", color=colour, markersize=8)
    axes.set_yticks(list(places), short_names(names), parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def scale_lines(per_scale: Mapping[str, Sequence[float]], label: str) -> Figure:
    """One line for each candidate over the decoder's scales, finest first.

    Args:
        per_scale: Values by candidate, best first.
        label: What the values are.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(zip(short_names(list(per_scale)), per_scale.values(), strict=True)):
        style = {"color": _BEST, "linewidth": 2.5, "zorder": 3} if place == 0 else {"linewidth": 1.2, "alpha": 0.8}
        axes.plot(range(len(values)), values, marker="o", label=name, **style)
    most = max(map(len, per_scale.values()))
    axes.set_xticks(range(most), ["finest", *map(str, range(1, most))] if most else [])
    axes.set_xlabel("scale of the decoder")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)).get_texts():
        text.set_parse_math(False)
    return figure


def short_names(names: Sequence[str], most: int = 40) -> list[str]:
    """Names of at most ``most`` characters that still differ: ends of long ones, else beginnings with a number.

    >>> short_names(["a", "models/liver/checkpoint_final", "models/heart/checkpoint_final"], 12)
    ['a', '…liver/final', '…heart/final']
    """
    short = [name if len(name) <= most else name.replace("checkpoint_", "") for name in names]
    short = [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]
    if len(set(short)) == len(short):
        return short
    return [f"{n} {name}"[: most - 1] + "…" if len(name) > most else name for n, name in enumerate(names, start=1)]
