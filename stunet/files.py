"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stunet.errors import CommandError, DatasetError, UsageError

__all__ = [
    "atomic_folder",
    "atomic_path",
    "clone_or_copy",
    "file_sha256",
    "fingerprint",
    "locked",
    "move_into_place",
    "naming_file",
    "place_files",
    "read_json",
    "refuse_existing",
    "remove_leftovers",
    "scratch_folder",
    "start_sync",
    "sync_files",
    "temporary_path",
    "write_json",
    "write_json_files",
]

_MAX_JSON_BYTES = 8 * 2**20
_GZIP_TRAILER_BYTES = 8  # checksum and length of the content
_FICLONE = 0x40049409  # <linux/fs.h>


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """Where this process writes a file or folder until it is finished: beside it, on the same file system."""
    path = Path(path)
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


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
    path, temporary = Path(path), temporary_path(path)
    try:
        with naming_file(path):
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


def fingerprint(paths: Iterable[Path], details: object = None) -> str:
    """Return a digest of files, gzip files by size and trailer, which takes a small part of the time of reading all.

    Raises:
        DatasetError: A file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(details).encode())
    for path in paths:
        try:
            if path.suffix != ".gz":  # no checksum at its end
                digest.update(file_sha256(path).encode())
                continue
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _GZIP_TRAILER_BYTES, 0))
                digest.update(size.to_bytes(8, "little") + file.read())
        except OSError as error:
            raise DatasetError(f"unreadable file {path} ({error.strerror}): check it, or leave its case out") from error
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
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        with naming_file(path):
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


def remove_leftovers(folder: str | os.PathLike[str], name: str, *, of_the_dead: bool = False) -> list[Path]:
    """Remove the unfinished files and folders that killed processes left in ``folder``; see :func:`temporary_path`.

    Args:
        folder: The folder to clean, not searched recursively.
        name: Name of the finished files, may be a glob pattern such as ``checkpoint_*.pth``.
        of_the_dead: Whether only those of processes of this machine that no longer run are removed. Needed wherever
            another process may be writing: a live temporary file looks the same.

    Returns:
        What was removed.
    """
    here = f".{glob.escape(socket.gethostname())}" if of_the_dead else ""
    leftovers = sorted(Path(folder).glob(f".{name}{here}.*.tmp"))
    if of_the_dead:
        leftovers = [path for path in leftovers if not _is_running(path.name.split(".")[-2])]
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def _is_running(pid: str) -> bool:
    if not pid.isdecimal():
        return True
    if int(pid) == os.getpid():  # left by an earlier process that had this one's id
        return False
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or on a system that does not say
        return True
    return True


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder for unfinished files within ``output``, which is made; those of killed processes are removed."""
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output, "scratch", of_the_dead=True)
    folder = temporary_path(output / "scratch")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock for the length of the block; the system releases it when the process ends, however it ends.

    Args:
        path: The lock file, which stays: whoever removed it could remove one that another process holds by now.
        doing: What only one process may do at a time, for the error.

    Raises:
        CommandError: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CommandError(
            f"another {doing}", got=f"{path} is locked", expected="one at a time", remedy="Wait until it has ended."
        ) from None
    try:
        yield
    finally:
        lock.release()


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
    files = {temporary_path(path): path for path in contents}
    try:
        for temporary, path in files.items():
            text = json.dumps(contents[path], indent=4, sort_keys=False) + "\n"
            with naming_file(path):
                temporary.write_text(text, encoding="utf-8")
        sync_files(files)
        place_files(files.items())
    except BaseException:
        for temporary in files:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Make failures to write name the file, as the system does where it cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
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
