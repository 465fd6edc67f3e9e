"""nnU-Net's and our commands, typed as a user types them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Shell:
    """A shell that has nnU-Net's three variables and nothing else of nnU-Net's.

    Attributes:
        root: Folder that holds nnU-Net's three folders.
    """

    root: Path

    @classmethod
    def make(cls, root: Path) -> Shell:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
        return cls(root)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        ours = {name: str(self.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        # Fewer processes than nnU-Net's defaults, for machines with two cores.
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "COLUMNS": "200"}
        return {**kept, **ours, **few, "PATH": f"{SCRIPTS}{os.pathsep}{kept['PATH']}", "PYTHONUNBUFFERED": "1"}

    def start(self, line: str, *, trainers: bool = False) -> subprocess.Popen[str]:
        """Start a line of shell; with ``trainers`` after ``eval "$(stunet env)"``."""
        setup = 'eval "$(stunet env)"; ' if trainers else ""
        return subprocess.Popen(
            ["bash", "-c", setup + line], env=self.environment, cwd=self.root, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, line: str, *, trainers: bool = False) -> str:
        """Run a line of shell to its end and return all that it printed."""
        process = self.start(line, trainers=trainers)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-6000:]
        return output

    def run_and_kill(self, line: str, when: Callable[[str], bool]) -> None:
        """Run a line with the trainers and kill it and all its children with SIGKILL as soon as ``when`` holds.

        Args:
            line: The command.
            when: Gets all that the command has written to its log so far.
        """
        log = self.root / "killed.log"
        process = self.start(f"{line} > {log} 2>&1", trainers=True)
        deadline = time.monotonic() + 300
        try:
            while not when(log.read_text() if log.exists() else ""):
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(0.002)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def model(self, dataset: str, name: str) -> Path:
        return self.root / "nnUNet_results" / dataset / name
