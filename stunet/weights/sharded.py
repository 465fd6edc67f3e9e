"""Sharded checkpoints: each of several processes writes its own shards of the tensors.

::

    checkpoint_latest.dcp/
        .unfinished/     while it is being written
        0007/            the newest complete one; numbers go up, and older ones are removed
            training.pth     what is no tensor of network or optimizer
            tensors.json     where the shards of each tensor lie: JSON in the place of PyTorch's pickle
            __0_0.distcp     the shards of a process
            .metadata        the same as tensors.json for PyTorch's own tools; a pickle, which is never read here

The shards are written and read by ``torch.distributed.checkpoint``, by any number of processes.
"""

import io
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor
from torch import distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from stunet.errors import CheckpointError, reading
from stunet.files import move_into_place, sync_files, temporary_path
from stunet.weights.read import describe_content, load_archive, load_tensors

SHARDED_SUFFIX = ".dcp"
"""What names of such checkpoints end with."""

_CONTENT, _INDEX, _UNFINISHED = "training.pth", "tensors.json", ".unfinished"
_DAMAGED = "a sharded checkpoint that is damaged; another checkpoint of the fold may be whole"
_Count = Annotated[int, Meta(ge=0)]


class _Shard(Struct):
    """One shard: where it lies in its tensor, and its bytes in a file."""

    offsets: list[_Count]
    sizes: list[_Count]
    file: Annotated[str, Meta(pattern=r"^__\d+_\d+\.distcp\Z")]
    start: _Count
    bytes: _Count


class _Tensor(Struct):
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"]
    size: list[_Count]
    pieces: list[_Shard]


class _Index(Struct):
    tensors: dict[str, _Tensor]


def find_version(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder like ``checkpoint_latest.dcp``; None where there is none."""
    return max(_versions(folder), default=None, key=lambda path: int(path.name))


def _versions(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdecimal()]


class ShardedSave:
    """A checkpoint that is being written while the training continues. All processes of the group make one each.

    The tensors are copied to the CPU before the constructor returns, and may change then.

    Args:
        folder: For example ``checkpoint_latest.dcp``.
        tensors: By the same names in all processes: shards of one tensor (``DTensor``), or the same tensor everywhere.
        content: What else belongs to it; rank 0's is written. Tensors and plain values.
        group: The processes; of gloo, and used by nothing else until :meth:`wait` has returned.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], group: dist.ProcessGroup
    ) -> None:
        self.folder = folder
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        writer = _Writer(folder, buffer.getvalue())
        self._future: Future[Any] = async_save(dict(tensors), storage_writer=writer, process_group=group)  # type: ignore[assignment]

    def wait(self) -> None:
        """Wait until the checkpoint is complete on the disk.

        Raises:
            CheckpointError: It could not be written; raised in all processes, and the one before is still there.
        """
        try:
            self._future.result()
        except CheckpointException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
            before = find_version(self.folder)
            rank, (cause, _) = min(error.failures.items())
            left = "" if before is None else f"; the checkpoint before, {before}, is whole"
            text = f"{self.folder} could not be written, {cause} (rank {rank}){left}: make room, then continue with --c"
            raise CheckpointError(text) from error


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
        """Write this process's shards."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # What the system said, upon which ``torch.save`` says that a position in the file is not as expected.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, once all have written their shards (fsync): make it complete."""
        super().finish(metadata, results)
        unfinished = self._folder / _UNFINISHED
        (unfinished / _CONTENT).write_bytes(self._content)
        (unfinished / _INDEX).write_bytes(_index(metadata))
        sync_files([unfinished / _CONTENT, unfinished / _INDEX])
        before = _versions(self._folder)
        number = 1 + max([0, *(int(path.name) for path in before)])
        move_into_place(unfinished, self._folder / f"{number:04d}")
        for path in before:  # what cannot go now goes next time
            shutil.rmtree(path, ignore_errors=True)


def read_sharded(version: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content that was given to :class:`ShardedSave`, and its tensors without data (``meta``).

    Raises:
        CheckpointError: Damaged, or asks for code to be run.
    """
    content = load_archive(path := version / _CONTENT)
    if not isinstance(content, dict) or not isinstance(content.get("current_epoch"), int):
        raise CheckpointError(f"{path} holds {describe_content(content)}: continue from another checkpoint")
    index = _read_index(version / _INDEX).state_dict_metadata
    shapes: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, entry in index.items()
    }
    return content, shapes


def load_sharded(version: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, full ones or shards (``DTensor``), by name; each process reads what it needs without the others.

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
        said = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        raise CheckpointError(f"{version}, {_DAMAGED}: {said}") from error


class _Reader(FileSystemReader):
    """PyTorch's, with its pickled table of contents left aside, and shards that the restricted reader reads."""

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
                shard = load_tensors(io.BytesIO(data), data, path)
                piece = narrow_tensor_by_index(shard, item.storage_offsets, item.lengths)
                planner.resolve_tensor(item).detach().copy_(piece)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done


def _index(metadata: Metadata) -> bytes:
    index = _Index({})
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, dcp.TensorStorageMetadata), name
        dtype: Any = str(entry.properties.dtype).removeprefix("torch.")
        index.tensors[name] = tensor = _Tensor(dtype, list(entry.size), [])
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            shard = list(chunk.offsets), list(chunk.sizes)
            tensor.pieces.append(_Shard(*shard, place.relative_path, place.offset, place.length))
    return msgspec.json.encode(index)


def _read_index(path: Path) -> Metadata:
    """Read the index, compare it with the files beside it, and return what PyTorch's planner wants to know."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    lengths = {file.name: file.stat().st_size for file in path.parent.glob("*.distcp")}
    with reading(path, _DAMAGED):
        for name, tensor in msgspec.json.decode(path.read_bytes(), type=_Index).tensors.items():
            dtype, size, chunks = getattr(torch, tensor.dtype), torch.Size(tensor.size), []
            for piece in tensor.pieces:
                if (end := piece.start + piece.bytes) > (length := lengths.get(piece.file, 0)):
                    raise ValueError(f"{piece.file} has {length} bytes instead of {end} at least")
                ends = [offset + n for offset, n in zip(piece.offsets, piece.sizes, strict=True)]
                if any(end > n for end, n in zip(ends, size, strict=True)):
                    raise ValueError(f"a shard of {name} that lies outside of it")
                if math.prod(piece.sizes) * dtype.itemsize > piece.bytes:
                    raise ValueError(f"{name} is larger than its file")
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
                places[MetadataIndex(name, chunks[-1].offsets)] = _StorageInfo(piece.file, piece.start, piece.bytes)
            filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
            if len({chunk.offsets for chunk in filled}) < len(filled):
                raise ValueError(f"two shards of {name} at one place")
            if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(size):
                raise ValueError(f"shards of {name} that do not make it up")
            entries[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), size, chunks)
    return Metadata(entries, storage_data=places)


def remove_sharded(folder: Path) -> None:
    """Remove a folder like ``checkpoint_latest.dcp``, at no moment half of it."""
    removed = temporary_path(folder)  # which stunet.files.remove_leftovers finds where this process is killed
    shutil.rmtree(removed, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)
