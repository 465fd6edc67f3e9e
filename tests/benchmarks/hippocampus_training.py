"""How good a small STU-Net gets on real data in a quarter of an hour on two CPU cores.

Trains the small size on fold 0 of the hippocampus data (Medical Segmentation Decathlon, task 04) with the commands that
a user types and prints one JSON line: mean validation Dice, time and peak memory. By hand: it takes about 11 minutes.

    python tests/benchmarks/hippocampus_training.py
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from typing import Any

from experiment import Experiment, make_parser

DATASET = "Dataset004_Hippocampus"
ITERATIONS_PER_EPOCH = 20


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        args = self.args
        shutil.copytree(args.data, self.raw / DATASET, dirs_exist_ok=True)
        settings = (
            f"num_epochs={args.epochs} num_iterations_per_epoch={ITERATIONS_PER_EPOCH} num_val_iterations_per_epoch=2 "
            f"batch_size={args.batch_size}"
        )
        self.run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 2 -np 2")
        self.run(f"stunet plan -d 4 --size small -c 3d_fullres --set {settings}")
        started = time.monotonic()
        train = f"nnUNetv2_train 4 3d_fullres {args.fold} -tr STUNetTrainer_small -p STUNetPlans_small -device cpu"
        peak = self.run(train)
        seconds = time.monotonic() - started
        model = self.results / DATASET / "STUNetTrainer_small__STUNetPlans_small__3d_fullres"
        summary = json.loads((model / f"fold_{args.fold}" / "validation" / "summary.json").read_text())
        return {
            "benchmark": "hippocampus_training",
            "mean_validation_dice": round(summary["foreground_mean"]["Dice"], 4),
            "dice": {label: round(scores["Dice"], 4) for label, scores in summary["mean"].items()},
            "validation_cases": len(summary["metric_per_case"]),
            "iterations": args.epochs * ITERATIONS_PER_EPOCH,
            "batch_size": args.batch_size,
            "seconds_training_and_validation": round(seconds),
            "peak_memory_gb": round(peak / 2**30, 2),
            "cores": os.cpu_count(),
            "machine": f"{platform.machine()} {platform.system()}",
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }


if __name__ == "__main__":
    parser = make_parser(__doc__, DATASET)
    parser.add_argument("--epochs", type=int, default=25, help=f"epochs of {ITERATIONS_PER_EPOCH} iterations")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--fold", type=int, default=0)
    Benchmark.print_result(parser)
