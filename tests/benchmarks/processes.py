"""Running commands and watching what memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

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
