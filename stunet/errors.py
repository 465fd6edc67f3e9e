"""The exceptions that stunet raises for its users.

Each says in one sentence what was got, what was expected and what to do about it. The command line prints exactly that,
without a traceback, and exits with status 2.
"""

import csv
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from zipfile import BadZipFile


class STUNetError(Exception):
    """Base class of all errors that stunet raises on purpose: what was got, what was expected, and the remedy."""


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


class FeatureError(STUNetError, ValueError):
    """A layer, image or point that no features can be read from, or features that are not finite."""


class DownloadError(STUNetError):
    """A download that failed, or that no program can do."""


class UsageError(STUNetError):
    """An argument that a command cannot take."""


class CommandError(STUNetError):
    """A command that stunet ran for the user has failed."""


class FormError(ValueError):
    """Why a file is not what it should be, in one line; :func:`reading` says which file, and the remedy."""


@contextmanager
def reading(
    source: object,
    problem: str = "damaged",
    kind: type[STUNetError] = CheckpointError,
    remedy: str = "copy or download it again",
) -> Iterator[None]:
    """Turn whatever the content of a file leads to into one error that names the file.

    Content of others' can have any type and value at any place. Readers check what must not be believed; everything
    else may fail where it fails, within this block.

    Args:
        source: The file.
        problem: What it is then.
        kind: The error's class.
        remedy: What the user can do.

    Raises:
        STUNetError: Of this kind; errors of this package pass as they are.
    """
    try:
        yield
    except STUNetError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
        RuntimeError, SyntaxError, TypeError, ValueError, BadZipFile, csv.Error, struct.error,
    ) as error:  # fmt: skip
        said = (str(error).strip() or "no more is known").splitlines()[0][:200]
        said = said if isinstance(error, FormError) else f"{type(error).__name__}: {said}"
        raise kind(f"{source} is {problem} ({said}): {remedy}") from error
