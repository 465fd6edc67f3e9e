"""Peak memory of training, predicted and measured, in one JSON line.

On the CPU: each size with each activation checkpointing, in fp32, in a process of its own. Measured are PyTorch's
allocations in a step after the first, and the highest resident set above that before the network was made, which also
has what oneDNN and the allocator take. With ``--device cuda`` in nnU-Net's mixed precision, and resident is what the
allocator has reserved. Sharded: one of several processes, by PyTorch's tracker of FSDP2 on fake
tensors, so that nothing is allocated. By hand: with the sizes below it takes about ten minutes and 10 GB.

    python tests/benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from memory_events import Training, sharded_peak
from processes import resident_set

from stunet.memory import estimate
from stunet.sizes import SIZES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["small", "base"])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "encoder", "all"])
    parser.add_argument("--edge", type=int, default=64, help="of the patch, in voxels")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sharded", nargs="*", default=["huge"], help="sizes for several processes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sharded-edge", type=int, default=128)
    parser.add_argument("--sharded-classes", type=int, default=105)
    args = parser.parse_args()
    result = {
        "benchmark": "training_memory",
        "patch": args.edge,
        "batch_size": args.batch_size,
        "classes": args.classes,
        args.device: {
            f"{name} {where}": apart(measure, name, where, args)
            for name, where in product(args.sizes, args.checkpointing)
        },
        "sharded_patch": args.sharded_edge,
        "sharded_classes": args.sharded_classes,
        "sharded": {
            f"{name} {precision} {n} ranks": apart(compare, name, n, precision, args)
            for name, n, precision in product(args.sharded, args.ranks, ["fp32", "amp"])
        },
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("stunet", "torch")},
    }
    print(json.dumps(result))


def apart(function: Any, *args: Any) -> dict[str, Any]:
    """The result of a function that is called in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure(name: str, where: Any, args: argparse.Namespace) -> dict[str, Any]:
    on_cpu = args.device == "cpu"
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_set("VmRSS")
    training = Training(
        SIZES[name], batch=args.batch_size, classes=args.classes, edge=args.edge, activation_checkpointing=where,
        device=args.device, dtype=None if on_cpu else torch.half,
    )  # fmt: skip
    training.step()
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest to the present one
    training.step()
    resident = resident_set("VmHWM") - before if on_cpu else torch.cuda.max_memory_reserved()
    predicted = estimate(
        SIZES[name], patch_size=(args.edge,) * 3, batch_size=args.batch_size, num_classes=args.classes,
        activation_checkpointing=where, precision="fp32" if on_cpu else "amp",
    ).training_bytes  # fmt: skip
    return report(predicted, training.peak(), resident)


def compare(name: str, ranks: int, precision: Any, args: argparse.Namespace) -> dict[str, Any]:
    edge, classes = args.sharded_edge, args.sharded_classes
    predicted = estimate(
        SIZES[name], patch_size=(edge,) * 3, batch_size=ranks, num_classes=classes, precision=precision,
        parallel="fsdp", ranks=ranks,
    ).training_bytes  # fmt: skip
    parts = sharded_peak(SIZES[name], ranks, edge=edge, classes=classes, mixed=precision == "amp")
    return {
        **report(predicted, parts.pop("Total")),
        "parts_mb": {part: round(size / 2**20) for part, size in parts.items()},
    }


def report(predicted: int, measured: int, resident: int | None = None) -> dict[str, Any]:
    values = {
        "predicted_mb": round(predicted / 2**20),
        "measured_mb": round(measured / 2**20),
        "predicted_by_measured": round(predicted / measured, 3),
    }
    if resident is not None:
        values |= {"resident_mb": round(resident / 2**20), "predicted_by_resident": round(predicted / resident, 3)}
    return values


if __name__ == "__main__":
    main()
