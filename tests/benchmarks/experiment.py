"""What benchmarks that train share: nnU-Net's folders, commands as they are typed, and how results spread."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from processes import run

__all__ = ["Experiment", "make_parser", "spread"]

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[2]


def make_parser(description: str | None, dataset: str) -> argparse.ArgumentParser:
    """Command line with ``--data``, ``--work``, ``--jobs`` and ``--width``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("STUNET_SHARED", _ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / dataset)
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from what is here")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with its share of the cores")
    parser.add_argument("--width", type=int, default=8)
    return parser


class Experiment(ABC):
    """A folder with nnU-Net's three folders in it, and steps, each skipped where its result is there.

    Args:
        root: The folder.
        args: What the command line said.
    """

    @classmethod
    def print_result(cls, parser: argparse.ArgumentParser) -> None:
        """Do it all as the command line says."""
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(cls(args.work or Path(temporary), args).measure()))

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        self.root, self.args = root.resolve(), args
        # Each job has cores of its own, out of those that this process may use: threads of several trainings that share
        # one wait for each other at every operation.
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        self._shares: Queue[str] = Queue()
        for job in range(args.jobs):
            self._shares.put(",".join(cores[job % len(cores) :: args.jobs]))
        self.raw, self.preprocessed, self.results = (
            self.root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ, **{folder.name: str(folder) for folder in (self.raw, self.preprocessed, self.results)},
            "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1",
        }  # fmt: skip

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Do all steps and return what is printed."""

    def run(self, line: str) -> int:
        """Run a line of shell with the trainers and return its peak memory; leaves the benchmark where it fails."""
        share = self._shares.get()
        try:
            return run(f'taskset -cp {share} $$ >&2; eval "$(stunet env)"; {line}', self.environment)
        finally:
            self._shares.put(share)

    def type(self, line: str) -> None:
        """Run commands joined by ``&&``, each in a process that is forked from one with nnU-Net's imports done."""
        os.environ.update(self.environment)  # nnU-Net reads it when it is imported
        server, share = multiprocessing.get_context("forkserver"), self._shares.get()
        server.set_forkserver_preload(["nnunetv2.run.run_training", "torch._dynamo", "stunet.cli.main"])
        try:
            for command in line.split(" && "):
                process = server.Process(target=_call, args=(shlex.split(command), share))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"failed with status {process.exitcode}: {command}")
        finally:
            self._shares.put(share)

    def merge(self, folder: Path, structures: Sequence[str]) -> None:
        """Join structures of a raw dataset, each new one given as NAME=A,B; all others become background."""
        description = json.loads((folder / "dataset.json").read_text())
        merged = dict(each.split("=") for each in structures)
        table = np.zeros(256, np.uint8)
        for value, parts in enumerate(merged.values(), start=1):
            table[[description["labels"][part] for part in parts.split(",")]] = value
        for path in (folder / "labelsTr").iterdir():
            label = nib.load(path)
            nib.save(nib.Nifti1Image(table[np.asarray(label.dataobj, int)], label.affine), path)
        description["labels"] = {"background": 0, **{name: i for i, name in enumerate(merged, start=1)}}
        (folder / "dataset.json").write_text(json.dumps(description))

    def all_of(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of all calls, as many at a time as there are jobs."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]


def _call(command: list[str], cores: str) -> None:
    """Do what the script of an installed package does."""
    from stunet.cli.env import trainers_folder

    os.dup2(2, 1)
    os.environ["nnUNet_extTrainer"] = str(trainers_folder())
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    sys.argv = command
    (script,) = entry_points(group="console_scripts", name=command[0])
    script.load()()


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
