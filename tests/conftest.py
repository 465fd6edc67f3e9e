"""What tests share: where real data lies, and small datasets planned by nnU-Net itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stunet.cli.env import trainers_folder

# Test processes share the cores: with more threads than cores, each waits for the others at every operation. OpenMP
# counts the cores that a process may use, and so do the commands that tests type, which inherit this.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    n_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[worker % len(cores) :: n_workers])

ROOT = Path(__file__).resolve().parents[1]


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
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
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
