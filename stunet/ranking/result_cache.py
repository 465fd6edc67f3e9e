"""Results of a ranking on disk, found again by the content of what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from stunet.files import file_sha256, write_json
from stunet.weights import locate_checkpoint

__all__ = ["ResultCache", "checkpoint_digest"]

#: Grows with every change of what is computed.
_FORMAT = 1


class ResultCache:
    """A folder with one JSON file for each result.

    A file appears whole or not at all, so a ranking that was killed goes on where it was. What cannot be used is
    computed again and replaced: a file of another version, or one that somebody has damaged.

    Args:
        folder: Made where it does not exist.

    Attributes:
        outdated: Files of another version of this package that were found and not used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outdated: list[Path] = []

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The result for a key, or None."""
        path = self._path(key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                self.outdated.append(path)
                return None
            result = content["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if isinstance(result, dict) and content.get("key") == json.loads(json.dumps(key)) else None

    def put(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep the result for a key."""
        write_json({"format": _FORMAT, "key": key, "result": result}, self._path(key))

    def _path(self, key: dict[str, Any]) -> Path:
        # Not of the format: results of another version shall be noticed, and replaced.
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"


def checkpoint_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint, or of the checkpoint in a model folder.

    Raises:
        CheckpointError: There is none.
    """
    return file_sha256(locate_checkpoint(path))
