"""What ``stunet predict`` shows while it works."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from stunet.cli.console import stderr, stdout

if TYPE_CHECKING:
    from stunet.inference import Case

__all__ = ["PredictionProgress"]


class PredictionProgress:
    """Notes and finished cases on standard output, failures and a bar on standard error.

    Args:
        bar: Whether there is a bar.
        notes: Another place for the notes, where standard output is for something else.
    """

    def __init__(self, *, bar: bool, notes: Console = stdout) -> None:
        self._notes = notes
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=stderr, transient=True, disable=not bar)
        self._case: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> PredictionProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self._notes.print(text, soft_wrap=True, highlight=False, markup=False)

    def planned(self, n_cases: int, n_finished: int) -> None:
        """So many cases will be predicted; so many were before."""
        finished = f", {n_finished} are finished already" if n_finished else ""
        self.note(f"Cases to predict: {n_cases}{finished}")
        if n_cases:
            self._task = self._progress.add_task("reading and preprocessing", total=None)

    def window(self, case: Case, n_windows: int) -> None:
        """One window of a case, of so many, was predicted."""
        if self._case != case.name or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._case, self._task = case.name, self._progress.add_task(case.name, total=n_windows)
        self._progress.advance(self._task)

    def finished(self, case: Case, found: Mapping[str, object]) -> None:
        """All files of a case are written."""
        self.note(f"Predicted {case.name}: {len(found)} structure{'' if len(found) == 1 else 's'} found")

    def failed(self, case: Case, problem: str) -> None:
        """A case was given up."""
        stderr.print(f"Failed: {case.name}:", style="bold red", end=" ", highlight=False, markup=False)
        stderr.print(problem, highlight=False, markup=False, soft_wrap=True)
