"""nnU-Net's and our commands: called in this process, which has their imports, or typed in a shell of their own."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from multiprocessing.context import SpawnContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from unittest import mock

import SimpleITK as sitk
import torch

import stunet.cli.main  # now: its consoles keep the COLUMNS that they find when they are made
import stunet.processes  # noqa: F401 - now, so that it keeps its executor when it is patched
from stunet.cli.env import trainers_folder

#: Commands that import nnU-Net.
NNUNET = re.compile("nnUNetv2|stunet (plan|train|finetune)")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SCRIPTS = Path(sys.executable).parent


class Threads(SpawnContext):
    """Pools of threads: a spawned process would import PyTorch and nnU-Net again, which takes five seconds."""

    def Pool(  # noqa: N802 - multiprocessing's name
        self, processes: int | None = None, initializer: Any = None, initargs: Any = (), maxtasksperchild: Any = None
    ) -> ThreadPool:
        return ThreadPool(processes, initializer, initargs)


class ThreadExecutor(ThreadPoolExecutor):
    """The same for our own processes."""

    def __init__(self, max_workers: int | None = None, **of_processes: Any) -> None:
        super().__init__(max_workers)


def patches_of_this_process() -> Iterator[Any]:
    """What a process of its own would leave behind when it ends, and its pools."""
    yield mock.patch.object(multiprocessing, "get_context", return_value=Threads())
    yield mock.patch("stunet.processes.ProcessPoolExecutor", ThreadExecutor)
    yield mock.patch.object(torch, "set_num_threads")
    yield mock.patch.object(signal, "signal")
    yield mock.patch.object(os, "register_at_fork")


def patches_of_nnunet() -> Iterator[Any]:
    """What takes nnU-Net seconds and no test looks at."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    yield mock.patch("nnunetv2.utilities.utils.Pool", ThreadPool)  # a dozen processes that list a folder
    yield mock.patch.object(LocalLogger, "plot_progress_png")  # 30 x 54 inches after each epoch
    # Of small images it draws as many voxels as of large ones: a hundred million.
    voxels = property(lambda self: 1e5, lambda self, number: None)
    yield mock.patch.object(
        DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats", voxels, create=True
    )


@dataclass(frozen=True)
class Shell:
    """A shell that has nnU-Net's three variables and nothing else of nnU-Net's.

    Attributes:
        root: Folder that holds nnU-Net's three folders, and where commands run.
    """

    root: Path

    @classmethod
    def make(cls, root: Path) -> Shell:
        for name in FOLDERS:
            (root / name).mkdir(parents=True)
        return cls(root)

    def copy(self, root: Path) -> Shell:
        """The same folders and files elsewhere, to be changed there."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Shell(root)

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    def model(self, dataset: str, name: str) -> Path:
        return self.root / "nnUNet_results" / dataset / name

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "STUNET_", "HF_"))}
        ours = {name: str(self.root / name) for name in FOLDERS}
        # Fewer processes than nnU-Net's defaults, for machines with two cores; in this process, none.
        few = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "COLUMNS": "200"}
        return {**kept, **ours, **few, "PATH": f"{SCRIPTS}{os.pathsep}{kept['PATH']}", "PYTHONUNBUFFERED": "1"}

    def run(
        self, line: str, *, status: int = 0, trainers: bool = False, only_stdout: bool = False, **variables: str | None
    ) -> str:
        """Call a command's entry point in this process, and return what it printed.

        Args:
            line: The command as it is typed, without redirections.
            status: The exit status that it must have.
            trainers: Whether ``eval "$(stunet env)"`` went before.
            only_stdout: Whether to leave out what it printed on standard error.
            **variables: More of the environment; None takes one out.
        """
        name, *arguments = shlex.split(line)
        (script,) = entry_points(group="console_scripts", name=name)
        if trainers:
            variables = {"nnUNet_extTrainer": str(trainers_folder()), **variables}
        environment = {k: v for k, v in {**self.environment, **variables}.items() if v is not None}
        printed, errors = io.StringIO(), io.StringIO()
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
            stack.enter_context(mock.patch.object(sys, "argv", [name, *arguments]))
            stack.enter_context(working_folder(self.root))
            stack.enter_context(redirect_stdout(printed))
            stack.enter_context(redirect_stderr(errors if only_stdout else printed))
            for patch in (*patches_of_this_process(), *(patches_of_nnunet() if NNUNET.match(line) else ())):
                stack.enter_context(patch)
            try:
                code = script.load()()
            except SystemExit as end:
                code = end.code
            except Exception:
                traceback.print_exc()
                code = 1
        said = printed.getvalue()
        assert (code or 0) == status, (said + errors.getvalue())[-6000:]
        return said

    def refuse(self, line: str, *words: str, **options: Any) -> str:
        """Call a command that must end with exit status 2 and an error that has these words, and no traceback."""
        said = self.run(line, status=2, **options)
        assert "error" in said.lower()
        assert "Traceback" not in said
        for word in words:
            assert word in " ".join(said.split()), said
        return said

    def start(self, line: str, *, trainers: bool = False, **variables: str) -> subprocess.Popen[str]:
        """Start a line of shell; with ``trainers`` after ``eval "$(stunet env)"``."""
        setup = 'eval "$(stunet env)"; ' if trainers else ""
        # Where the tests run in the background, Ctrl-C is ignored, which processes inherit.
        return subprocess.Popen(
            ["bash", "-c", setup + line], env={**self.environment, **variables}, cwd=self.root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def type(self, line: str, *, status: int = 0, trainers: bool = False, **variables: str) -> str:
        """Run a line of shell, in processes of its own, to its end and return all that it printed."""
        process = self.start(line, trainers=trainers, **variables)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == status, output[-6000:]
        return output

    def type_and_kill(self, line: str, when: Callable[[str], bool], how: int = signal.SIGKILL) -> None:
        """Type a line with the trainers and kill it and all its children as soon as ``when`` holds.

        Args:
            line: The command.
            when: Gets all that the command has written to its log so far.
            how: SIGKILL, or SIGINT for Ctrl-C.
        """
        log = self.root / "killed.log"
        process = self.start(f"{line} > {log} 2>&1", trainers=True)
        deadline = time.monotonic() + 900
        try:
            while not when(log.read_text() if log.exists() else ""):
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(0.002)
        finally:
            os.killpg(process.pid, how)
            process.wait()


def read_array(path: Path) -> Any:
    """Voxels of an image, ``(Z, Y, X)``."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def rewrite_image(path: Path, change: Callable[[Any], Any], to: Path | None = None) -> None:
    """Replace an image's voxels, or write them to another file, with the same geometry."""
    image = sitk.ReadImage(str(path))
    changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(to or path))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its path within."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def verify(dataset: Path) -> None:
    """Have nnU-Net check a raw dataset."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    with mock.patch.object(multiprocessing, "get_context", return_value=Threads()):
        verify_dataset_integrity(str(dataset), num_processes=1)


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
