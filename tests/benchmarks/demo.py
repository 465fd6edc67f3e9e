"""Whether ``stunet demo`` shows what it says, seed by seed, and how long it takes: one JSON line. By hand.

    python tests/benchmarks/demo.py --seeds 0 1 2 3 4 5 6 7 8 9 --jobs 2

With ``--jobs 2`` two demos run at once, each on a core of its own where the system can bind them. ``--jobs 1`` is for
the time that one demo takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path
from threading import local
from typing import Any

from processes import run

from stunet.datasets.phantoms import phantom_labels
from stunet.reports.figures import mean_dice, read_dice

_place, _places = local(), count()


def measure(seed: int, jobs: int, folder: Path) -> dict[str, Any]:
    if jobs > 1 and not hasattr(_place, "cores"):
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        _place.cores = available[next(_places) % jobs :: jobs]
    bind = f"taskset -c {','.join(map(str, _place.cores))} " if jobs > 1 and _place.cores else ""
    demo = folder / f"seed_{seed}"
    started = time.monotonic()
    peak = run(f"{bind}{sys.executable} -m stunet demo --seed {seed} -o {demo}", dict(os.environ))
    seconds = time.monotonic() - started
    dice = {
        name: read_dice(demo / f"predictions_{name}" / "summary.json", phantom_labels("arterial"))
        for name in ("scratch", "finetuned")
    }
    ranking = json.loads((demo / "ranking" / "ranking.json").read_text())
    result = {
        "seed": seed,
        "mean_dice": {name: round(mean_dice(rows), 3) for name, rows in dice.items()},
        "dice": {name: {row.name: round(row.mean, 3) for row in rows} for name, rows in dice.items()},
        "first": ranking["candidates"][0]["name"],
        "seconds": round(seconds),
        "peak_memory_gb": round(peak / 2**30, 2),
    }
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda seed: measure(seed, args.jobs, Path(folder)), args.seeds))
    tuned = [run["mean_dice"]["finetuned"] for run in runs]
    gains = [run["mean_dice"]["finetuned"] - run["mean_dice"]["scratch"] for run in runs]
    result = {
        "benchmark": "demo",
        "lowest_fine_tuned": min(tuned),
        "smallest_gain": round(min(gains), 3),
        "lowest_structure_fine_tuned": min(value for run in runs for value in run["dice"]["finetuned"].values()),
        "runs": runs,
        "jobs": args.jobs,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
