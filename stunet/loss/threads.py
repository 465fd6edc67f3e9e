"""Work on the CPU spread over threads as a whole, instead of each of its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["run_in_threads"]

T = TypeVar("T")


def run_in_threads(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks, none of which needs gradients, in as many threads as PyTorch would use; their results in order.

    PyTorch's own threads wait for each other at the end of every operation. Where an operation takes a fraction of a
    millisecond and other processes want the cores too, as those that load data, nearly all time goes into waiting.
    """
    n_threads = torch.get_num_threads()
    if len(tasks) < 2 or n_threads < 2:
        return [task() for task in tasks]

    def run(task: Callable[[], T]) -> T:
        with torch.no_grad():  # a setting of each thread
            return task()

    try:
        # That each thread keeps to itself is its own setting, but also the default of threads that start later.
        with ThreadPoolExecutor(min(n_threads, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, tasks))
    finally:
        torch.set_num_threads(n_threads)
