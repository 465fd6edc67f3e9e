"""Spreading work over processes that must not outlive the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from threading import Thread
from typing import TypeVar

from stunet.errors import CommandError, STUNetError

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
        yield from ((job, _call(function, job)) for job in jobs)
        return
    executor = _spawn(num_processes)
    try:
        futures = {executor.submit(_call, function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise CommandError(f"one of {num_processes} processes was killed: if for want of memory, lower -np") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, num_processes: int
) -> Iterator[tuple[Job, Result | Exception]]:
    """Call a function on each job and yield job and result in the jobs' order, while later jobs are worked on.

    Args:
        function: A module's function, or a ``functools.partial`` of one; must pickle.
        jobs: Its arguments, taken one by one: as many as there are processes wait for their result to be asked for.
        num_processes: Processes beside this one; 0 works in this one.

    Yields:
        A job, and what the function returned or raised; a :class:`CommandError` where its process was killed.
    """
    if not num_processes:
        yield from ((job, _outcome(partial(function, job))) for job in jobs)
        return
    # Each process has an executor of its own: one that is killed takes no other job with it.
    executors = [_spawn(1) for _ in range(num_processes)]
    running: deque[tuple[Job, Future[Result]]] = deque()
    try:
        for i, job in enumerate(jobs):
            done = None
            if len(running) == num_processes:
                first, future = running.popleft()
                done = first, _outcome(future.result)
            try:
                running.append((job, executors[i % num_processes].submit(function, job)))
            except BrokenProcessPool:
                executors[i % num_processes] = _spawn(1)
                running.append((job, executors[i % num_processes].submit(function, job)))
            if done is not None:
                yield done
        yield from ((job, _outcome(future.result)) for job, future in running)
    finally:
        for executor in executors:
            executor.shutdown(wait=True, cancel_futures=True)


def _outcome(call: Callable[[], Result]) -> Result | Exception:
    try:
        return call()
    except BrokenProcessPool:
        return CommandError("a process was killed from outside: give a smaller --memory, or none with -npp 0 -nps 0")
    except Exception as error:
        return error


def _spawn(n_processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n_processes, mp_context=context, initializer=_end_with_parent)


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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: threads would complain of children that are gone

    parent = [os.getpid()]

    def before_fork() -> None:
        parent[0] = os.getpid()

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prctl is not None:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent[0]:  # it was killed before that
                os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=before_fork, after_in_child=in_child)


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
