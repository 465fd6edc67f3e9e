"""W2 between cases by factors of their samples, beside square roots of covariances: one JSON line.

Straightforward code takes the covariance of each sample and ``scipy.linalg.sqrtm`` of their product for each pair. Ours
takes all pairs of 20 cases at once, factors included, divided by their number. The two take turns; the ratio is the
median over turns with the lowest and the highest, on the clock and of all threads. By hand, under a minute.

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

from stunet.transferability import gaussian_factor, pairwise_wasserstein2

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
    turns: list[dict[str, tuple[float, float]]] = []
    difference = 0.0
    for turn in range(args.repeats + 1):
        pairs = [tuple(rng.choice(args.cases, 2, replace=False).tolist()) for _ in range(args.pairs)]
        start = time.perf_counter(), time.process_time()
        straightforward = [by_square_root(samples[i], samples[j]) for i, j in pairs]
        middle = time.perf_counter(), time.process_time()
        distances = pairwise_wasserstein2([gaussian_factor(sample) for sample in samples])
        end = time.perf_counter(), time.process_time()
        difference = max(difference, *(abs(distances[p] / w - 1) for p, w in zip(pairs, straightforward, strict=True)))
        if turn > 0:  # the first warms up
            turns.append(
                {
                    "sqrtm": tuple((b - a) / args.pairs for a, b in zip(start, middle, strict=True)),  # type: ignore[dict-item]
                    "ours": tuple((b - a) / n_pairs for a, b in zip(middle, end, strict=True)),  # type: ignore[dict-item]
                }
            )
    result = {
        "benchmark": "wasserstein",
        "cases": args.cases,
        "points": args.points,
        "channels": args.channels,
        "ms_a_pair": {
            name: round(1e3 * statistics.median(turn[name][0] for turn in turns), 3) for name in ("sqrtm", "ours")
        },
        "times_faster": ratios([turn["sqrtm"][0] / turn["ours"][0] for turn in turns]),
        "times_less_cpu": ratios([turn["sqrtm"][1] / turn["ours"][1] for turn in turns]),
        "largest_relative_difference": float(f"{difference:.1e}"),
        "repeats": args.repeats,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("stunet", "numpy", "scipy")},
    }
    print(json.dumps(result))


def by_square_root(x: Array, y: Array) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    fidelity = np.trace(np.real(scipy.linalg.sqrtm(a @ b)))
    return float(np.sqrt(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * fidelity))


def ratios(values: list[float]) -> dict[str, float]:
    named = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, 1) for name, value in named.items()}


if __name__ == "__main__":
    main()
