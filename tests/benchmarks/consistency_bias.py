"""What the width of features does to class consistency where the true distances are equal: one JSON line.

Targets of 10 cases are drawn from Gaussians whose covariance has a 1/k spectrum of total variance 1, in 64 to 1536
dimensions. Either the cases' means differ (`mean`), at equal distances, or half of the cases have another covariance of
the same axes (`scale`) or of rotated ones (`rotate`), or both differ (`mixed`). True distances are the same at all
widths.
For each value of ``debias``: the estimate divided by the truth, which is the root mean square W2 for ways that
work on squares and the mean W2 for the others, at each width (geometric mean over repeats); the highest of these over
the lowest, which is what a ranking would mistake for a difference; and the standard deviation of the log over repeats.
By hand, about five minutes on one core.

    python tests/benchmarks/consistency_bias.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from stunet.ranking import CaseFeatures
from stunet.ranking.ccfv import PairDistances, class_distances, mean_distance, random_projection

Array = NDArray[np.float64]
KINDS = ("mean", "scale", "rotate", "mixed")
N_CASES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="of the class in each case")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 1536])
    parser.add_argument("--distances", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be 2 or more, for the standard deviation")
    rows = []
    for kind in KINDS:
        for distance in args.distances:
            row = measure(kind, distance, args)
            if row:
                rows.append({"kind": kind, "distance": distance, "ways": row})
    worst = {
        way: {
            "highest_by_lowest_width": max(row["ways"][way]["highest_by_lowest"] for row in rows),
            "lowest_ratio": min(min(row["ways"][way]["ratio"]) for row in rows),
            "highest_ratio": max(max(row["ways"][way]["ratio"]) for row in rows),
        }
        for way in rows[0]["ways"]
    }
    result = {
        "benchmark": "consistency_bias",
        "points": args.points,
        "cases": N_CASES,
        "widths": args.widths,
        "repeats": args.repeats,
        "worst": worst,
        "rows": rows,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("stunet", "numpy")},
    }
    print(json.dumps(result))


def measure(kind: str, distance: float, args: argparse.Namespace) -> dict[str, dict[str, object]]:
    logs: dict[str, list[list[float]]] = {}
    for width in args.widths:
        found: dict[str, list[float]] = {}
        for repeat in range(args.repeats):
            # The same seed for all kinds and distances, another for each width and repeat.
            made = make_target(kind, distance, width, args.points, np.random.default_rng([repeat, width]))
            if made is None:
                return {}
            cases, truth = made
            for way, ratio in estimates(cases, truth).items():
                found.setdefault(way, []).append(math.log(ratio))
        for way, values in found.items():
            logs.setdefault(way, []).append(values)
    report = {}
    for way, by_width in logs.items():
        means = np.array([np.mean(values) for values in by_width])
        report[way] = {
            "ratio": np.exp(means).round(3).tolist(),
            "highest_by_lowest": round(float(np.exp(np.ptp(means))), 3),
            "sd": round(float(np.sqrt(np.mean([np.var(values, ddof=1) for values in by_width]))), 3),
        }
    return report


def estimates(cases: list[CaseFeatures], truth: Array) -> dict[str, float]:
    """Each way's consistency by the true one; `truth` has the true distances of all pairs, zeros on the diagonal."""
    pairs = len(cases) * (len(cases) - 1)
    mean, square = truth.sum() / pairs, np.square(truth).sum() / pairs
    every = np.ones((1, len(cases)))

    def distances(debias: str, projection: Array | None = None) -> PairDistances:
        return class_distances(
            cases, range(len(cases)), label=1, scale=0, normalise=False, debias=debias, projection=projection
        )  # type: ignore[arg-type]

    null, raw = distances("null"), distances("none")
    width = cases[0].scales[0].shape[1]
    return {
        "none": float(mean_distance(raw, every)[0] / mean),
        "null": float(mean_distance(null, every)[0] / math.sqrt(square)),
        "project 32": float(mean_distance(distances("project", random_projection(width, 32)), every)[0] / mean),
    }


def make_target(
    kind: str, distance: float, width: int, points: int, rng: np.random.Generator
) -> tuple[list[CaseFeatures], Array] | None:
    """Cases of one class, and their true distances; None where no rotation is that far."""
    share = {"mean": 1.0, "mixed": 0.5}.get(kind, 0.0)
    axes, _ = np.linalg.qr(rng.standard_normal((width, N_CASES)))
    means = math.sqrt(share / 2) * distance * axes.T
    other = other_group("scale" if kind == "mixed" else kind, distance * math.sqrt(1 - share), width)
    if other is None:
        return None
    spectrum = one_over_k(width)
    cases = []
    for i in range(N_CASES):
        normal = rng.standard_normal((points, width))
        rows = (other(normal) if i % 2 else normal * np.sqrt(spectrum)) + means[i]
        cases.append(
            CaseFeatures(case=f"case{i}", labels=np.ones(points, int), scales=(rows.astype(np.float32),),
                         variety=(rows.astype(np.float32),))
        )  # fmt: skip
    group = np.arange(N_CASES) % 2
    truth = (group[:, None] != group) * (1 - share) * distance**2 + (1 - np.eye(N_CASES)) * share * distance**2
    return cases, np.sqrt(truth)


def other_group(kind: str, distance: float, width: int) -> Callable[[Array], Array] | None:
    """Turns standard normal rows to those of a Gaussian at this distance from the first group's."""
    spectrum = one_over_k(width)
    if kind == "mean":
        return lambda normal: normal * np.sqrt(spectrum)
    if kind == "scale":
        signs = np.where(np.arange(width) % 2, -1, 1)

        def scaled(factor: float) -> Array:
            return np.sqrt(spectrum * np.exp(signs * factor))

        factor = brentq(lambda t: np.linalg.norm(scaled(t) - np.sqrt(spectrum)) - distance, 0, 8)
        return lambda normal: normal * scaled(factor)
    first, second = spectrum[: width // 2], spectrum[width // 2 :]

    def rotated_by(angle: float) -> float:
        # tr sqrt(S1 S2) of 2x2 blocks, by sqrt(tr S1 S2 + 2 sqrt(det S1 det S2))
        c, s = math.cos(angle) ** 2, math.sin(angle) ** 2
        products = first * (first * c + second * s) + second * (first * s + second * c)
        return math.sqrt(max(2 - 2 * float(np.sqrt(products + 2 * first * second).sum()), 0))

    if rotated_by(math.pi / 2) < distance:
        return None
    angle = brentq(lambda t: rotated_by(t) - distance, 0, math.pi / 2)
    c, s = math.cos(angle), math.sin(angle)

    def rotate(normal: Array) -> Array:
        a, b = np.split(normal * np.sqrt(spectrum), 2, axis=1)
        return np.concatenate([c * a - s * b, s * a + c * b], axis=1)

    return rotate


def one_over_k(width: int) -> Array:
    values = 1 / np.arange(1, width + 1)
    return np.asarray(values / values.sum())


if __name__ == "__main__":
    main()
