"""Processes that train together: who they are, that they are all there, and that they do the same."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from stunet.errors import UsageError

__all__ = ["Ranks", "check_agreement", "check_shared_folder", "process_group", "share_of_batch"]

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Ranks:
    """Where a process stands among all that train together, as ``torchrun`` says it by environment variables.

    Attributes:
        rank: Number of the process among all, from 0.
        size: How many there are.
        local_rank: Its number on its machine.
        local_size: How many there are on its machine.
        n_restarts: How often ``torchrun`` has started them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    n_restarts: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; one process where there are none.

        Raises:
            UsageError: Some of the variables are missing, or no numbers.
        """
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if not missing:
            try:
                rank, size, local_rank, local_size = (int(environment[name]) for name in names[:4])
                return cls(rank, size, local_rank, local_size, int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")))
            except ValueError:
                pass
        raise UsageError(
            "variables of a distributed training that are incomplete",
            got=f"{', '.join(missing)} missing" if missing else ", ".join(f"{n}={environment[n]}" for n in names[:4]),
            expected=f"{', '.join(names)}, or neither RANK nor WORLD_SIZE",
            remedy="Start the processes with torchrun, or unset RANK and WORLD_SIZE.",
        )


@contextmanager
def process_group(ranks: Ranks, device_type: str, timeout: float) -> Iterator[None]:
    """Join the others: NCCL on CUDA, gloo on the CPU.

    Args:
        ranks: Where this process stands.
        device_type: ``cuda`` or ``cpu``.
        timeout: Seconds that the others have to join, and that an operation may take.

    Raises:
        UsageError: Some did not join in time, whose ranks are named; or a device without a backend.
    """
    if device_type not in _BACKENDS:
        raise UsageError(
            "several processes on a device that they cannot share",
            got=device_type,
            expected=" or ".join(_BACKENDS),
            remedy="Choose another -device, or train with one process.",
        )
    store = _join(ranks, timeout)
    dist.init_process_group(
        _BACKENDS[device_type], store=store, rank=ranks.rank, world_size=ranks.size, timeout=timedelta(seconds=timeout)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join(ranks: Ranks, timeout: float) -> Store:
    """The store of all processes, once each has written its name there."""
    # torchrun's own agent holds a store at that address already.
    is_host = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError) as error:
        raise UsageError(
            "a rendezvous that cannot be reached",
            got=f"{address}:{port}: {str(error).splitlines()[0]}",
            expected=f"rank 0 listening there within {timeout:g} s",
            remedy="Check MASTER_ADDR and MASTER_PORT (torchrun's --rdzv-endpoint), and that rank 0 runs.",
        ) from error
    joined: Store = PrefixStore(f"stunet/{ranks.n_restarts}", store)
    joined.set(f"joined/{ranks.rank}", socket.gethostname())
    _wait_for_all(joined, ranks.size, timeout)
    return joined


def _wait_for_all(store: Store, size: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    missing = list(range(size))
    while missing:
        try:
            missing = [rank for rank in missing if not store.check([f"joined/{rank}"])]
            gave_up = missing and time.monotonic() > deadline
        except dist.DistError:  # rank 0, which holds the store, has given up first
            gave_up = True
        if gave_up:
            raise UsageError(
                "processes that did not join",
                got=f"{size - len(missing)} of {size}; missing: rank {', '.join(map(str, missing))}",
                expected=f"all of them within {timeout:g} s",
                remedy="Look at what those processes have printed, or wait longer with --timeout.",
            )
        time.sleep(_POLL if missing else 0)


def share_of_batch(global_batch: int, ranks: Ranks) -> range:
    """Which samples of the whole batch are this process's; the first processes take one more where it does not divide.

    Raises:
        UsageError: There are fewer samples than processes.
    """
    if global_batch < ranks.size:
        raise UsageError(
            "a batch that is smaller than the number of processes",
            got=f"{global_batch} samples for {ranks.size} processes",
            expected=f"{ranks.size} at least",
            remedy="Give --global-batch, or batch_size in the plans, or start fewer processes.",
        )
    each, more = divmod(global_batch, ranks.size)
    first = ranks.rank * each + min(ranks.rank, more)
    return range(first, first + each + (ranks.rank < more))


def check_agreement(content: Mapping[str, Any]) -> None:
    """Compare what the processes have been given.

    Args:
        content: What must be the same everywhere, by name; anything that JSON can hold. Compared by hash.

    Raises:
        UsageError: Some differ; raised in every process, and names what and which.
    """
    mine = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in content.items()
    }
    of_all = _gather((socket.gethostname(), mine))
    problems = []
    for name in mine:
        others = [
            f"rank {rank} ({host})"
            for rank, (host, theirs) in enumerate(of_all)
            if theirs.get(name) != of_all[0][1].get(name)
        ]
        if others:
            problems.append(f"{name} of {', '.join(others)}")
    if problems:
        raise UsageError(
            "processes that would train different things",
            got=f"{'; '.join(problems)} differ from rank 0's ({of_all[0][0]})",
            expected="the same everywhere",
            remedy="Copy plans and preprocessed data to every machine anew, or put them into a folder that all share.",
        )


def check_shared_folder(folder: Path, ranks: Ranks) -> None:
    """Find out whether all processes see the same folder.

    Raises:
        UsageError: Some do not see what rank 0 writes; raised in every process, and names them.
    """
    token = _broadcast(f".{uuid4().hex}.shared" if ranks.rank == 0 else None)
    path = folder / token
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    dist.barrier()
    seen = path.exists()
    if not seen and folder.is_dir():
        list(folder.iterdir())  # network file systems keep what a folder held; listing it asks anew
        seen = path.exists()
    of_all = _gather((socket.gethostname(), seen))
    if ranks.rank == 0:
        path.unlink()
    blind = [f"rank {rank} ({host})" for rank, (host, sees) in enumerate(of_all) if not sees]
    if blind:
        raise UsageError(
            "a results folder that only some processes see",
            got=f"{folder} of rank 0 is not there for {', '.join(blind)}",
            expected="one folder that all machines share",
            remedy="Let nnUNet_results point to a shared file system on every machine.",
        )


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _broadcast(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
