"""What surrounds the commands: full and read-only disks, names that look like markup, terminals without letters."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from masks import random_masks, write_case
from prediction_models import write_model
from preprocessed_cases import structures, write_preprocessed
from test_evaluate import Folders
from versions import replace_in_os

from plans import DATASET_JSON, make_plans
from stunet.cli.main import main
from stunet.network import STUNetSize

NAMES = ("v1 [best]", "v1 [old]", r"$\frac$ [/red] :x:")


@pytest.fixture
def root(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Type a line in this process: exit status, standard output and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as caught:
            main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes: a write then fails as it does on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_target(root: Path) -> None:
    """A preprocessed dataset to rank on, and a zoo whose checkpoints have the names above."""
    plans = make_plans()
    plans["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 16]
    folder = root / "nnUNet_preprocessed" / "Dataset001_Test"
    segmentation = structures((20, 20, 20), 3)
    write_preprocessed(folder, plans, segmentation, cases=2)
    labels = {"background": 0, **{f"[b]{n}": n for n in range(1, int(segmentation.max()) + 1)}}
    (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": labels}))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    models = [
        write_model(root / f"run[{i}]", num_classes=3, size=STUNetSize(f"d111111w{i}", (1,) * 6, i)) for i in (2, 3, 4)
    ]
    entries = [
        {"name": name, "path": f"{model}/fold_0/checkpoint_final.pth"}
        for name, model in zip(NAMES, models, strict=True)
    ]
    (root / "bad.pth").write_bytes(b"no checkpoint")
    (root / "zoo.yaml").write_text(json.dumps({"checkpoints": [*entries, {"name": "[/bad]", "path": "bad.pth"}]}))


RANK = "stunet rank -d 1 --zoo zoo.yaml --metrics ccfv --cases 2 --points 20 --whole 50 --resamples 10 -device cpu"


def test_names_are_text_in_tables_figures_and_commands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_target(root)
    status, out, err = run(capsys, f"{RANK} -o ranking")
    assert status == 1, err  # one could not be scored
    assert all(name in out for name in NAMES)
    assert "[/bad] could not be scored" in err
    assert f"--from '{root}/run[" in out
    assert (root / "ranking" / "ranking.html").read_text().count("<svg") == 2


def test_full_disks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_target(root)
    write_case(root / "source", "a", random_masks(0, ("face", "liver")))
    Folders(root / "evaluated")
    dataset = root / "evaluated" / "nnUNet_raw" / "Dataset007_Target"
    scored = "-m evaluated/model --predictions evaluated/segmentations --label-map evaluated/map.yaml"
    for line, file in (
        (f"{RANK} -o ranking", "ranking"),
        ("stunet plan -d 1 -c 3d_fullres --size small", "STUNetPlans_small.json"),
        (f"stunet evaluate -d {dataset} {scored} -np 1 -o scores", "summary.json"),
        ("stunet import totalsegmentator source -d 101 --structures face,liver -np 1", "Dataset101"),
    ):
        with full_disk():
            status, _, err = run(capsys, line)
        assert status == 2, err
        for part in ("no room on the disk", file, "File too large"):
            assert part in err, line
        assert not list(root.glob("**/*.tmp")), line
    assert not list(root.glob("nnUNet_raw/Dataset101*/dataset.json"))


def test_read_only_disks(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_target(root)
    write_case(root / "source", "a", random_masks(0, ("face", "liver")))
    usual = os.mkdir

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if "closed" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        usual(path, *args, **kwargs)

    replace_in_os(monkeypatch.setattr, "mkdir", refuse)
    for line in (
        f"{RANK} -o closed/ranking",
        "stunet import totalsegmentator source -d 101 --structures face,liver -np 1 --name closed",
    ):
        status, _, err = run(capsys, line)
        assert status == 2, err
        for part in ("cannot be used", "closed", "Read-only file system"):
            assert part in err, line


def test_a_terminal_without_letters_costs_nothing(root: Path) -> None:
    """Printing comes last; it must not end what was done before in an error."""
    for name in ("a", "ä"):
        write_case(root / "source", name, random_masks(0, ("face", "liver", "spleen")))
    command = [sys.executable, "-m", "stunet", "import", "totalsegmentator", "source", "-d", "101"]
    result = subprocess.run(
        [*command, "--structures", "face,liver", "--exclude", "ä", "-np", "1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert b"1 case excluded: ?" in result.stdout + result.stderr


CHILDREN = """
import multiprocessing, time
from stunet.processes import end_with_children
if __name__ == "__main__":
    end_with_children()
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        context.Process(target=time.sleep, args=(600,), daemon=True).start()
    print("started", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere SIGKILL leaves children")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_a_training(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", CHILDREN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert process.wait(30) == -number


def test_leftovers_of_a_killed_conversion_are_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stunet.files import temporary_path

    mine = temporary_path(root / "model[old]")  # as an earlier process with this one's id left it
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))
    alive = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
    for folder in (mine, dead, alive):
        (folder / "fold_0").mkdir(parents=True)
    status, _, err = run(capsys, "stunet convert none.model -o model[old]")
    assert status == 2
    assert "none.model" in err
    assert sorted(root.glob(".model*")) == [alive]
