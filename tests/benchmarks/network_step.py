"""What the network costs beside the published one's operations: time and memory as ratios, in one JSON line.

Both networks have the same weights and take turns, in a training step (loss and SGD with momentum included, as the
trainer has them) and in the forward pass of one patch. The published operations are those of
``tests/published_structure.py``: interpolate, then convolve; every head computed. Time is given as the median of the
ratios of turns that follow each other, with the lowest and the highest; memory as the peak of what PyTorch allocates
beyond weights and momentum (on the CPU by its allocation events, on CUDA by its allocator), and on the CPU also as the
highest resident set beyond that before, which includes what oneDNN allocates. By hand, with nothing else running:

    python tests/benchmarks/network_step.py
    python tests/benchmarks/network_step.py --device cuda --patch 128 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from processes import peak_resident, spread
from torch import Tensor, nn

from stunet.loss import PartialDiceCELoss
from stunet.network import SIZES, build_stunet, default_strides

sys.path.insert(0, str(Path(__file__).parents[1]))
from memory_events import allocated as allocated_on_cpu
from published_structure import PublishedStructure

ARMS = ("ours", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "base"])
    parser.add_argument("--patch", type=int, default=64, help="edge of a cube, in voxels")
    parser.add_argument("--batch-size", type=int, default=2, help="of the training step")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 105])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--compile", metavar="BACKEND", help="both networks; inductor is what nnU-Net takes on CUDA")
    parser.add_argument("--channels-last", action="store_true", help="our weights in PyTorch's channels-last layout")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIZE", "CLASSES", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        size, classes, arm = args.memory_of
        print(json.dumps(resident_memory(Bench(size, int(classes), args), arm)))
        return
    load = os.getloadavg()[0]
    results = [measure(size, classes, args) for size in args.sizes for classes in args.classes]
    result = {
        "benchmark": "network_step",
        "patch": args.patch,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "compiled": args.compile,
        "channels_last": args.channels_last,
        "results": results,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
    }
    print(json.dumps(result))


class Bench:
    """Two networks with the same weights, a batch, and what is done with them."""

    def __init__(self, size: str, classes: int, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.classes, patch = args, classes, (args.patch,) * 3
        strides = default_strides(patch)
        ours = build_stunet(size, 1, classes, strides, deep_supervision=True)
        published = PublishedStructure(SIZES[size], 1, classes, strides)
        published.load_state_dict(ours.state_dict())
        if args.channels_last:  # which the convolutions' outputs then have
            ours = ours.to(memory_format=torch.channels_last_3d)
        self.networks: dict[str, nn.Module] = {"ours": ours.to(args.device), "published": published.to(args.device)}
        if args.compile:
            for network in self.networks.values():
                network.compile(dynamic=False, backend=args.compile)
        self.optimizers = {
            arm: torch.optim.SGD(network.parameters(), 1e-4, momentum=0.99, nesterov=True, weight_decay=3e-5)
            for arm, network in self.networks.items()
        }
        # As nnU-Net weighs them: halved from level to level, and the coarsest not at all.
        self.loss = PartialDiceCELoss(classes, batch_dice=False, weight_factors=[0.5**level for level in range(4)])
        self.image = torch.randn(args.batch_size, 1, *patch, device=args.device)
        self.targets = [
            torch.randint(classes, (args.batch_size, 1, *(n >> level for n in patch)), device=args.device)
            for level in range(4)
        ]

    def _precision(self) -> Any:
        dtype = getattr(torch, self.args.dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.args.device, dtype)

    def _all_outputs(self, arm: str, wanted: bool) -> nn.Module:
        network = self.networks[arm]
        if arm == "ours":
            network.decoder.deep_supervision = wanted
        return network

    def train(self, arm: str) -> None:
        network, optimizer = self._all_outputs(arm, True), self.optimizers[arm]
        optimizer.zero_grad(set_to_none=True)
        with self._precision():
            outputs = network(self.image)
            value = self.loss(outputs, self.targets)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        self._synchronize()

    def infer(self, arm: str) -> Tensor:
        network = self._all_outputs(arm, False)
        with torch.inference_mode(), self._precision():
            output = network(self.image[:1])
        self._synchronize()
        return output if arm == "ours" else output[0]

    def _synchronize(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()


def measure(size: str, classes: int, args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(size, classes, args)
    difference = (bench.infer("ours") - bench.infer("published")).abs().max() / bench.infer("published").abs().max()
    report: dict[str, Any] = {"size": size, "classes": classes, "output_difference": float(f"{difference:.2g}")}
    for what in ("train", "infer"):
        run = getattr(bench, what)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(args.repeats + 1):
            for arm in ARMS:
                started = time.perf_counter()
                run(arm)
                if turn > 0:  # the first warms up
                    seconds[arm].append(time.perf_counter() - started)
        peaks = {arm: allocated(run, arm, args.device) for arm in ARMS}
        report[what] = {
            "seconds": {arm: round(statistics.median(seconds[arm]), 3) for arm in ARMS},
            "time_ratio": spread(seconds["ours"], seconds["published"]),
            "allocated_mib": {arm: round(peak / 2**20, 1) for arm, peak in peaks.items()},
            "memory_ratio": round(peaks["ours"] / peaks["published"], 3),
        }
    del bench, run
    if args.device == "cpu":
        resident = {arm: in_a_process_of_its_own(size, classes, arm) for arm in ARMS}
        for what in ("train", "infer"):
            report[what]["resident_mib"] = {arm: round(resident[arm][what] / 2**20, 1) for arm in ARMS}
            report[what]["resident_ratio"] = round(resident["ours"][what] / resident["published"][what], 3)
    return report


def allocated(run: Any, arm: str, device: str) -> int:
    """Peak bytes that PyTorch allocates beyond what there is before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(arm)
        return torch.cuda.max_memory_allocated() - before
    return allocated_on_cpu(lambda: run(arm))


def in_a_process_of_its_own(size: str, classes: int, arm: str) -> dict[str, int]:
    command = [sys.executable, *sys.argv, "--memory-of", size, str(classes), arm]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, int] = json.loads(output.splitlines()[-1])
    return measured


def resident_memory(bench: Bench, arm: str) -> dict[str, int]:
    """Highest resident set beyond that before a training step, and a forward pass, that is not the first."""
    peaks = {}
    for what in ("infer", "train"):
        run = getattr(bench, what)
        run(arm)
        bench.optimizers[arm].zero_grad(set_to_none=True)
        peaks[what] = peak_resident(lambda run=run: run(arm))
    return peaks


if __name__ == "__main__":
    main()
