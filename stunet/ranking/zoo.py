"""The checkpoints to choose from: a list of paths, or a zoo file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.errors import UsageError
from stunet.forms import FormError, read_document

__all__ = ["ZooEntry", "name_checkpoints", "read_zoo"]

_KEYS = ("name", "path")


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One checkpoint to choose from.

    Attributes:
        name: What tables call it.
        path: Checkpoint file or model folder.
    """

    name: str
    path: Path


def read_zoo(path: str | os.PathLike[str]) -> list[ZooEntry]:
    """Read a zoo file.

    It is YAML (or JSON) with a list under ``checkpoints``; each entry has a ``path``, relative to the file, and may
    have a ``name``::

        checkpoints:
          - name: base, TotalSegmentator
            path: models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all/checkpoint_final.pth
          - path: other/checkpoint_best.pth

    Raises:
        UsageError: Missing, not YAML, unknown keys, a name twice, or paths at which there is nothing.
    """
    path = Path(path)
    try:
        content = read_document(path)
    except FormError as error:
        raise _refuse(path, str(error), "a YAML file") from error
    if (
        not isinstance(content, dict)
        or list(content) != ["checkpoints"]
        or not isinstance(content["checkpoints"], list)
    ):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise _refuse(path, keys or "nothing", "one key, checkpoints, with a list")
    paths = [_path(entry, index, path) for index, entry in enumerate(content["checkpoints"], start=1)]
    if not paths:
        raise _refuse(path, "an empty list", "at least one checkpoint")
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise _refuse(path, f"nothing at {', '.join(missing)}", "paths, relative to the file, of what exists")
    defaults = name_checkpoints(paths)
    entries = [
        ZooEntry(name=entry.get("name", default.name), path=default.path)
        for entry, default in zip(content["checkpoints"], defaults, strict=True)
    ]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _refuse(path, f"{', '.join(twice)} twice", "a name of its own for each checkpoint")
    return entries


def name_checkpoints(paths: Sequence[str | os.PathLike[str]]) -> list[ZooEntry]:
    """Give checkpoints short names that tell them apart: what differs in their paths.

    Raises:
        UsageError: A path twice, or nothing there.
    """
    resolved = [Path(path).resolve() for path in paths]
    if missing := [str(path) for path, full in zip(paths, resolved, strict=True) if not full.exists()]:
        raise UsageError(
            "checkpoints that are not there",
            got=", ".join(missing),
            expected="checkpoint files or model folders",
            remedy="Correct the paths; `stunet weights list` shows what can be fetched.",
        )
    if twice := sorted({str(path) for path in resolved if resolved.count(path) > 1}):
        raise UsageError("a checkpoint twice", got=", ".join(twice), expected="each once", remedy="Leave one out.")
    return [ZooEntry(name=name, path=path) for name, path in zip(_short_names(resolved), resolved, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Of each path the last parts that tell it apart, without parts that all of them have."""
    parts = [[*path.parts[1:-1], path.stem if path.is_file() else path.name] for path in paths]
    common = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    parts = [[part for part in own if part not in common] or own for own in parts]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-n:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # they differ in their suffix alone


def _path(entry: Any, index: int, zoo: Path) -> Path:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise _refuse(zoo, f"entry {index} is {entry!r:.80}", "entries with a path")
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        raise _refuse(zoo, f"entry {index} has {', '.join(unknown)}", f"only the keys {' and '.join(_KEYS)}")
    if "name" in entry and (not isinstance(entry["name"], str) or not entry["name"].strip()):
        raise _refuse(zoo, f"entry {index} is named {entry['name']!r}", "names as text")
    return (zoo.parent / Path(entry["path"]).expanduser()).resolve()


def _refuse(path: Path, got: str, expected: str) -> UsageError:
    return UsageError(
        "a zoo file that cannot be used", got=f"{path}: {got}", expected=expected, remedy="Correct the file."
    )
