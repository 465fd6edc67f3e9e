"""Lists of checkpoints: names, zoo files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from stunet.errors import UsageError
from stunet.ranking import name_checkpoints, read_zoo


def _touch(root: Path, *paths: str) -> list[Path]:
    found = []
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        found.append(file)
    return found


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["m1/fold_0/checkpoint_final.pth", "m2/fold_0/checkpoint_final.pth"], ["m1", "m2"]),
        (["m/fold_0/checkpoint_final.pth", "m/fold_1/checkpoint_final.pth"], ["fold_0", "fold_1"]),
        (["m/f/checkpoint_final.pth", "m/f/checkpoint_best.pth"], ["checkpoint_final", "checkpoint_best"]),
        (["a/x/best.pth", "a/y/best.pth", "b/x/best.pth"], ["a/x", "a/y", "b/x"]),
        (["one/checkpoint_final.pth"], ["checkpoint_final"]),
    ],
)
def test_names_are_what_differs(tmp_path: Path, paths: list[str], names: list[str]) -> None:
    files = _touch(tmp_path, *paths)
    entries = name_checkpoints(files)
    assert [entry.name for entry in entries] == names
    assert [entry.path for entry in entries] == files


def test_zoo_file(tmp_path: Path) -> None:
    a, b = _touch(tmp_path, "zoo/a/final.pth", "b.pth")
    zoo = tmp_path / "zoo" / "zoo.yaml"
    zoo.write_text("checkpoints:\n  - {name: 'A, long', path: a/final.pth}\n  - path: ../b.pth\n")
    first, second = read_zoo(zoo)
    assert (first.name, first.path) == ("A, long", a)
    assert (second.name, second.path) == ("b", b)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("checkpoints: [", "YAML"),
        ("- a.pth", "list"),
        ("models: []", "models"),
        ("checkpoints: []", "empty list"),
        ("checkpoints: [{path: a.pth, weight: 2}]", "weight"),
        ("checkpoints: [a.pth]", "entry 1"),
        ("checkpoints: [{path: a.pth}, {path: gone.pth}]", "gone.pth"),
        ("checkpoints: [{path: a.pth, name: x}, {path: b.pth, name: x}]", "x twice"),
        ("checkpoints: [{path: a.pth, name: 3}]", "named 3"),
        ("checkpoints: [{path: a.pth}, {path: a.pth}]", "a.pth"),
        ("checkpoints: [{path: a.pth, path: b.pth}]", "stands twice"),
    ],
)
def test_bad_zoo_files(tmp_path: Path, content: str, problem: str) -> None:
    _touch(tmp_path, "a.pth", "b.pth")
    zoo = tmp_path / "zoo.yaml"
    zoo.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_zoo(zoo)
    assert problem in str(caught.value)


def test_checkpoints_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.pth"):
        name_checkpoints([tmp_path / "gone.pth"])
