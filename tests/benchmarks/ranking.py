"""How long a whole ranking takes: four checkpoints of the small size on 20 real cases, by ``stunet rank``. By hand.

The checkpoints have random weights, which take as long to read as any. Hippocampus data (Medical Segmentation
Decathlon, task 04), all metrics; once from nothing and once with all results kept. One JSON line.

    python tests/benchmarks/ranking.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from experiment import Experiment, add_data_arguments

from stunet.network import build_stunet

DATA = "Dataset004_Hippocampus"
METRICS = "ccfv,logme,transrate,leep,gbc,gbc-full"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, DATA)
    parser.add_argument("--size", default="small")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.work or Path(temporary)
        experiment = Experiment(root, jobs=1)
        if not (experiment.raw / DATA).exists():
            shutil.copytree(args.data, experiment.raw / DATA)
            experiment.run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 2 -np 2")
        paths = []
        for seed in range(4):
            torch.manual_seed(seed)
            paths.append(root / f"random_{seed}.pth")
            torch.save({"network_weights": build_stunet(args.size, 1, 105, [1, 2, 2, 2, 2, 2]).state_dict()}, paths[-1])
        line = f"stunet rank -d 4 --checkpoints {' '.join(map(str, paths))} --metrics {METRICS} -o {root / 'ranking'}"
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            experiment.run(line)
            seconds.append(time.monotonic() - started)
        ranking = json.loads((root / "ranking" / "ranking.json").read_text())
        print(
            json.dumps(
                {
                    "benchmark": "ranking",
                    "candidates": len(ranking["candidates"]),
                    "size": args.size,
                    "cases": len(ranking["target"]["cases"]),
                    "seconds": round(seconds[0], 1),
                    "seconds_with_kept_results": round(seconds[1], 1),
                    "cores": len(os.sched_getaffinity(0)),
                    "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
                }
            )
        )


if __name__ == "__main__":
    main()
