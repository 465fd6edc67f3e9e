"""How long ``stunet demo`` takes and how good its network gets: one JSON line. By hand.

python tests/benchmarks/demo.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from processes import run

from stunet.datasets import PHANTOM_LABELS
from stunet.reports import read_dice


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        peak = run(f"{sys.executable} -m stunet demo -o {folder}/demo", dict(os.environ))
        seconds = time.monotonic() - started
        rows = read_dice(Path(folder) / "demo" / "predictions" / "summary.json", PHANTOM_LABELS)
    result = {
        "benchmark": "demo",
        "mean_dice": round(sum(row.mean for row in rows) / len(rows), 4),
        "dice": {row.name: round(row.mean, 4) for row in rows},
        "unseen_cases": rows[0].n_cases,
        "seconds": round(seconds),
        "peak_memory_gb": round(peak / 2**30, 2),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
