"""Checkpoints that several processes write together, each its own pieces of the tensors.

::

    checkpoint_latest.dcp/
        .unfinished/     while it is being written
        0007/            the newest whole one; numbers go up, and older ones are removed
            training.pth     what is no tensor of network or optimizer
            tensors.json     where the pieces of each tensor lie: JSON in the place of PyTorch's pickle
            __0_0.distcp     the pieces of a process
            .metadata        the same as tensors.json for PyTorch's own tools; a pickle, which is never read here

The pieces are written and read by ``torch.distributed.checkpoint``, by any number of processes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from stunet.errors import CheckpointError, reading
from stunet.files import place_files, sync_files
from stunet.weights.archives import load_archive, load_tensors

__all__ = [
    "SHARDED_SUFFIX",
    "ShardedSave",
    "find_version",
    "load_sharded",
    "read_sharded",
    "remove_sharded",
    "remove_sharded_leftovers",
]

SHARDED_SUFFIX = ".dcp"
"""What names of such checkpoints end with."""

_CONTENT = "training.pth"
_INDEX = "tensors.json"
_UNFINISHED = ".unfinished"
_REMOVED = ".removed"


def find_version(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder like ``checkpoint_latest.dcp``; None where there is none."""
    return max(_versions(folder), default=None, key=lambda path: int(path.name))


def _versions(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdecimal()]


class ShardedSave:
    """A checkpoint that is being written while the training goes on. All processes of the group make one each.

    The tensors are copied to the CPU before the constructor returns, and may change then.

    Args:
        folder: For example ``checkpoint_latest.dcp``.
        tensors: By the same names in all processes: pieces of one tensor (``DTensor``), or the same tensor everywhere.
        content: What else belongs to it; rank 0's is written. Tensors and plain values.
        group: The processes; of gloo, and used by nothing else until :meth:`wait` has returned.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], group: dist.ProcessGroup
    ) -> None:
        self.folder = folder
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        future = async_save(dict(tensors), storage_writer=_Writer(folder, buffer.getvalue()), process_group=group)
        assert isinstance(future, Future)
        self._future = future

    def wait(self) -> None:
        """Wait until the checkpoint is whole on the disk.

        Raises:
            CheckpointError: It could not be written; raised in all processes, and the one before is still there.
        """
        try:
            self._future.result()
        except CheckpointException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
            before = find_version(self.folder)
            raise CheckpointError(
                "a checkpoint that could not be written",
                got=f"{self.folder}: {_first_failure(error)}",
                expected="room on the disk and the right to write there",
                remedy="Correct that and continue the training with --c"
                + ("." if before is None else f"; the checkpoint before, {before}, is whole."),
            ) from error


def _first_failure(error: CheckpointException) -> str:
    rank, failure = min(error.failures.items())
    return f"{failure[0]} (rank {rank})"


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path, content: bytes) -> None:
        super().__init__(folder / _UNFINISHED)
        self._folder = folder
        self._content = content

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:  # no other process writes before this one has seen all plans
            shutil.rmtree(self._folder / _UNFINISHED, ignore_errors=True)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this process's pieces."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _os_error(error) or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, once all have written their pieces (fsync): make it whole."""
        super().finish(metadata, results)
        unfinished = self._folder / _UNFINISHED
        (unfinished / _CONTENT).write_bytes(self._content)
        _write_index(unfinished / _INDEX, metadata)
        sync_files([unfinished / _CONTENT])
        before = _versions(self._folder)
        number = 1 + max((int(path.name) for path in before), default=0)
        place_files([(unfinished, self._folder / f"{number:04d}")])
        for path in before:  # what cannot go now goes next time
            shutil.rmtree(path, ignore_errors=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said, upon which ``torch.save`` says that a position in the file is not as expected."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_sharded(version: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is no tensor, and names, shapes and types of the tensors.

    Args:
        version: What :func:`find_version` has found.

    Returns:
        The content that was given to :class:`ShardedSave`, and tensors without data (``meta``).

    Raises:
        CheckpointError: Damaged, or asks for code to be run.
    """
    content = load_archive(version / _CONTENT)
    if not isinstance(content, dict) or not isinstance(content.get("current_epoch"), int):
        raise CheckpointError("not a sharded checkpoint", got=f"{version / _CONTENT}: a {type(content).__name__}",
                              expected="a dictionary with 'current_epoch'",
                              remedy="Continue from another checkpoint of the fold.")  # fmt: skip
    index = _read_index(version / _INDEX).state_dict_metadata
    shapes: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, entry in index.items()
    }
    return content, shapes


def load_sharded(version: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors with what a checkpoint holds by their names.

    Each process reads what it has pieces of, and does not need the others.

    Args:
        version: What :func:`find_version` has found.
        tensors: Whole ones, or pieces (``DTensor``), divided in any way.

    Raises:
        CheckpointError: Damaged, or without some of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(tensors), storage_reader=_Reader(version), no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError("a sharded checkpoint that is damaged",
                              got=f"{version}: {(str(cause).splitlines() or [type(cause).__name__])[0][:200]}",
                              expected="what stunet train wrote",
                              remedy="Continue from another checkpoint of the fold.") from error  # fmt: skip


class _Reader(FileSystemReader):
    """PyTorch's, with its pickled table of contents left aside, and pieces that the restricted reader reads."""

    def __init__(self, version: Path) -> None:
        super().__init__(version)
        self._version = version

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_index(self._version / _INDEX)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fill the tensors of a plan."""
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            path = self._version / place.relative_path
            with path.open("rb") as file:
                file.seek(place.offset)
                data = bytearray(file.read(place.length))
            with reading(path):
                piece = narrow_tensor_by_index(
                    load_tensors(io.BytesIO(data), data, path), item.storage_offsets, item.lengths
                )
                planner.resolve_tensor(item).detach().copy_(piece)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done


_FILE = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


@dataclass(frozen=True)
class _Place:
    """Bytes of a file."""

    relative_path: str
    offset: int
    length: int


def _write_index(path: Path, metadata: Metadata) -> None:
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


def _read_index(path: Path) -> Metadata:
    """Read the index and compare it with the files beside it.

    Returns:
        What PyTorch's planner and reader want to know.

    Raises:
        CheckpointError: Missing, damaged, or files that are shorter than it says.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _Place] = {}
    lengths = {file.name: file.stat().st_size for file in path.parent.glob("*.distcp")}
    with reading(path, "a sharded checkpoint that is damaged", expected="what stunet train wrote",
                 remedy="Continue from another checkpoint of the fold."):  # fmt: skip
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


def remove_sharded(folder: Path) -> None:
    """Remove a folder like ``checkpoint_latest.dcp``, at no moment half of it."""
    removed = folder.with_name(f".{folder.name}{_REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def remove_sharded_leftovers(folder: Path) -> None:
    """Remove what :func:`remove_sharded` has left when its process was killed.

    Args:
        folder: Where folders like ``checkpoint_latest.dcp`` lie.
    """
    for removed in folder.glob(f".*{SHARDED_SUFFIX}{_REMOVED}"):
        shutil.rmtree(removed, ignore_errors=True)
