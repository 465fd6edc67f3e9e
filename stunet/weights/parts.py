"""What has arrived of a file so far, and the note beside it that allows to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.files import write_json

__all__ = ["Download", "Part", "remove_part"]


@dataclass(frozen=True)
class Download:
    """A file that has arrived.

    Attributes:
        url: Where it is from, without user, password and query.
        bytes: Its length.
        etag: What the server calls this version of it.
        stated_sha256: Checksum that the server has stated, as Hugging Face does for large files.
    """

    url: str
    bytes: int
    etag: str | None
    stated_sha256: str | None


def remove_part(part: Path) -> None:
    """Remove what an unfinished download has left."""
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _note_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.part.json")


class Part:
    """What has arrived of a file, and the note about where it is from.

    Args:
        path: The file. It is removed if its note says that it is from elsewhere, or cannot be read.
        url: The address, without user, password and query.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self._note: dict[str, Any] = {}
        try:
            note = json.loads(_note_path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = None
        if isinstance(note, dict) and note.get("url") == url and path.is_file():
            self._note = note
        else:
            self.reset()

    @property
    def length(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, where the server has said."""
        total = self._note.get("total")
        return total if isinstance(total, int) else None

    @property
    def validator(self) -> str | None:
        """What ``If-Range`` takes for this version of the file, where the server has said."""
        validator = self._note.get("validator")
        return validator if isinstance(validator, str) else None

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there."""
        return self.total is not None and self.length == self.total

    def resume_headers(self) -> dict[str, str]:
        """The headers that ask for the rest; none where nothing can be said to be the same file's."""
        if not self.length or self.validator is None:
            return {}
        return {"Range": f"bytes={self.length}-", "If-Range": self.validator}

    def note(self, **changes: Any) -> None:
        """Note facts about the file, on disk."""
        self._note = {"url": self.url, **self._note, **changes}
        write_json(self._note, _note_path(self.path))

    def reset(self) -> None:
        """Forget all."""
        self._note = {}
        remove_part(self.path)

    def describe(self) -> str:
        """How much is there, in words."""
        return f"{self.length} of {self.total if self.total is not None else 'an unknown number of'} bytes"

    def finished(self) -> Download:
        """The whole file."""
        return Download(self.url, self.length, self._note.get("etag"), self._note.get("stated_sha256"))
