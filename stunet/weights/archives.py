"""Files of ``torch.save``, read without running code out of them and without trusting their sizes.

The pickle in them is read by :mod:`stunet.weights.pickles`, and every tensor's bytes are a range of the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from stunet.errors import CheckpointError, reading
from stunet.files import file_sha256
from stunet.weights.pickles import Refused, check_extent, run_pickle

__all__ = ["MODEL_CARD", "load_archive", "load_tensors"]

MODEL_CARD = "model_card.json"
"""In a model folder: the checksums of its checkpoints, among others."""

_MAX_METADATA_BYTES = 64 * 2**20
_SHARING = 4
"""nnU-Net's networks name each weight up to four times: decoders own the encoder, blocks list their layers twice."""

_DAMAGED = "a checkpoint that is truncated or damaged, or not a checkpoint"
_WHOLE = "a whole file written by torch.save"
_COPY_AGAIN = "Copy or download it again; a training can continue from another checkpoint of its fold."

#: What a file of PyTorch < 1.6 begins with: its magic number as a pickle.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Storage:
    """Numbers of one type out of the file, which tensors are views of."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


def load_archive(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote, admitting tensors and plain values alone.

    Tensors are mapped from the file, not loaded. The checksum of each member is compared, and where a model folder's
    card notes the SHA-256 of its checkpoint, that one.

    Args:
        path: The file.

    Returns:
        Its content, with tensors on the CPU and numpy's numbers as Python's own.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, of another format, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("missing checkpoint", got=path, expected="a file", remedy="Check the path.")
    _check_card(path)
    with path.open("rb") as file:
        with reading(path, _DAMAGED, expected=_WHOLE, remedy=_COPY_AGAIN):  # an empty file cannot be mapped
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return load_tensors(file, buffer, path)


def load_tensors(file: IO[bytes], buffer: Any, path: Path) -> Any:
    """:func:`load_archive` of a file that is open.

    Args:
        file: The file.
        buffer: Its bytes, which tensors will be views of.
        path: For messages.
    """
    legacy = buffer[: len(_LEGACY_START)] == _LEGACY_START
    try:
        with reading(path, _DAMAGED, expected=_WHOLE, remedy=_COPY_AGAIN):
            return check_extent((_read_legacy if legacy else _read_zip)(file, buffer), _SHARING * len(buffer) + 2**26)
    except Refused as refused:
        raise CheckpointError("a checkpoint that cannot be read safely", got=f"{path} {str(refused)[:300]}",
                              expected="tensors, numbers, strings and containers alone",
                              remedy="Do not load files from sources that you do not trust. If this one is yours, copy "
                              "it again.") from None  # fmt: skip


def _read_zip(file: IO[bytes], buffer: Any) -> Any:
    if not zipfile.is_zipfile(file):
        raise EOFError(f"{len(buffer)} bytes without the directory that torch.save writes last")
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        if any(e.compress_type or e.flag_bits & 1 or e.compress_size != e.file_size for e in members.values()):
            raise Refused("compressed entries, which torch.save never writes", "has")
        if len(members) < len(archive.infolist()) or sum(e.file_size for e in members.values()) > len(buffer):
            raise Refused("members that share their names or bytes", "has")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged[:100]} does not have its checksum (CRC-32)")

    def record(name: str) -> tuple[int, int]:
        entry = members[name]
        lengths = struct.unpack_from("<HH", buffer, entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(lengths)
        return start, start + entry.file_size

    content = [name for name in members if name.endswith("/data.pkl")]
    if len(content) != 1:
        raise Refused("a zip file that torch.save did not write", "is")
    folder = content[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and buffer[slice(*record(f"{folder}byteorder"))] != sys.byteorder.encode():
        raise Refused("another byte order than this machine", "has")
    return run_pickle(
        BytesIO(_metadata(buffer, *record(content[0]))),
        _NAMES,
        _storages(buffer, lambda key: record(f"{folder}data/{key}")),
    )


def _read_legacy(file: IO[bytes], buffer: Any) -> Any:
    """Magic number, version and system, the content, the storages' keys, and for each its length and numbers."""
    stream = BytesIO(_metadata(buffer, 0, min(len(buffer), _MAX_METADATA_BYTES)))
    for _ in range(3):
        run_pickle(stream)
    start = stream.tell()
    sizes: dict[str, int] = {}

    def note(identity: Any) -> _Storage:
        dtype, key, n = _identity(identity)
        if sizes.setdefault(key, n * dtype.itemsize) != n * dtype.itemsize:
            raise ValueError("one storage of two sizes")
        return _Storage(torch.empty(n, dtype=dtype, device="meta"))

    run_pickle(stream, _NAMES, note)
    ranges: dict[str, tuple[int, int]] = {}
    keys = run_pickle(stream)
    position = stream.tell()
    for key in keys:
        ranges[key] = position + 8, position + 8 + sizes[key]
        position += 8 + sizes[key]
    if position > len(buffer):
        raise EOFError(f"{len(buffer)} bytes of {position}")
    stream.seek(start)
    return run_pickle(stream, _NAMES, _storages(buffer, ranges.__getitem__))


