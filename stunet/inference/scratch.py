"""Where files are written until they are finished."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder for unfinished files on the file system of the predictions; those of killed processes are removed.

    Args:
        output: Folder of the predictions, made where it is missing.
    """
    output.mkdir(parents=True, exist_ok=True)
    name = f".scratch.{socket.gethostname()}."
    for folder in output.glob(f"{name}*.tmp"):
        pid = folder.name.removeprefix(name).removesuffix(".tmp")
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    folder = output / f"{name}{os.getpid()}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or on a system that does not say
        return True
    return True
