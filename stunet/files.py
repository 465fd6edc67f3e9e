"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stunet.errors import UsageError

__all__ = [
    "atomic_folder",
    "atomic_path",
    "clone_or_copy",
    "file_sha256",
    "move_into_place",
    "place_files",
    "read_json",
    "refuse_existing",
    "remove_leftovers",
    "start_sync",
    "sync_files",
    "write_json",
    "write_json_files",
]

_MAX_JSON_BYTES = 8 * 2**20
_FICLONE = 0x40049409  # <linux/fs.h>


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The content is on disk (fsync) before it is renamed, and so is the rename before the block is left: after a crash
    at any moment ``path`` holds either the old content or the new. An error inside the block leaves ``path`` untouched
    and removes the temporary file; a killed process leaves it behind for :func:`remove_leftovers`.

    Args:
        path: Where the finished file shall be. Its folder must exist.

    Yields:
        The path to write to, on the same file system.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_into_place(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a finished file its name; its content is on disk (fsync) before, and the name is on disk after.

    Args:
        temporary: The finished file.
        path: Where it shall be, on the same file system. A file that stands there is replaced.
    """
    sync_files([temporary])
    place_files([(temporary, path)])


def start_sync(path: str | os.PathLike[str]) -> None:
    """Make the system begin to write a file to the disk, where it can be told to, so that syncing it takes less."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Linux writes what it shall forget. What it cannot forget yet, because it is not written, it keeps.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sync_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Wait until the contents of files are on disk (fsync)."""
    paths = list(paths)
    for path in paths if len(paths) > 1 else ():
        start_sync(path)
    for path in paths:
        _fsync(Path(path), os.O_RDWR)


def place_files(files: Iterable[tuple[str | os.PathLike[str], str | os.PathLike[str]]]) -> None:
    """Give files whose contents are on disk their names, in this order; the names are on disk when it returns.

    Args:
        files: Present and final path of each, on the same file system. Files that stand there are replaced.
    """
    folders: dict[Path, None] = {}
    for temporary, path in files:
        os.replace(temporary, path)
        folders[Path(path).parent] = None
    for folder in folders:
        _fsync_folder(folder)


def clone_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a file's content; where the file system can (Btrfs, XFS), the two share their blocks until one changes."""
    with suppress(ImportError, OSError):
        import fcntl  # not on Windows

        with Path(source).open("rb") as old, Path(target).open("wb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return
    shutil.copyfile(source, target)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block ends without an error.

    All files and folders in it are on disk (fsync) before it is renamed. An error inside the block, a full disk for
    example, removes the temporary folder with all that is in it.

    Args:
        path: Where the finished folder shall be. Folders above it are made where they are missing.

    Yields:
        An empty folder to write to, on the same file system.

    Raises:
        UsageError: Something stands at ``path``, before the block or after it.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        folders = [temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())]
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file, os.O_RDWR)
        for folder in folders:
            _fsync_folder(folder)
        refuse_existing(path)  # a rename would silently replace an empty folder
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_folder(path.parent)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Check that nothing stands where an output shall be.

    Raises:
        UsageError: Something does, be it a broken link.
    """
    if os.path.lexists(path):
        raise UsageError(
            "an output that exists",
            got=os.fspath(path),
            expected="a path where nothing stands",
            remedy="Choose another one with -o, or remove it.",
        )


def remove_leftovers(folder: str | os.PathLike[str], name: str) -> list[Path]:
    """Remove what :func:`atomic_path` left behind in ``folder`` when its process was killed.

    Only call this where no other process can be writing: a live temporary file looks the same.

    Args:
        folder: The folder to clean, not searched recursively.
        name: Name of the finished files, may be a glob pattern such as ``checkpoint_*.pth``.

    Returns:
        The files that were removed.
    """
    leftovers = sorted(Path(folder).glob(f".{name}.*.tmp"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object out of a file of others', of a bearable size.

    Raises:
        ValueError: It is not, or no JSON; callers wrap this in :func:`stunet.errors.reading`.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, more than {_MAX_JSON_BYTES}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} instead of a JSON object")
    return content


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write ``content`` as JSON with nnU-Net's indentation, whole or not at all."""
    write_json_files({Path(path): content})


def write_json_files(contents: Mapping[Path, Any]) -> None:
    """:func:`write_json` for several files in one folder, which waits for the disk once: they appear in this order."""
    files = {path.with_name(f".{path.name}.{os.getpid()}.tmp"): path for path in contents}
    try:
        for temporary, path in files.items():
            text = json.dumps(contents[path], indent=4, sort_keys=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
        sync_files(files)
        place_files(files.items())
    except BaseException:
        for temporary in files:
            temporary.unlink(missing_ok=True)
        raise


def _fsync_folder(folder: Path) -> None:
    # Windows cannot open a folder, and some network file systems cannot fsync one; the files in it are safe by now.
    with suppress(OSError):
        _fsync(folder, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
