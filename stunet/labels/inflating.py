"""Gzip files read piece by piece and checked to their end, several times as fast as the standard library does it."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from isal import igzip_lib

__all__ = ["Inflater"]

#: Bytes read at a time: of a mask everything, as a rule.
_PIECE = 2**18
_HEADER_BYTES = 10
_FLAGS, _NAMED = 3, 8  # where a gzip header has its flags, and the one for a file name behind them


class Inflater:
    """A file open for reading that unpacks itself where it is packed; a context that closes it.

    ``isal.igzip`` does the same through buffers that take longer to make than a blank mask takes to unpack.

    Attributes:
        payload: What a small gzip file holds but for its name and time, so that equal payloads mean equal contents;
            None for large files and those that are not packed.

    Args:
        path: A gzip file of one member or several, or any other file, which is read as it is.

    Raises:
        OSError: It cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            self._input = os.read(self._descriptor, _PIECE)
            whole = len(self._input) == os.fstat(self._descriptor).st_size
        except OSError:
            os.close(self._descriptor)
            raise
        self._member: Any = None
        self.payload: bytes | None = None
        if self._input.startswith(b"\x1f\x8b"):
            self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            self.payload = _payload(self._input) if whole else None

    def __enter__(self) -> Inflater:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, n: int) -> bytes:
        """The next ``n`` bytes; fewer at the end of the content alone, whose checksum has then been found right.

        Raises:
            EOFError: A packed file that ends too early.
            isal.isal_zlib.IsalError: A packed file that is damaged.
        """
        content = self._read_some(n)
        while len(content) < n and (more := self._read_some(n - len(content))):
            content += more
        return content

    def _read_some(self, n: int) -> bytes:
        """Between 1 and ``n`` bytes, none at the end of the content."""
        if self._member is None:
            content, self._input = self._input[:n], self._input[n:]
            return content or os.read(self._descriptor, n)
        while True:
            if self._member.eof and not self._next_member():
                return b""
            if self._member.needs_input and not self._input:
                self._input = os.read(self._descriptor, _PIECE)
                if not self._input:
                    raise EOFError("ends within its packed content")
            content = self._member.decompress(self._input, n)
            self._input = b""
            if content:
                return bytes(content)

    def _next_member(self) -> bool:
        rest = self._member.unused_data.lstrip(b"\0")  # gzip allows zeros behind a member
        while not rest:
            rest = os.read(self._descriptor, _PIECE)
            if not rest:
                return False
            rest = rest.lstrip(b"\0")
        self._member, self._input = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), rest
        return True


def _payload(content: bytes) -> bytes | None:
    flags, start = content[_FLAGS : _FLAGS + 1], _HEADER_BYTES
    if flags == bytes([_NAMED]):
        start = content.find(b"\0", start) + 1
    elif flags != b"\0":
        return None
    return content[start:] if start else None
