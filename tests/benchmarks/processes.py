"""Running commands, or functions, and watching what memory they take; ratios of turns."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil


def run(line: str, environment: dict[str, str], interval: float = 3.0) -> int:
    """Run a line of shell, its output going to standard error, and return the peak memory of all its processes.

    Args:
        line: The line.
        environment: Its environment.
        interval: Seconds between looks at the memory.
    """
    scripts = str(Path(sys.executable).parent)  # this environment's commands, activated or not
    environment = {**environment, "PATH": os.pathsep.join([scripts, environment["PATH"]])}
    process = subprocess.Popen(["bash", "-c", line], env=environment, stdout=sys.stderr)
    peak, finished = 0, Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(interval):  # reading it holds up the process that is watched
            peak = max(peak, tree_memory(process.pid))

    watcher = Thread(target=watch)
    watcher.start()
    status = process.wait()
    finished.set()
    watcher.join()
    if status != 0:
        sys.exit(f"failed with status {status}: {line}")
    return peak


def tree_memory(pid: int) -> int:
    """Bytes of a process and its children; what they share is counted once (proportional set size)."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def peak_resident(work: Callable[[], Any]) -> int:
    """Bytes of this process's highest resident set while something works, beyond those before (on Linux)."""
    start = resident_before()
    work()
    return resident_set("VmHWM") - start


def resident_before() -> int:
    """Bytes of the present resident set, from which on the highest is counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would be taken first and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest to the present one
    return resident_set("VmRSS")


def resident_set(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def spread(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest ratio of turns that follow each other."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    values = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {name: round(value, 3) for name, value in values.items()}
