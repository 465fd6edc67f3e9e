"""How long a whole ranking takes: four checkpoints of the small size on 20 real cases, by ``stunet rank``. By hand.

The checkpoints have random weights, which take as long to read as any. Hippocampus data (Medical Segmentation
Decathlon, task 04), all metrics; once from nothing and once with all results kept. One JSON line.

    python tests/benchmarks/ranking.py
"""

from __future__ import annotations

import json
import os
import shutil
import time
from importlib.metadata import version
from typing import Any

import torch
from experiment import Experiment, make_parser

from stunet.network import build_stunet

DATA = "Dataset004_Hippocampus"
METRICS = "ccfv,logme,transrate,leep,gbc,gbc-full"


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        if not (self.raw / DATA).exists():
            shutil.copytree(self.args.data, self.raw / DATA)
            self.run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 2 -np 2")
        paths = []
        for seed in range(4):
            torch.manual_seed(seed)
            paths.append(self.root / f"random_{seed}.pth")
            network = build_stunet(self.args.size, 1, 105, [1, 2, 2, 2, 2, 2])
            torch.save({"network_weights": network.state_dict()}, paths[-1])
        output = self.root / "ranking"
        shutil.rmtree(output, ignore_errors=True)
        line = f"stunet rank -d 4 --checkpoints {' '.join(map(str, paths))} --metrics {METRICS} -o {output}"
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            self.run(line)
            seconds.append(time.monotonic() - started)
        ranking = json.loads((output / "ranking.json").read_text())
        return {
            "benchmark": "ranking",
            "candidates": len(ranking["candidates"]),
            "size": self.args.size,
            "cases": len(ranking["target"]["cases"]),
            "seconds": round(seconds[0], 1),
            "seconds_with_kept_results": round(seconds[1], 1),
            "cores": len(os.sched_getaffinity(0)),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }


if __name__ == "__main__":
    parser = make_parser(__doc__, DATA)
    parser.add_argument("--size", default="small")
    Benchmark.print_result(parser)
