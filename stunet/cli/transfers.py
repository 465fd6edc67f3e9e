"""Progress of downloads, and of what is done with them, on the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stunet.cli.console import stderr
from stunet.weights import Listener

__all__ = ["ProgressListener"]


class ProgressListener(Listener):
    """Shows on standard error what a fetch does, with a bar where that is a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressListener:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, file: str, url: str) -> None:
        """Name the file and where it is from."""
        self.note(f"Downloading {url}")
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(file, total=None)

    def progress(self, done: int, total: int | None) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def work(self, text: str) -> None:
        """Show that something is being done whose end is not known."""
        self.note(text)
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=None)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        stderr.print(text, soft_wrap=True, highlight=False, markup=False)
