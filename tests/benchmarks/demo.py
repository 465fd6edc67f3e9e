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

from stunet.datasets import phantom_labels
from stunet.reports import mean_dice, read_dice


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        peak = run(f"{sys.executable} -m stunet demo -o {folder}/demo", dict(os.environ))
        seconds = time.monotonic() - started
        demo = Path(folder) / "demo"
        dice = {
            name: read_dice(demo / f"predictions_{name}" / "summary.json", phantom_labels("MR"))
            for name in ("finetuned", "scratch")
        }
        ranking = json.loads((demo / "ranking" / "ranking.json").read_text())
    result = {
        "benchmark": "demo",
        "mean_dice": {name: round(mean_dice(rows), 4) for name, rows in dice.items()},
        "dice": {name: {row.name: round(row.mean, 4) for row in rows} for name, rows in dice.items()},
        "unseen_cases": dice["finetuned"][0].n_cases,
        "ccfv": {c["name"]: round(c["scores"]["ccfv"], 3) for c in ranking["candidates"]},
        "seconds": round(seconds),
        "peak_memory_gb": round(peak / 2**30, 2),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
