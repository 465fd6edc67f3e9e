"""One file over HTTP: resumed where it was cut, and never taken for whole when it is not."""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

import stunet
from stunet.errors import DownloadError
from stunet.weights.addresses import check_url, clean_url
from stunet.weights.parts import Download, Part, remove_part

__all__ = ["ATTEMPTS", "download"]

ATTEMPTS = 5
"""Connections in a row that may bring nothing new before a download is given up."""

_CONNECT_SECONDS = 10.0
_STALL_SECONDS = 60.0
_LONGEST_PAUSE = 30.0
_CHUNK_BYTES = 2**16  # what a cut can lose: a piece that is not whole is not handed out
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_FULL_DISK = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


class _CutError(Exception):
    """A connection that ended too early; another one may go on."""

    def __init__(self, reason: str, pause: float = 0) -> None:
        super().__init__(reason)
        self.pause = pause


def download(
    url: str,
    part: Path,
    *,
    headers: Mapping[str, str] | None = None,
    expected_bytes: int | None = None,
    attempts: int = ATTEMPTS,
    stall: float = _STALL_SECONDS,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    on_retry: Callable[[str], None] = lambda reason: None,
    wait: Callable[[float], None] = time.sleep,
) -> Download:
    """Download a file, going on with what an earlier attempt has left.

    Bytes are only added to a part if the server confirms (``If-Range`` with a strong ETag, else Last-Modified) that it
    still has the same file; otherwise it starts again. The part and a note beside it stay where a download is cut,
    stopped or killed, and where the disk is full.

    Args:
        url: http or https. A user and password in it are sent, but neither shown nor noted.
        part: The file to write. Its folder must exist.
        headers: Further headers, an authorization for example.
        expected_bytes: The file's length where it is known.
        attempts: Connections in a row that may bring nothing new.
        stall: Seconds without a byte after which a connection counts as cut.
        on_progress: Called with bytes so far and, where known, in total.
        on_retry: Called with the reason before another attempt.
        wait: Called with the seconds between two attempts.

    Raises:
        DownloadError: The server refuses or cannot be reached, cuts every connection, has a file of another length, or
            the disk is full.
    """
    check_url(url)
    state = Part(part, clean_url(url))
    failures, best = 0, state.length
    while True:
        try:
            return _attempt(url, state, dict(headers or {}), expected_bytes, stall, on_progress)
        except _CutError as cut:
            # Only what goes beyond all earlier attempts counts as progress, or a server that changes the file each
            # time would be asked for ever.
            failures = 1 if state.length > best else failures + 1
            best = max(best, state.length)
            if failures >= attempts:
                raise _given_up(state, cut, failures, best) from cut
            pause = max(cut.pause, min(0.5 * 2 ** (failures - 1), _LONGEST_PAUSE))
            on_retry(f"{cut}; {state.describe()}, again in {pause:g} s")
            wait(pause)


def _attempt(
    url: str,
    state: Part,
    headers: dict[str, str],
    expected_bytes: int | None,
    stall: float,
    on_progress: Callable[[int, int | None], None],
) -> Download:
    """One connection."""
    if state.is_whole:
        return state.finished()
    headers |= {"Accept-Encoding": "identity", "User-Agent": f"stunet/{stunet.__version__}"}
    headers |= state.resume_headers()
    with (
        _network_errors_are_cuts(),
        requests.get(url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, stall)) as response,
    ):
        start = _check_response(response, url, state)
        with _disk_errors_are_explained(state):
            _begin(response, state, start)
            _check_length(state, expected_bytes)
            _receive(response, state, start, on_progress)
    if state.total is not None and state.length < state.total:
        raise _CutError("the connection was closed")
    state.note(total=state.length)
    return state.finished()


def _check_response(response: requests.Response, url: str, state: Part) -> int:
    """From which byte on the server sends the file."""
    status = response.status_code
    plain = next((r.url for r in (*response.history, response) if not r.url.lower().startswith("https:")), None)
    if plain is not None and url.lower().startswith("https:"):
        raise _refused(state.url, f"a redirect to {clean_url(plain)}", "https all the way")
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        same = _validator(response) in (None, state.validator)
        same &= match is None or state.total is None or match[2] in ("*", str(state.total))
        if match and same and int(match[1]) == state.length:
            return state.length
    if status in (206, 416):  # another place than asked for, or a part longer than the file
        state.reset()
        raise _CutError("the server has another file, or another length, than before")
    if status in _RETRIED:
        raise _CutError(f"the server answers {status} {response.reason}", _retry_after(response))
    if status != 200:
        remedy = {
            401: "The file is not public: use --hf after `hf auth login`, or an address with user and password.",
            403: "The file is not public, or its link has run out: open the page in a browser.",
        }.get(status, "Check the address, or give another one with --url or --hf.")
        raise _refused(state.url, f"the server answers {status} {response.reason}", "200 OK", remedy)
    return 0


