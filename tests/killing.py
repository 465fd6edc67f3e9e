"""Processes killed at each moment at which something appears on disk."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from versions import replace_in_os


def run_and_kill(function: Callable[[], object], moment: int, after: bool) -> bool:
    """Run in a process that is killed before or after its nth change to the file system; whether it was."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    count = 0

    def killing(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == moment
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return change(*args, **kwargs)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    try:
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            replace_in_os(setattr, name, killing(getattr(os, name)))
        shutil.copyfile = killing(shutil.copyfile)
        function()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
