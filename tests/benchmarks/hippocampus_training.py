"""How good a small STU-Net gets on real data in a quarter of an hour on two CPU cores.

Trains the small size on fold 0 of the hippocampus data (Medical Segmentation Decathlon, task 04) with the commands that
a user types and prints one JSON line: mean validation Dice, time and peak memory. By hand: it takes about 11 minutes.

    python tests/benchmarks/hippocampus_training.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from processes import run

ROOT = Path(__file__).resolve().parents[2]
DATASET = "Dataset004_Hippocampus"
ITERATIONS_PER_EPOCH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("STUNET_SHARED", ROOT.parent / "shared")) / "data"
    )
    parser.add_argument("--epochs", type=int, default=25, help=f"epochs of {ITERATIONS_PER_EPOCH} iterations")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--fold", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), args)))


def measure(root: Path, args: argparse.Namespace) -> dict[str, object]:
    environment = make_environment(root)
    shutil.copytree(args.data / DATASET, root / "nnUNet_raw" / DATASET)
    settings = (
        f"num_epochs={args.epochs} num_iterations_per_epoch={ITERATIONS_PER_EPOCH} num_val_iterations_per_epoch=2 "
        f"batch_size={args.batch_size}"
    )
    run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 2 -np 2", environment)
    run(f"stunet plan -d 4 --size small -c 3d_fullres --set {settings}", environment)
    started = time.monotonic()
    train = f"nnUNetv2_train 4 3d_fullres {args.fold} -tr STUNetTrainer_small -p STUNetPlans_small -device cpu"
    peak = run(f'eval "$(stunet env)"; {train}', environment)
    seconds = time.monotonic() - started
    model = root / "nnUNet_results" / DATASET / "STUNetTrainer_small__STUNetPlans_small__3d_fullres"
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


def make_environment(root: Path) -> dict[str, str]:
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **folders, "PATH": path, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2"}


if __name__ == "__main__":
    main()
