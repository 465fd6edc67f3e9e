"""What benchmarks that train share: nnU-Net's folders, commands as they are typed, and how results spread."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from processes import run

__all__ = ["Experiment", "add_data_arguments", "spread"]

_ROOT = Path(__file__).resolve().parents[2]


def add_data_arguments(parser: argparse.ArgumentParser, dataset: str) -> None:
    """``--data`` and ``--work``."""
    shared = Path(os.environ.get("STUNET_SHARED", _ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / dataset)
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from what is here")


class Experiment:
    """A folder with nnU-Net's three folders in it.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
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
        run(f'eval "$(stunet env)"; {line}', self.environment)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
