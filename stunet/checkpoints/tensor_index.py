"""Where the pieces of tensors lie in the files of a sharded checkpoint, as JSON instead of PyTorch's pickle."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stunet.errors import CheckpointError
from stunet.files import sync_files

__all__ = ["read_index", "write_index"]

_FILE = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


@dataclass(frozen=True)
class _Place:
    """Bytes of a file; what ``FileSystemReader`` wants to know."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def write_index(path: Path, metadata: Metadata) -> None:
    """Write the index of a checkpoint of tensors; its content is on disk (fsync) afterwards.

    Args:
        path: The file.
        metadata: What ``FileSystemWriter.finish`` has made of the results of all processes.
    """
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        pieces = []
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            pieces.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
            )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(entry.size), "pieces": pieces}
    path.write_text(json.dumps({"tensors": tensors}), encoding="utf-8")
    sync_files([path])


def read_index(path: Path) -> Metadata:
    """Read the index and compare it with the files beside it.

    Returns:
        What PyTorch's planner and reader want to know.

    Raises:
        CheckpointError: Missing, damaged, or files that are shorter than it says.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _Place] = {}
    lengths = {file.name: file.stat().st_size for file in path.parent.glob("*.distcp")}
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        for name, tensor in tensors.items():
            dtype, size = _DTYPES[tensor["dtype"]], _numbers(tensor["size"])
            chunks = []
            for piece in tensor["pieces"]:
                chunk = ChunkStorageMetadata(_numbers(piece["offsets"]), _numbers(piece["sizes"]))
                start, length = _numbers([piece["start"], piece["bytes"]])
                _check_piece(piece["file"], start + length, lengths)
                if math.prod(chunk.sizes) * dtype.itemsize > length:
                    raise ValueError(f"{name} is larger than its file")
                chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets)] = _Place(piece["file"], start, length)
            _check_cover(name, size, chunks)
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "a sharded checkpoint that is damaged",
            got=f"{path}: {str(error)[:200] or type(error).__name__}",
            expected="what stunet train wrote",
            remedy="Continue from another checkpoint of the fold.",
        ) from error
    return Metadata(entries, storage_data=places)


def _numbers(values: Any) -> torch.Size:
    if not isinstance(values, list) or any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise ValueError(f"{str(values)[:60]} are no sizes")
    return torch.Size(values)


def _check_piece(file: Any, end: int, lengths: dict[str, int]) -> None:
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ValueError(f"{str(file)[:60]} is no name of a file with tensors")
    if file not in lengths:
        raise ValueError(f"{file} is missing")
    if end > lengths[file]:
        raise ValueError(f"{file} has {lengths[file]} bytes instead of {end} at least")


def _check_cover(name: str, size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """All pieces lie in the tensor, no two of them at one place, and have as many elements as it."""
    for chunk in chunks:
        ends = [offset + n for offset, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > n for end, n in zip(ends, size, strict=True)):
            raise ValueError(f"a piece of {name} that lies outside of it")
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if len({chunk.offsets for chunk in filled}) < len(filled):
        raise ValueError(f"two pieces of {name} at one place")
    if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(size):
        raise ValueError(f"pieces of {name} that do not make it up")
