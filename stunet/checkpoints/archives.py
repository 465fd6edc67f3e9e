"""Files of ``torch.save``, read without running code out of them and without trusting their sizes."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from stunet.checkpoints.numpy_values import NUMPY_GLOBALS
from stunet.errors import CheckpointError

__all__ = ["load_archive"]

_MAX_METADATA_BYTES = 64 * 2**20

#: What a file of PyTorch < 1.6 begins with: its magic number as a pickle.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages

_ADMITTED = re.compile(
    r"torch\.(\w+Storage|(b?float|u?int|bool|half|double|long)\w*|device|Size)"
    r"|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set|" + "|".join(map(re.escape, NUMPY_GLOBALS))
)


def load_archive(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote, admitting tensors and plain values alone.

    In the current format tensors are mapped from the file, not loaded: reading many gigabytes costs next to nothing
    until the tensors are used. The format of PyTorch < 1.6 is read into memory.

    Args:
        path: The file.

    Returns:
        Its content, with tensors on the CPU and numpy's numbers as Python's own.

    Raises:
        CheckpointError: The file is missing, truncated, of another format, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            "missing checkpoint",
            got=path,
            expected="a file",
            remedy="Check the path.",
        )
    with path.open("rb") as file:
        legacy = file.read(len(_LEGACY_START)) == _LEGACY_START
    try:
        if not legacy and not zipfile.is_zipfile(path):
            # torch.save writes the archive's directory last, so a truncated file has none.
            raise _truncated(path)
        names = _names_in_legacy_file(path) if legacy else _names_in_zip(path)
        refused = next((name for name in names if not _ADMITTED.fullmatch(name)), None)
        if refused is not None:
            raise _unsafe(path, f"asks for {refused[:200]}")
        numpy_globals: list[Any] = [(value, name) for name, value in NUMPY_GLOBALS.items()]
        # Instances are changed only where their class is admitted by its own name.
        numpy_globals += {value for value in NUMPY_GLOBALS.values() if isinstance(value, type)}
        with torch.serialization.safe_globals(numpy_globals):
            return torch.load(path, map_location="cpu", mmap=not legacy, weights_only=True)
    except (EOFError, zipfile.BadZipFile) as error:
        raise _truncated(path) from error
    except _UNREADABLE as error:
        if legacy and re.search("EOF|pickle exhausted|not enough|but only", str(error)):
            raise _truncated(path) from error
        raise _unsafe(path, _reason(error)) from error


_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, AttributeError, ValueError, TypeError,
    OSError, OverflowError, MemoryError, struct.error, LookupError,
    AssertionError,
)  # fmt: skip


def _names_in_zip(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _unsafe(path, "(compressed entries, which torch.save never writes)")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                if entry.file_size > _MAX_METADATA_BYTES:
                    raise _unsafe(path, f"({entry.file_size} bytes beside its tensors)")
                with archive.open(entry) as file:
                    yield from _names(file)


def _names_in_legacy_file(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            yield from _names(file)


def _names(file: IO[bytes]) -> Iterator[str]:
    """What a pickle asks for, without loading it."""
    for opcode, arg, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(arg).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            yield f"the instruction {opcode.name}"  # a name that only the stack knows; torch.save writes none


def _truncated(path: Path) -> CheckpointError:
    return CheckpointError(
        "a checkpoint that is truncated, or not a checkpoint",
        got=f"{path} ({path.stat().st_size} bytes)",
        expected="a whole file written by torch.save",
        remedy="Copy or download it again; a training can continue from another checkpoint of its fold.",
    )


def _unsafe(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint that cannot be read safely",
        got=f"{path} {reason}",
        expected="tensors, numbers, strings and containers alone",
        remedy="Do not load files from sources that you do not trust. If this one is yours, copy it again.",
    )


def _reason(error: BaseException) -> str:
    # PyTorch's own message goes on to recommend loading without restraint.
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    return f"asks for {asked_for[1]}" if asked_for else f"({(str(error).strip() or 'damaged').splitlines()[0][:200]})"
