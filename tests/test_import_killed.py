"""An import that is killed at each moment at which something appears on disk, and continued."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from killing import run_and_kill
from masks import STRUCTURES, random_masks, save, write_source

from stunet.datasets.totalsegmentator import import_cases, read_totalsegmentator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", "")  # restored after the test


def run(source: Path, root: Path, excluded: tuple[str, ...] = ()) -> None:
    os.environ["nnUNet_preprocessed"] = str(root / "preprocessed")
    import_cases(
        list(read_totalsegmentator(source).cases.values()),
        STRUCTURES,
        root / "Dataset101_T",
        details={},
        excluded=excluded,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill(source: Path, root: Path, moment: int, after: bool) -> bool:
    return run_and_kill(lambda: run(source, root), moment, after)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_each_change_and_continued(tmp_path: Path, after: bool) -> None:
    source = write_source(tmp_path / "source")
    run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    moment, dataset_seen_late = 1, False
    while True:
        root = tmp_path / f"killed_{moment}"
        root.mkdir()
        if not kill(source, root, moment, after):
            break
        dataset_json = root / "Dataset101_T" / "dataset.json"
        if dataset_json.exists():  # then all that belongs to it is there
            dataset_seen_late = True
            there = contents(root / "Dataset101_T")
            assert {k: v for k, v in there.items() if k != ".import.jsonl"} == contents(
                tmp_path / "whole" / "Dataset101_T"
            )
        run(source, root)
        assert contents(root) == expected, moment
        shutil.rmtree(root)
        moment += 1
    assert moment > 15
    assert dataset_seen_late


def test_killed_while_a_finished_import_is_run_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    run(source, tmp_path / "whole")
    expected, moment = contents(tmp_path / "whole"), 1
    while kill(source, tmp_path / "whole", moment, True):
        run(source, tmp_path / "whole")
        assert contents(tmp_path / "whole") == expected, moment
        moment += 1
    assert moment >= 8


def test_killed_while_something_else_is_imported_over_it(tmp_path: Path) -> None:
    source, moment = write_source(tmp_path / "source"), 1
    shutil.copytree(source, tmp_path / "changed")
    save(random_masks(9)["heart"], tmp_path / "changed" / "a0" / "segmentations" / "heart.nii.gz")
    (tmp_path / "changed" / "a1" / "segmentations" / "aorta.nii.gz").unlink()
    run(tmp_path / "changed", tmp_path / "fresh")
    expected = contents(tmp_path / "fresh" / "Dataset101_T")
    while True:
        root = tmp_path / f"killed_{moment}"
        run(source, root)
        before = contents(root / "Dataset101_T")
        if not kill(tmp_path / "changed", root, moment, True):
            break
        now = contents(root / "Dataset101_T")
        cases = {k: v for k, v in now.items() if k != ".import.jsonl"}
        assert "dataset.json" not in now or cases in (before, expected), moment  # never a mixture of both
        run(tmp_path / "changed", root)
        assert contents(root / "Dataset101_T") == expected, moment
        shutil.rmtree(root)
        moment += 1
    assert moment > 15


def test_killed_and_continued_without_a_case(tmp_path: Path) -> None:
    source, moment = write_source(tmp_path / "source"), 1
    run(source, tmp_path / "fresh", excluded=("a1",))
    while True:
        root = tmp_path / f"killed_{moment}"
        root.mkdir()
        if not kill(source, root, moment, True):
            break
        if not (root / "preprocessed").exists():  # which would rightly keep what it has
            run(source, root, excluded=("a1",))
            assert contents(root) == contents(tmp_path / "fresh"), moment
        shutil.rmtree(root)
        moment += 1
    assert moment > 15


def test_killed_often_without_ever_ending(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    run(source, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    for moment in range(5, 40, 4):
        kill(source, tmp_path / "killed", moment, False)
    run(source, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
