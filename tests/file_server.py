"""A local HTTP server that serves files as badly as it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["FileServer", "Served", "serve"]


@dataclass
class Served:
    """One file, and how it is served.

    Attributes:
        content: Its bytes.
        etag: Its ETag; None for none.
        last_modified: Its date; None for none.
        cuts: For each answer in turn, the bytes after which the connection is cut; whole when used up.
        ranges: Whether ranges are answered.
        heed_if_range: Whether ``If-Range`` is heeded.
        length_lie: What is added to the true Content-Length.
        no_length: Chunked, without Content-Length.
        statuses: For each request in turn, a status to answer with instead; used up first.
        redirect: Where requests are sent to.
        headers: Further headers.
        authorization: The Authorization header that is asked for.
        gate: Held back in mid-file until this is set.
        half_sent: Set when the first half has been sent to a client that is held back.
    """

    content: bytes = b""
    etag: str | None = '"one"'
    last_modified: str | None = None
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    heed_if_range: bool = True
    length_lie: int = 0
    no_length: bool = False
    statuses: list[int] = field(default_factory=list)
    redirect: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    authorization: str | None = None
    gate: threading.Event | None = None
    half_sent: threading.Event = field(default_factory=threading.Event)


@dataclass
class FileServer:
    """The server's address, its files by path, and what it was asked: method, path, Range and Authorization."""

    url: str
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def ranges(self, path: str) -> list[str | None]:
        return [asked for method, got, asked, _ in self.requests if got == path and method == "GET"]


@contextmanager
def serve() -> Iterator[FileServer]:
    """Run a server for the duration of a block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.state = FileServer(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.state  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state: FileServer = self.server.state  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        state.requests.append((self.command, path, self.headers["Range"], self.headers["Authorization"]))
        self.close_connection = True
        served = state.files.get(path)
        if served is None:
            return self._empty(404)
        if served.authorization is not None and self.headers["Authorization"] != served.authorization:
            return self._empty(401)
        if served.statuses:
            return self._empty(served.statuses.pop(0), served.headers)
        if served.redirect is not None:
            return self._empty(302, {"Location": served.redirect, **served.headers})
        return self._send(served)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, served: Served) -> None:
        start, asked = 0, self.headers["Range"]
        validator = served.etag or served.last_modified
        same = not served.heed_if_range or self.headers["If-Range"] in (None, validator)
        if asked and served.ranges and same:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(served.content):
                return self._empty(416, {"Content-Range": f"bytes */{len(served.content)}"})
        body = served.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
        if served.no_length:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) + served.length_lie))
        if served.etag:
            self.send_header("ETag", served.etag)
        if served.last_modified:
            self.send_header("Last-Modified", served.last_modified)
        for name, value in served.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self._write(served, body)
        return None

    def _write(self, served: Served, body: bytes) -> None:
        cut = served.cuts.pop(0) if served.cuts else None
        body = body if cut is None else body[:cut]
        if served.length_lie < 0:
            body = body[: served.length_lie]
        try:
            if served.gate is not None:
                half = len(body) // 2
                self.wfile.write(body[:half])
                served.half_sent.set()
                served.gate.wait(60)
                body = body[half:]
            if served.no_length:
                self.wfile.write(
                    f"{len(body):x}\r\n".encode() + body + b"\r\n" + (b"" if cut is not None else b"0\r\n\r\n")
                )
            else:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass
