"""The exceptions that stunet raises for its users.

::

    STUNetError
    ├── ArchitectureError   a size, depth, width, stride or input that no STU-Net can have
    ├── SettingsError       a training setting that is unknown or out of range
    ├── PlansError          a plans file that is missing, unreadable, outdated or in conflict
    ├── DatasetError        a dataset that is unknown, incomplete or malformed
    ├── LabelError          a list of label names that is malformed or does not fit the outputs
    ├── LossError           logits, target or annotation that a loss cannot take
    ├── TransferabilityError  features, labels or scores that no transferability metric can take
    ├── NnUNetPathError     one of nnU-Net's environment variables is missing or points nowhere
    ├── CheckpointError     a checkpoint that is truncated, foreign or does not fit
    ├── DownloadError       a download that failed, or that no program can do
    ├── UsageError          an argument that a command cannot take
    └── CommandError        a command that stunet ran for the user has failed

Each says what was got, what was expected and what to do about it. The command line prints exactly that, without a
traceback, and exits with status 2.
"""

from __future__ import annotations

__all__ = [
    "ArchitectureError",
    "CheckpointError",
    "CommandError",
    "DatasetError",
    "DownloadError",
    "LabelError",
    "LossError",
    "NnUNetPathError",
    "PlansError",
    "STUNetError",
    "SettingsError",
    "TransferabilityError",
    "UsageError",
]


class STUNetError(Exception):
    """Base class of all errors that stunet raises on purpose.

    Args:
        problem: One short sentence without a full stop.
        got: What was found, short enough for one line.
        expected: What would have been right.
        remedy: What the user can do, as an imperative sentence.
    """

    def __init__(self, problem: str, *, got: object, expected: str, remedy: str) -> None:
        self.problem = problem
        self.got = str(got)
        self.expected = expected
        self.remedy = remedy
        # All four as args, so that the exception survives pickling between processes.
        super().__init__(problem, self.got, expected, remedy)

    def __str__(self) -> str:
        return f"{self.problem}\n  got:      {self.got}\n  expected: {self.expected}\n  remedy:   {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), *self.args)


def _rebuild(cls: type[STUNetError], problem: str, got: str, expected: str, remedy: str) -> STUNetError:
    return cls(problem, got=got, expected=expected, remedy=remedy)


class ArchitectureError(STUNetError, ValueError):
    """A size, depth, width, stride or input shape that no STU-Net can have."""


class SettingsError(STUNetError, ValueError):
    """A training setting that is unknown, of the wrong type or out of range."""


class PlansError(STUNetError):
    """A plans file that is missing, unreadable, outdated or in conflict with what was asked for."""


class DatasetError(STUNetError):
    """A dataset that is unknown, incomplete or malformed."""


class LabelError(STUNetError, ValueError):
    """A list of label names that is malformed or does not fit the network's outputs."""


class LossError(STUNetError, ValueError):
    """Logits, target or annotation that do not fit together, or labels that no output stands for."""


class TransferabilityError(STUNetError, ValueError):
    """Features, labels or scores that no transferability metric can take."""


class NnUNetPathError(STUNetError):
    """One of nnU-Net's environment variables is missing or points nowhere."""


class CheckpointError(STUNetError):
    """A checkpoint that is truncated, not a checkpoint, or does not fit the network."""


class DownloadError(STUNetError):
    """A download that failed, or that no program can do."""


class UsageError(STUNetError):
    """An argument that a command cannot take."""


class CommandError(STUNetError):
    """A command that stunet ran for the user has failed."""
