"""What tests share: real data, commands called in this process, and what nnU-Net makes of generated data, made once.

==================  ==================================================================================================
``shared``          the folder with real data; without it the test is skipped
``nnunet_folders``  nnU-Net's three folders, empty, with the variables set
``dataset``         a preprocessed dataset without content, which trainers can be made on
``shell``           nnU-Net's three folders, empty, and ``shell.run("stunet …")``, which takes no process of its own
``phantoms``        two generated datasets that nnU-Net has planned and preprocessed; only to be read
``trained``         the same with a model trained on the first; only to be read
==================  ==================================================================================================

What changes a file takes ``trained.copy(tmp_path)``.
"""

from __future__ import annotations

import os

# Test processes share the cores: with more threads than cores, each waits for the others at every operation. OpenMP
# counts the cores that a process may use when PyTorch is imported, which the imports below do; so do the commands that
# tests type, which inherit this.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    n_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[worker % len(cores) :: n_workers])

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from integration.commands import FOLDERS, Shell

from stunet.cli.env import trainers_folder
from stunet.datasets.phantoms import write_phantom_dataset

ROOT = Path(__file__).resolve().parents[1]

#: Names of the datasets of ``phantoms``, and of the model of ``trained``.
VENOUS, ARTERIAL = "Dataset001_Venous", "Dataset002_Arterial"
TRAINED = "STUNetTrainer__STUNetPlans_narrow__3d_fullres"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and golden outputs, beside the project or where STUNET_SHARED points."""
    folder = Path(os.environ.get("STUNET_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder} does not exist (set STUNET_SHARED)")
    return folder


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """nnU-Net's three folders, empty, with the variables set."""
    folders = {name: tmp_path / name for name in FOLDERS}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders


@pytest.fixture
def dataset(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preprocessed dataset without content, which trainers can be made on."""
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset001_Test"
    for name in ("2d", "3d_fullres", "3d_lowres"):
        case = folder / f"nnUNetPlans_{name}"
        case.mkdir(parents=True)
        (case / "case.b2nd").touch()  # nnU-Net looks at file endings to choose a dataset class
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Commands, and nnU-Net's three folders, empty."""
    return Shell.make(tmp_path)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Two datasets of phantoms with ``nnUNetPlans`` and the cases of ``3d_fullres``; only to be read.

    The first has five training cases with venous contrast (fold 0 validates one of them) and a test case; the second
    five with arterial contrast and other structures.
    """

    def make(root: Path) -> None:
        shell = Shell.make(root)
        for name, contrast, n_test in ((VENOUS, "venous", 1), (ARTERIAL, "arterial", 0)):
            write_phantom_dataset(shell.raw / name, n_training=5, n_test=n_test, seed=len(name), contrast=contrast)
        shell.run("nnUNetv2_plan_and_preprocess -d 1 2 -c 3d_fullres -npfp 1 -np 1")

    return Shell(made_once(tmp_path_factory, "phantoms", make))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, phantoms: Shell) -> Shell:
    """``phantoms`` and a training of four short epochs on the first, which selects for the second; only to be read."""

    def make(root: Path) -> None:
        shell = phantoms.copy(root)
        settings = (
            "num_epochs=4 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 batch_size=2 patch_size=16,32,32 "
            "mirroring=none save_every=1 keep_every=2 select_for=2"
        )
        shell.run(f"stunet plan -d 1 -c 3d_fullres --depth 1 --width 4 --name STUNetPlans_narrow --set {settings}")
        shell.run("nnUNetv2_train 1 3d_fullres 0 -p STUNetPlans_narrow -tr STUNetTrainer -device cpu", trainers=True)

    return Shell(made_once(tmp_path_factory, "trained", make))


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process in need of it makes, and that those beside it wait for."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of all test processes of this run
    folder, finished = base / name, base / f"{name}.finished"
    with FileLock(base / f"{name}.lock"):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            finished.touch()
    return folder
