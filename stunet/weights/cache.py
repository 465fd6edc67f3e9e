"""Where fetched weights lie, and the records beside them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from platformdirs import user_cache_path

from stunet.errors import CheckpointError
from stunet.files import write_json
from stunet.weights.registry import WeightsEntry, find_entry

__all__ = [
    "CACHE_VARIABLE",
    "Record",
    "cached_weights",
    "entry_folder",
    "missing_files",
    "part_path",
    "read_record",
    "write_record",
]

CACHE_VARIABLE = "STUNET_CACHE"
"""Environment variable that names the folder for fetched weights."""


@dataclass(frozen=True)
class Record:
    """What is known of a file since it was fetched, or first verified.

    Attributes:
        name: The weights that it belongs to.
        url: Where it is from, without user, password and query; None where it was put there by hand.
        date: When it was fetched or first verified, in UTC.
        bytes: Its length then.
        sha256: Its checksum then.
    """

    name: str
    url: str | None
    date: str
    bytes: int
    sha256: str


def entry_folder(name: str) -> Path:
    """The folder for the files of these weights: ``STUNET_CACHE``, else the platform's cache, then ``weights/NAME``."""
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named).expanduser() if named else user_cache_path("stunet", appauthor=False)
    return root / "weights" / name


def part_path(folder: Path, file: str) -> Path:
    """Where a file lies until it has arrived and is checked, under its own name, as readers judge by the ending."""
    return folder / ".partial" / file


def missing_files(entry: WeightsEntry, folder: Path) -> list[str]:
    """Names of the entry's files that are not in a folder."""
    return [file.file for file in entry.files if not (folder / file.file).is_file()]


def cached_weights(name: str) -> Path:
    """The file with weights that ``stunet weights fetch`` has put into the cache; their pickles lie beside it.

    Compares lengths only: ``stunet weights verify`` reads the files.

    Args:
        name: Name in the registry.

    Raises:
        CheckpointError: They are not in the cache, or a file has changed since.
        UsageError: No weights have this name.
    """
    entry, folder = find_entry(name), entry_folder(name)
    missing = missing_files(entry, folder)
    if missing:
        raise CheckpointError(
            "weights that have not been fetched",
            got=f"{name}: no {', '.join(missing)} in {folder}",
            expected=f"the files {', '.join(file.file for file in entry.files)}",
            remedy=f"Run `stunet weights fetch {name}`.",
        )
    for file in entry.files:
        path = folder / file.file
        record = read_record(path)
        expected, got = (record.bytes if record else file.bytes), path.stat().st_size
        if expected is not None and got != expected:
            raise CheckpointError(
                "a fetched file that has changed since",
                got=f"{path}: {got} bytes",
                expected=f"{expected} bytes",
                remedy=f"Run `stunet weights fetch {name} --force`.",
            )
    return folder / entry.weights_file.file


def read_record(path: Path) -> Record | None:
    """The record beside a file; None where there is none, or none that can be read."""
    try:
        content = json.loads(_record_path(path).read_text(encoding="utf-8"))
        return Record(
            name=str(content["name"]),
            url=None if content["url"] is None else str(content["url"]),
            date=str(content["date"]),
            bytes=int(content["bytes"]),
            sha256=str(content["sha256"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(path: Path, *, name: str, url: str | None, sha256: str) -> Record:
    """Note beside a file what it is now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = Record(name=name, url=url, date=now, bytes=path.stat().st_size, sha256=sha256)
    write_json(asdict(record), _record_path(path))
    return record


def remove_record(path: Path) -> None:
    """Remove the record beside a file, before another file takes its place."""
    _record_path(path).unlink(missing_ok=True)


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.record.json")
