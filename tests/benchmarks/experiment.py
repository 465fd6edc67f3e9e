"""What benchmarks that train share: nnU-Net's folders, commands as they are typed, and how results spread."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TypeVar

from processes import run

__all__ = ["Experiment", "add_data_arguments", "spread"]

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[2]


def add_data_arguments(parser: argparse.ArgumentParser, dataset: str) -> None:
    """``--data``, ``--work`` and ``--jobs``."""
    shared = Path(os.environ.get("STUNET_SHARED", _ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / dataset)
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from what is here")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with its share of the cores")


class Experiment:
    """A folder with nnU-Net's three folders in it.

    Args:
        root: The folder.
        jobs: Trainings at a time.
    """

    def __init__(self, root: Path, jobs: int) -> None:
        self.root, self.jobs = root.resolve(), jobs
        # Each job has cores of its own, out of those that this process may use: threads of several trainings that share
        # one wait for each other at every operation.
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        self._shares: Queue[str] = Queue()
        for job in range(jobs):
            self._shares.put(",".join(cores[job % len(cores) :: jobs]))
        self.raw, self.preprocessed, self.results = (
            self.root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        scripts = Path(sys.executable).parent
        self.environment = {
            **os.environ, **{folder.name: str(folder) for folder in (self.raw, self.preprocessed, self.results)},
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2",
        }  # fmt: skip

    def run(self, line: str) -> None:
        """Run a line of shell with the trainers; leaves the benchmark where it fails."""
        share = self._shares.get()
        try:
            run(f'taskset -cp {share} $$ >&2; eval "$(stunet env)"; {line}', self.environment)
        finally:
            self._shares.put(share)

    def all_of(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of all calls, as many at a time as there are jobs."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
