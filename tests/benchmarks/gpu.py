"""All figures that want a GPU, by one command: a JSON file and a table, in at most 20 minutes, with nothing to prepare.

Each part is another benchmark of this folder in a process of its own; what fails, lacks memory or a second GPU says so,
and the others go on. On a GPU of any size:

    python tests/benchmarks/gpu.py                              # writes gpu.json
    python tests/benchmarks/gpu.py --device cpu --small         # the same, tiny, to see that all of it works

Parts: the loss beside nnU-Net's; a training step and a forward pass of each size beside the published network, eager
and compiled; memory beside the estimates of ``stunet info``; the input pipeline; prediction of a whole body beside
nnU-Net's; a sharded step in two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memory_events import Training

from stunet.memory import estimate
from stunet.network import shard
from stunet.sizes import SIZES

FOLDER = Path(__file__).resolve().parent

#: Figures that the table has, of all that the JSON file has.
SHOWN = re.compile(
    r"(seconds|time_ratio|time_by_stock|cpu_seconds)(\.median|\.ours|\.published)?$|memory_ratio|peak_memory_by_logits"
    r"|(predicted|measured|resident)_mb|predicted_by_measured|samples_per_second(_per_core)?$|peak_gb|would_need|failed"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny networks, patches and images")
    parser.add_argument("--parts", nargs="+", help="those whose names begin so")
    parser.add_argument("--minutes", type=float, default=20, help="after which what is left is not begun, or ended")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--sharded", nargs=2, metavar=("SIZE", "EDGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sharded:
        print(json.dumps(sharded_step(args.sharded[0], int(args.sharded[1]), args.device)))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is there: try --device cpu --small")
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "gpus": torch.cuda.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch", "numpy")},
        "parts": {},
    }
    for name, command in parts(args.device, args.small):
        if not args.parts or name.startswith(tuple(args.parts)):
            print(f"{name}: {command}", file=sys.stderr, flush=True)
            result["parts"][name] = run(command, deadline - time.monotonic())
            args.output.write_text(json.dumps(result, indent=1))  # as far as it got
    for name, part in result["parts"].items():
        for key, value in figures(part):
            print(f"{name:<26} {key:<72} {value}")


def parts(device: str, small: bool) -> Iterator[tuple[str, str]]:
    """Names and commands, the most wanted first."""
    edge, repeats, outputs, sizes = (32, 1, [3], ["small"]) if small else (128, 10, [3, 25, 105], [*SIZES])
    on, backend = f"--device {device}", "eager" if small else "inductor"  # which takes minutes on the CPU
    dtype = "--dtype float16" if device == "cuda" else ""
    for n in outputs:
        yield f"loss, {n} outputs", f"partial_loss.py {on} {dtype} --outputs {n} --patches {edge} --repeats {repeats}"
    of_step = f"network_step.py {on} {dtype} --patch {edge} --repeats {repeats} --classes {outputs[-1]}"
    for size in sizes:
        yield f"step, {size}", f"{of_step} --sizes {size}"
    memory = f"training_memory.py {on} --edge {edge} --classes {outputs[-1]} --sharded"
    for size in sizes:
        yield f"memory, {size}", f"{memory} --sizes {size} --checkpointing {'none' if small else 'none encoder all'}"
    for size in sizes[:2]:
        yield f"compiled step, {size}", f"{of_step} --sizes {size} --compile {backend}"
    yield "step, channels last", f"{of_step} --sizes {sizes[0]} --channels-last"
    z, patch = (32, 32) if small else (600, 128)
    yield "prediction", f"prediction.py {on} --whole-body {z} --patch {patch} --classes {outputs[-1]}"
    counts = "2" if small else "2 104"
    patch, few = (2 * edge, "--repetitions 1 --seconds 1") if small else (edge, "--repetitions 5 --seconds 5")
    yield "input pipeline", f"input_pipeline.py --patches {patch} --structures {counts} {few}"
    yield "sharded step", f"gpu.py {on} --sharded {sizes[-2] if len(sizes) > 1 else sizes[0]} {edge}"


def run(command: str, seconds: float) -> dict[str, Any]:
    """What a benchmark prints as its last line, or why there is none."""
    script, *arguments = command.split()
    try:
        done = subprocess.run(
            [sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, timeout=max(seconds, 0)
        )
    except subprocess.TimeoutExpired:
        return {"failed": "out of time"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(part: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What the table shows of a part, by path."""
    if isinstance(part, dict | list):
        for name, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from figures(value, f"{key}.{name}" if key else str(name))
    elif SHOWN.search(key):
        yield key, part


def sharded_step(size: str, edge: int, device: str, n: int = 2) -> dict[str, Any]:
    """Seconds and bytes of a sharded step of so many processes, one sample each, on a GPU each."""
    if device == "cuda" and torch.cuda.device_count() < n:
        sys.exit(f"{torch.cuda.device_count()} GPU is there, and {n} are wanted")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_sharded_process, args=(n, size, edge, device, folder), nprocs=n)
        found: dict[str, Any] = json.loads(Path(folder, "0.json").read_text())
    return found


def _sharded_process(rank: int, n: int, size: str, edge: int, device: str, folder: str) -> None:
    on_cuda = device == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n
    )
    mesh, dtype = init_device_mesh(device, (n,)), torch.bfloat16 if on_cuda else None

    def wrap(network: Any) -> Any:
        shard(network, mesh, dtype=dtype)
        return network

    training = Training(SIZES[size], batch=1, classes=105, edge=edge, device=device, dtype=dtype, wrap=wrap)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        training.step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    predicted = estimate(
        SIZES[size], patch_size=(edge,) * 3, batch_size=n, num_classes=105, precision="amp" if on_cuda else "fp32",
        parallel="fsdp", ranks=n,
    ).training_bytes  # fmt: skip
    found = {
        "size": size,
        "processes": n,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "predicted_mb": round(predicted / 2**20),
        "measured_mb": round(torch.cuda.max_memory_allocated() / 2**20) if on_cuda else None,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
