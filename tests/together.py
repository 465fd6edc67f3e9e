"""Functions in several processes that form a group, as under torchrun.

What is slow about such tests is to import PyTorch. So the processes are forked from one that has imported it, and have
imported nothing of nnU-Net or of this package, which read the environment when they are imported.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing as mp

if TYPE_CHECKING:
    from stunet.training.distributed import Ranks

IMPORTED_BEFORE = ["torch._dynamo", "torch.distributed.fsdp", "seaborn", "SimpleITK", "nibabel", "sklearn", "skimage"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def together(size: int, folder: Path, function: Callable[[Ranks, str], Any]) -> list[Any]:
    """What ``function(ranks, folder)`` returns in each of some processes."""
    get_context("forkserver").set_forkserver_preload(IMPORTED_BEFORE)
    group = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**os.environ, **{name: str(value) for name, value in group.items()}}
    arguments = (environment, str(folder), pickle.dumps(function))
    mp.start_processes(_work, arguments, size, start_method="forkserver")
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, environment: dict[str, str], folder: str, pickled: bytes) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    from stunet.training.distributed import Ranks, process_group

    ranks, function = Ranks.from_environment(), pickle.loads(pickled)  # our own
    with process_group(ranks, "cpu", 300):
        torch.save(function(ranks, folder), f"{folder}/rank_{rank}.pt")
