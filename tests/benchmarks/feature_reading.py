"""What reading features at points costs beside upsampling whole maps: time and memory as ratios, in one JSON line.

The maps are random, with the channels and strides of the five decoder stages of a STU-Net, for one window. The
straightforward way upsamples each map to the window's size, takes the points and lets the upsampled map go before the
next; ours reads the points from the maps as they are. Both take turns; time is given as the median of the ratios of
turns that follow each other, with the lowest and the highest, and memory likewise, as the highest resident set above
that before (on Linux), what is read included. Running the network is no part of it. By hand: at the sizes below it
takes about a minute and 5 GB.

    python tests/benchmarks/feature_reading.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from processes import peak_resident, spread
from torch import Tensor
from torch.nn.functional import interpolate

from stunet.network import find_size
from stunet.ranking.points import read_points

Read = Callable[[], list[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 144, 112])
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    channels = find_size(args.size).features[:-1]
    maps = make_maps(channels, args.patch)
    generator = np.random.default_rng(0)
    points = np.stack([generator.integers(0, n, args.points) for n in args.patch], axis=1)
    index = torch.from_numpy(points).unbind(1)

    def ours() -> list[Tensor]:
        return [read_points(one, points, args.patch) for one in maps]

    def dense() -> list[Tensor]:
        return [upsampled(one, args.patch)[(slice(None), *index)].T for one in maps]

    with torch.inference_mode():
        difference = max(float((a - b).abs().max()) for a, b in zip(ours(), dense(), strict=True))  # warms up, too
        seconds: dict[str, list[float]] = {"ours": [], "dense": []}
        peaks: dict[str, list[float]] = {"ours": [], "dense": []}
        for _ in range(args.repeats):
            for name, read in (("ours", ours), ("dense", dense)):
                seconds[name].append(time_once(read))
                peaks[name].append(peak_resident(read))
    result = {
        "benchmark": "feature_reading",
        "patch": args.patch,
        "channels": channels,
        "points": args.points,
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "extra_memory_mb": {name: round(statistics.median(values) / 2**20, 1) for name, values in peaks.items()},
        "times_faster": spread(seconds["dense"], seconds["ours"]),
        "times_less_memory": spread(peaks["dense"], peaks["ours"]),
        "largest_difference": difference,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("stunet", "torch")},
    }
    print(json.dumps(result))


def make_maps(channels: tuple[int, ...], patch: list[int]) -> list[Tensor]:
    """One map ``(C, X, Y, Z)`` for each decoder stage, finest first; each stage halves what the one before has."""
    torch.manual_seed(0)
    return [torch.randn(c, *(-(-n // 2**level) for n in patch)) for level, c in enumerate(channels)]


def upsampled(feature_map: Tensor, patch: list[int]) -> Tensor:
    return interpolate(feature_map[None], size=patch, mode="trilinear", align_corners=False)[0]


def time_once(read: Read) -> float:
    started = time.perf_counter()
    read()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
