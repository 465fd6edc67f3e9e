"""What the loss costs at many classes beside nnU-Net's: time and memory above the logits, as ratios, in one JSON line.

nnU-Net's loss and ours, with everything and with half of all structures annotated, take turns on the same logits,
forward and backward. Time is given as the median of the ratios of turns that follow each other, with the lowest and the
highest, on the clock and of all threads (which on a busy machine tells more); memory as the highest resident set above
that before, the gradient of the logits included. By hand: at the sizes below it takes about two minutes and 6 GB.

    python tests/benchmarks/partial_loss.py
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

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from processes import peak_resident, spread
from torch import Tensor

from stunet.loss import PartialDiceCELoss

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=105)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 96], help="edges of cubes, in voxels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="PyTorch's own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    result = {
        "benchmark": "partial_loss",
        "outputs": args.outputs,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "patches": {f"{edge}^3": measure(edge, args) for edge in args.patches},
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
    }
    print(json.dumps(result))


def measure(edge: int, args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    shape = (edge,) * 3
    logits = torch.randn(args.batch_size, args.outputs, *shape, device=args.device, dtype=getattr(torch, args.dtype))
    logits.requires_grad_()
    target = torch.randint(args.outputs, (args.batch_size, 1, *shape), device=args.device, dtype=torch.int16)
    arms = make_arms(args)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.repeats + 1):
        for name, loss in arms.items():
            wall, cpu = time_once(loss, logits, target)
            if turn > 0:  # the first warms up
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
    size = logits.numel() * logits.element_size()
    report: dict[str, object] = {"logits_gb": round(size / 2**30, 3)}
    for name, loss in arms.items():
        arm: dict[str, object] = {
            "seconds": round(statistics.median(seconds[name]), 3),
            "cpu_seconds": round(statistics.median(cpu_seconds[name]), 3),
            "peak_memory_by_logits": round(peak_memory(loss, logits, target) / size, 3),
        }
        if name != "stock":
            arm["time_by_stock"] = spread(seconds[name], seconds["stock"])
            arm["cpu_time_by_stock"] = spread(cpu_seconds[name], cpu_seconds["stock"])
        report[name] = arm
    return report


def make_arms(args: argparse.Namespace) -> dict[str, Loss]:
    ours = PartialDiceCELoss(args.outputs, batch_dice=True)
    half = torch.rand(args.batch_size, args.outputs) < 0.5

    def partial(logits: Tensor, target: Tensor) -> Tensor:
        with ours.annotated_in(half):
            loss: Tensor = ours(logits, target)
        return loss

    settings = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def in_fp32(logits: Tensor, target: Tensor) -> Tensor:
        # What autocast does with nnU-Net's loss on CUDA.
        loss: Tensor = stock(logits.float(), target)
        return loss

    return {"stock": in_fp32, "all_annotated": ours, "half_annotated": partial}


def time_once(loss: Loss, logits: Tensor, target: Tensor) -> tuple[float, float]:
    """Seconds on the clock, and of all the process's threads."""
    logits.grad = None
    synchronize(logits)
    started, cpu_started = time.perf_counter(), time.process_time()
    loss(logits, target).backward()
    synchronize(logits)
    return time.perf_counter() - started, time.process_time() - cpu_started


def synchronize(logits: Tensor) -> None:
    if logits.is_cuda:
        torch.cuda.synchronize()


def peak_memory(loss: Loss, logits: Tensor, target: Tensor) -> int:
    """Bytes beyond those there were before: of CUDA memory, or of the process's resident set (on Linux)."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(logits, target).backward()
        return torch.cuda.max_memory_allocated() - before
    return peak_resident(lambda: loss(logits, target).backward())


if __name__ == "__main__":
    main()
