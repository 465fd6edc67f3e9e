"""W2 between cases by factors of their samples, beside square roots of covariances: one JSON line.

Straightforward code takes the covariances of each pair's samples and ``scipy.linalg.sqrtm``, either as the formula
``tr (S1^(1/2) S2 S1^(1/2))^(1/2)`` has it (`two_roots`), or of the product ``S1 S2``, whose root has the same trace
(`one_root`). Ours takes all pairs of 20 cases at once, factors included, divided by their number. They take turns. The
ratio is the median over turns with the lowest and the highest, on the clock and of all threads. By hand, under a
minute.

    python tests/benchmarks/wasserstein.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from stunet.ranking.ccfv import gaussian_factor, pairwise_wasserstein2

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=2, help="pairs in each turn of the straightforward code")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    spread = 1 / np.sqrt(np.arange(1, args.channels + 1))
    samples = [
        rng.standard_normal((args.points, args.channels)) * spread + 0.3 * rng.standard_normal(args.channels)
        for _ in range(args.cases)
    ]
    load = os.getloadavg()[0]
    n_pairs = args.cases * (args.cases - 1) // 2
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*STRAIGHTFORWARD, "ours")}
    difference = 0.0
    for turn in range(args.repeats + 1):
        pairs = [tuple(rng.choice(args.cases, 2, replace=False).tolist()) for _ in range(args.pairs)]
        taken = {}
        start = now()
        distances = pairwise_wasserstein2([gaussian_factor(sample) for sample in samples])
        taken["ours"] = (now() - start) / n_pairs
        for name, distance in STRAIGHTFORWARD.items():
            start = now()
            found = [distance(samples[i], samples[j]) for i, j in pairs]
            taken[name] = (now() - start) / args.pairs
            difference = max(difference, *(abs(distances[p] / w - 1) for p, w in zip(pairs, found, strict=True)))
        if turn > 0:  # the first warms up
            for name, (wall, cpu) in taken.items():
                seconds[name].append((wall, cpu))
    result = {
        "benchmark": "wasserstein",
        "cases": args.cases,
        "points": args.points,
        "channels": args.channels,
        "ms_a_pair": {name: round(1e3 * statistics.median(wall for wall, _ in s), 3) for name, s in seconds.items()},
        "times_faster": {name: ratios(seconds[name], seconds["ours"], 0) for name in STRAIGHTFORWARD},
        "times_less_cpu": {name: ratios(seconds[name], seconds["ours"], 1) for name in STRAIGHTFORWARD},
        "largest_relative_difference": float(f"{difference:.1e}"),
        "repeats": args.repeats,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("stunet", "numpy", "scipy")},
    }
    print(json.dumps(result))


def now() -> Array:
    return np.array([time.perf_counter(), time.process_time()])


def by_two_roots(x: Array, y: Array) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a)
    return w2(x, y, a, b, np.trace(np.real(scipy.linalg.sqrtm(root @ b @ root))))


def by_one_root(x: Array, y: Array) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    return w2(x, y, a, b, np.trace(np.real(scipy.linalg.sqrtm(a @ b))))


def w2(x: Array, y: Array, a: Array, b: Array, fidelity: float) -> float:
    return float(np.sqrt(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * fidelity))


STRAIGHTFORWARD = {"two_roots": by_two_roots, "one_root": by_one_root}


def ratios(slow: list[tuple[float, float]], fast: list[tuple[float, float]], clock: int) -> dict[str, float]:
    values = [a[clock] / b[clock] for a, b in zip(slow, fast, strict=True)]
    named = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, 1) for name, value in named.items()}


if __name__ == "__main__":
    main()
