"""Spreading work over processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from stunet.errors import CommandError, STUNetError

__all__ = ["Worker", "end_with_children", "run_jobs", "worthwhile_processes"]

_MOST_PROCESSES = 8  # by default: each needs memory, and what they read comes from one disk

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, num_processes: int
) -> Iterator[tuple[Job, Result | STUNetError]]:
    """Call a function on each job and yield job and result as they are finished.

    Args:
        function: A module's function, since the processes are spawned and import it. What its module imports is
            imported by every process.
        jobs: Its arguments; must pickle, as its results must.
        num_processes: Processes to take; 1 works in this one.

    Yields:
        A job and what the function returned, or the error of ours that it raised: one bad job stops no other.

    Raises:
        CommandError: A process was killed from outside, for want of memory for example.
    """
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1:
        for job in jobs:
            yield job, _call(function, job)
        return
    executor = ProcessPoolExecutor(
        num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = {executor.submit(_call, function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise CommandError(
            "a process ended without a word",
            got=f"one of {num_processes} processes was killed",
            expected="processes that run to their end",
            remedy="Where memory has run out, take fewer processes with -np. Finished work is kept.",
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class Worker:
    """Does one job after another beside the process that it belongs to, and is replaced when it dies of one.

    Args:
        spawned: Whether it is a process of its own. Otherwise jobs are done in this one, when their result is asked
            for, which saves a process's memory and its start.
    """

    def __init__(self, *, spawned: bool) -> None:
        self._spawned = spawned
        self._executor: ProcessPoolExecutor | None = None
        self._running: Future[Any] | Callable[[], Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a job whose result nobody has asked for."""
        return self._running is not None

    def start(self, function: Callable[[Job], Any], job: Job) -> None:
        """Begin a job.

        Args:
            function: A module's function, since processes are spawned and import it.
            job: Its argument; must pickle, as its result must.
        """
        if self.busy:
            raise RuntimeError("the result of the last job was not asked for")
        if not self._spawned:
            self._running = partial(function, job)
            return
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        self._running = self._executor.submit(function, job)

    def result(self) -> Any:
        """Wait for the job and return its result, or raise what it raised.

        Raises:
            CommandError: The process was killed from outside, for want of memory for example.
        """
        running, self._running = self._running, None
        if running is None:
            raise RuntimeError("no job was started")
        if not isinstance(running, Future):
            return running()
        try:
            return running.result()
        except BrokenProcessPool:
            self.close()
            raise CommandError(
                "a process ended without a word",
                got="it was killed from outside",
                expected="a process that runs to its end",
                remedy="Where memory has run out, give a smaller --memory, or no processes with -npp 0 -nps 0.",
            ) from None

    def close(self) -> None:
        """End the process, once it has finished what it does."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None


def worthwhile_processes(size: float, *, share: float) -> int:
    """How many processes to take where the user does not say: none that works less than its start costs.

    Args:
        size: How much there is to do, in any unit.
        share: How much of it keeps a process busy for about as long as it takes to start.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MOST_PROCESSES, int(size // share)))


def end_with_children() -> None:
    """From now on, end this process's children with it; for its main thread to call, before it starts any.

    nnU-Net's augmentation runs in processes that would outlive a training that is told to end (SIGTERM). On Linux they
    end with it however it ends, SIGKILL included.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def stop(*_: object) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        sys.exit(128 + signal.SIGTERM)

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prctl is not None:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    signal.signal(signal.SIGTERM, stop)
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=in_child)


def _call(function: Callable[[Job], Result], job: Job) -> Result | STUNetError:
    try:
        return function(job)
    except STUNetError as error:
        return error


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next job for ever, and first finish the present one.
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