def _metadata(buffer: Any, start: int, end: int) -> bytes:
    if end - start > _MAX_METADATA_BYTES:
        raise Refused(f"{end - start} bytes beside its tensors", "has")
    return bytes(buffer[start:end])


def _identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and length of a storage, as PyTorch's persistent ids say them."""
    kind, dtype, key, _, n, *view = identity
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or any(view):
        raise Refused("something else than storages of numbers")
    if type(n) is not int or not 0 <= n < 2**48:
        raise Refused("a storage of an impossible size", "has")
    return dtype, key, n


def _storages(buffer: Any, find: Callable[[str], tuple[int, int]]) -> Callable[[Any], _Storage]:
    """What makes storages of ranges of the file; ``find`` says where they are."""
    known: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        dtype, key, n = _identity(identity)
        if key not in known:
            start, end = find(key)
            if end - start != n * dtype.itemsize:
                raise Refused(f"{end - start} bytes for a storage of {n * dtype.itemsize}", "has")
            if end > len(buffer):
                raise EOFError(f"{len(buffer)} bytes")
            numbers = torch.frombuffer(buffer, dtype=dtype, count=n, offset=start) if n else torch.empty(0, dtype=dtype)
            known[key] = _Storage(numbers.clone() if start % dtype.itemsize else numbers)
        if known[key].numbers.dtype != dtype:
            raise Refused("one storage of two types", "has")
        return known[key]

    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    if type(storage) is not _Storage or any(isinstance(value, dict) and value for value in more):
        raise Refused("a tensor of another kind than numbers out of the file")
    if len(size) > 16 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("a tensor of an impossible shape", "has")
    numbers = storage.numbers
    if math.prod(size) > numbers.numel():  # a small file that would fill the memory
        raise Refused(f"a tensor {tuple(size)}, more than its {numbers.nbytes} B", "has")
    return numbers.as_strided(tuple(size), tuple(stride), offset)


_NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.device": lambda *which: torch.device(*which),
    "torch.Size": lambda sizes: tuple(sizes),
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
}
"""What a checkpoint's pickle may name."""


def _check_card(path: Path) -> None:
    """Compare a checkpoint in ``FOLDER/fold_X`` with the SHA-256 in the folder's card, where there is one."""
    card = path.absolute().parent.parent / MODEL_CARD
    if not card.is_file():
        return
    with reading(card, remedy="Convert the weights again, or remove the file: it only describes the model."):
        noted = json.loads(card.read_text(encoding="utf-8")).get("files", {}).get(f"{path.parent.name}/{path.name}")
    if noted is not None and file_sha256(path) != noted:
        raise CheckpointError("a checkpoint that is not the one that was converted",
                              got=f"{path}, whose SHA-256 differs",
                              expected=f"{noted}, as {card} notes",
                              remedy="Convert the weights again, or copy the whole folder again.")  # fmt: skip
