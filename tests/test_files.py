from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stunet.errors import UsageError
from stunet.files import atomic_folder, atomic_path, read_json, remove_leftovers, write_json, write_json_files


def test_content_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_the_old_content_and_a_removable_file(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint_latest.pth"
    target.write_text("old")
    code = (
        "import os, signal, sys; from stunet.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == -9
    assert target.read_text() == "old"
    (leftover,) = remove_leftovers(tmp_path, "checkpoint_*.pth")
    assert leftover.name.startswith(".checkpoint_latest.pth.")
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deeper" / "model"
    with atomic_folder(target) as temporary:
        (temporary / "fold_0").mkdir()
        (temporary / "fold_0" / "a").write_text("new")
        assert not target.exists()
    assert (target / "fold_0" / "a").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "fold_0").mkdir()
            (temporary / "fold_0" / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    def write(create_late: bool) -> None:
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "new").touch()
            if create_late:
                (tmp_path / "model").mkdir()

    for create_late in (True, False):
        with pytest.raises(UsageError, match="an output that exists"):
            write(create_late)
        assert list(tmp_path.iterdir()) == [tmp_path / "model"]
        assert list((tmp_path / "model").iterdir()) == []


def test_json_keeps_order_and_unicode(tmp_path: Path) -> None:
    content = {"z": 1, "a": ["ä", None]}
    write_json(content, tmp_path / "x.json")
    assert list(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))) == ["z", "a"]


def test_json_files_appear_in_order_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        write_json_files({tmp_path / "a.json": 1, tmp_path / "b.json": object()})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]
    placed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (placed.append(new.name), replace(old, new)))
    write_json_files({tmp_path / "b.json": [1], tmp_path / "a.json": {"x": 2}})
    assert placed == ["b.json", "a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_the_description_of_a_large_union_is_read(tmp_path: Path) -> None:
    content = {"dataset": {f"D101_s{i:06d}": {"images": ["x" * 500], "label": "y" * 500} for i in range(10_000)}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "dataset.json") == content