def _begin(response: requests.Response, state: Part, start: int) -> None:
    """Note what is needed to go on later, before the first byte is written."""
    if start:
        return
    state.path.write_bytes(b"")  # before the note, lest the bytes of one file go with the note of another
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    length = response.headers.get("Content-Length", "")
    state.note(
        total=int(length) if length.isdecimal() and not encoded else None,
        # A part of an encoded file cannot be gone on with: its bytes are not those that a range counts.
        validator=None if encoded else _validator(response),
        etag=response.headers.get("ETag"),
        stated_sha256=_stated_sha256(response),
    )


def _check_length(state: Part, expected_bytes: int | None) -> None:
    if expected_bytes is not None and state.total not in (None, expected_bytes):
        total = state.total
        remove_part(state.path)
        raise _refused(state.url, f"a file of {total} bytes", f"the file of {expected_bytes} bytes")
    missing = (state.total or 0) - state.length
    free = shutil.disk_usage(state.path.parent).free
    if missing > free:
        raise _full_disk(state, f"{free} bytes are free")


def _receive(
    response: requests.Response, state: Part, start: int, on_progress: Callable[[int, int | None], None]
) -> None:
    done = start
    on_progress(done, state.total)
    with state.path.open("ab") as file:
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            on_progress(done, state.total)


@contextmanager
def _disk_errors_are_explained(state: Part) -> Iterator[None]:
    try:
        yield
    except requests.RequestException:
        raise  # which is an OSError too
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL_DISK:
            raise _full_disk(state, reason) from error
        raise DownloadError(
            "a download that cannot be written",
            got=f"{state.path}: {reason}",
            expected="a folder that can be written to",
            remedy="Choose another one with --to, or STUNET_CACHE.",
        ) from error


@contextmanager
def _network_errors_are_cuts() -> Iterator[None]:
    try:
        yield
    except requests.RequestException as error:
        lasting = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects)
        if isinstance(error, (*lasting, requests.exceptions.SSLError)):
            url = clean_url(str(error.request.url)) if error.request is not None else "the address"
            raise _refused(url, _reason(error), "an http or https address that ends at a file") from None
        # Its own message would show the whole address, with what is secret in it.
        raise _CutError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """What the system says of a failed connection, without the address."""
    cause: Any = error
    for _ in range(10):
        inner = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
        inner = inner or next((a for a in cause.args if isinstance(a, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    said = cause.strerror if isinstance(cause, OSError) and cause.strerror else None
    words = {
        "ConnectTimeout": "no answer",
        "ReadTimeout": "no more data",
        "TooManyRedirects": "redirects in a circle",
        "ChunkedEncodingError": "the connection was cut",
        "SSLError": "no secure connection",
        "InvalidSchema": "a redirect to another scheme than http and https",
    }
    name = type(error).__name__
    return words.get(name, "no connection") + (f" ({said})" if said else "")


def _validator(response: requests.Response) -> str | None:
    """What ``If-Range`` takes: an ETag that is not weak, else a date (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _stated_sha256(response: requests.Response) -> str | None:
    """Hugging Face states the SHA-256 of large files in the answer that redirects to them."""
    for answer in (*response.history, response):
        stated = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", stated):
            return stated
    return None


def _retry_after(response: requests.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), 2 * _LONGEST_PAUSE) if seconds.isdecimal() else 0


def _given_up(state: Part, cut: _CutError, failures: int, best: int) -> DownloadError:
    if not best:
        return DownloadError(
            "a server that cannot be reached, or sends nothing",
            got=f"{state.url}: {cut}, {failures} attempts",
            expected="a server that sends the file",
            remedy="Check the connection and the address, or give another one with --url or --hf.",
        )
    return DownloadError(
        "a download that was cut again and again",
        got=f"{state.url}: {cut}; {state.describe()}, {failures} attempts in a row without progress",
        expected="a server that sends the whole file",
        remedy="Try again later: it goes on from there. Or give another address with --url or --hf.",
    )


def _refused(url: str, got: str, expected: str, remedy: str | None = None) -> DownloadError:
    return DownloadError(
        "a download that is refused",
        got=f"{url}: {got}",
        expected=expected,
        remedy=remedy or "Check the address, or give another one with --url or --hf.",
    )


def _full_disk(state: Part, reason: str) -> DownloadError:
    return DownloadError(
        "no room for a download",
        got=f"{state.path.parent}: {reason}; {state.describe()}",
        expected="room for the whole file",
        remedy="Make room and fetch again: it goes on from there. Or choose another place with --to or STUNET_CACHE.",
    )
