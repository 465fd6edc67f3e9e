"""Downloads from a server that cuts, lies, changes its mind and refuses."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer, Served, serve
from stunet.weights.addresses import check_url, clean_url, file_name_of
from stunet.weights.download import download
from stunet.weights.parts import Download, remove_part

from stunet.errors import DownloadError

CONTENT = os.urandom(3_000_000)
OTHER = os.urandom(2_500_000)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as running:
        yield running


def starts(server: FileServer, path: str = "/a.model") -> list[int]:
    """From where on the file was asked for, in pieces of 64 kB: what is not a whole piece is asked for again."""
    return [int(asked.removeprefix("bytes=").rstrip("-")) // 2**16 if asked else 0 for asked in server.ranges(path)]


def get(server: FileServer, part: Path, path: str = "/a.model", **options: Any) -> Download:
    pauses: list[float] = options.pop("pauses", [])
    return download(server.url + path, part, wait=pauses.append, **options)


def test_a_whole_file(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT)
    seen: list[tuple[int, int | None]] = []
    got = get(server, tmp_path / "a", on_progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert got == Download(f"{server.url}/a.model", len(CONTENT), '"one"', None)
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize(
    "validator", [{"etag": '"one"'}, {"etag": None, "last_modified": "Wed, 21 Oct 2015 07:28:00 GMT"}]
)
def test_a_cut_connection_is_gone_on_with(server: FileServer, tmp_path: Path, validator: dict[str, Any]) -> None:
    server.files["/a.model"] = Served(CONTENT, cuts=[1_000_000, 500_000], **validator)
    retries: list[str] = []
    get(server, tmp_path / "a", on_retry=retries.append)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert starts(server) == [0, 1_000_000 // 2**16, (1_000_000 // 2**16 * 2**16 + 500_000) // 2**16]
    assert len(retries) == 2
    assert "983040 of 3000000 bytes" in retries[0]


@pytest.mark.parametrize(
    "how",
    [
        {"ranges": False},  # ignores Range
        {"etag": None},  # nothing says that it is the same file
        {"etag": 'W/"one"'},  # a weak ETag does not say so either
    ],
)
def test_what_cannot_be_gone_on_with_starts_again(server: FileServer, tmp_path: Path, how: dict[str, Any]) -> None:
    server.files["/a.model"] = Served(CONTENT, cuts=[1_000_000], **how)
    get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("heed_if_range", [True, False])
def test_a_file_that_changed_between_two_attempts_starts_again(
    server: FileServer, tmp_path: Path, heed_if_range: bool
) -> None:
    served = server.files["/a.model"] = Served(CONTENT, cuts=[1_000_000])

    def change(_: str) -> None:
        served.content, served.etag, served.heed_if_range = OTHER, '"two"', heed_if_range

    got = get(server, tmp_path / "a", on_retry=change)
    assert (tmp_path / "a").read_bytes() == OTHER
    assert got.etag == '"two"'


def test_a_changed_file_is_noticed_by_its_length_alone(server: FileServer, tmp_path: Path) -> None:
    served = server.files["/a.model"] = Served(CONTENT, cuts=[1_000_000])

    def change(_: str) -> None:
        served.content, served.etag, served.heed_if_range = OTHER, None, False

    get(server, tmp_path / "a", on_retry=change)
    assert (tmp_path / "a").read_bytes() == OTHER


def test_a_part_goes_on_in_another_process(server: FileServer, tmp_path: Path) -> None:
    """The first is killed in mid-file, as by a power button."""
    served = server.files["/a.model"] = Served(CONTENT, cuts=[1_200_000])
    code = (
        "import os, signal, sys; from pathlib import Path; from stunet.weights.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]), on_retry=lambda _: os.kill(os.getpid(), signal.SIGKILL))"
    )
    args = [sys.executable, "-c", code, f"{server.url}/a.model", str(tmp_path / "a")]
    assert subprocess.run(args, check=False).returncode == -9
    left = (tmp_path / "a").read_bytes()
    assert len(left) > 1_100_000
    assert left == CONTENT[: len(left)]
    get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.ranges("/a.model") == [None, f"bytes={len(left)}-"]
    assert served.cuts == []


def test_a_part_of_another_address_is_not_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    server.files |= {"/a.model": Served(CONTENT, cuts=[1_000_000]), "/b.model": Served(OTHER)}
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a", attempts=1)
    get(server, tmp_path / "a", "/b.model")
    assert (tmp_path / "a").read_bytes() == OTHER
    assert server.ranges("/b.model") == [None]


def test_a_whole_part_needs_no_server(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT)
    first = get(server, tmp_path / "a")
    server.files.clear()
    assert get(server, tmp_path / "a") == first
    remove_part(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_is_too_long_is_never_taken_for_whole(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, length_lie=1000)
    pauses: list[float] = []
    with pytest.raises(DownloadError, match="again and again"):
        get(server, tmp_path / "a", attempts=4, pauses=pauses)
    assert len(server.requests) == 4
    assert pauses == [0.5, 1.0, 2.0]


def test_a_length_that_is_too_short_is_what_arrives(server: FileServer, tmp_path: Path) -> None:
    """Nothing in HTTP shows it: what is checked after the download must."""
    server.files["/a.model"] = Served(CONTENT, length_lie=-1000)
    assert get(server, tmp_path / "a").bytes == len(CONTENT) - 1000
    with pytest.raises(DownloadError, match="refused"):
        get(server, tmp_path / "b", expected_bytes=len(CONTENT))
    assert not (tmp_path / "b").exists()


def test_without_a_length(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, no_length=True, cuts=[700_000])
    get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_errors_that_pass_are_waited_for(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, statuses=[500, 503, 429])
    pauses: list[float] = []
    get(server, tmp_path / "a", pauses=pauses)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert pauses == [0.5, 1.0, 2.0]


def test_progress_starts_the_count_of_attempts_anew(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, cuts=[300_000] * 9)
    get(server, tmp_path / "a", attempts=2)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(server.requests) == 10


def test_starting_again_is_no_progress(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, ranges=False, cuts=[300_000] * 9)
    with pytest.raises(DownloadError, match="3 attempts in a row"):
        get(server, tmp_path / "a", attempts=3)


@pytest.mark.parametrize(
    ("status", "expected"), [(404, "404"), (401, "hf auth login"), (403, "its link has run out"), (410, "410")]
)
def test_errors_that_last_are_not(server: FileServer, tmp_path: Path, status: int, expected: str) -> None:
    server.files["/a.model"] = Served(CONTENT, statuses=[status])
    with pytest.raises(DownloadError) as caught:
        get(server, tmp_path / "a")
    assert expected in str(caught.value)
    assert len(server.requests) == 1


def test_redirects(server: FileServer, tmp_path: Path) -> None:
    """Hugging Face redirects to another server, and states the checksum in that very answer."""
    server.files["/a.model"] = Served(redirect="/b", headers={"X-Linked-ETag": f'"{"ab" * 32}"'})
    server.files["/b"] = Served(redirect=f"{server.url}/c")
    server.files["/c"] = Served(CONTENT, cuts=[1_000_000])
    got = get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert got.stated_sha256 == "ab" * 32
    assert got.url == f"{server.url}/a.model"
    assert starts(server, "/c") == [0, 1_000_000 // 2**16]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "/a.model"])
def test_bad_redirects(server: FileServer, tmp_path: Path, target: str) -> None:
    server.files["/a.model"] = Served(redirect=target)
    with pytest.raises(DownloadError, match="refused"):
        get(server, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://me:s3cret@127.0.0.1:{taken.getsockname()[1]}/a?token=s3cret"
        with pytest.raises(DownloadError) as caught:
            download(url, tmp_path / "a", attempts=2, wait=lambda _: None)
    assert "Connection refused" in str(caught.value) or "no connection" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_host_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no connection"):
        download("http://nowhere.invalid/a", tmp_path / "a", attempts=1)


def test_a_server_that_falls_silent(server: FileServer, tmp_path: Path) -> None:
    import threading

    gate = threading.Event()
    served = server.files["/a.model"] = Served(CONTENT, gate=gate)

    def go_on(reason: str) -> None:
        assert "no more data" in reason or "no connection" in reason
        served.gate = None
        gate.set()

    get(server, tmp_path / "a", stall=0.3, on_retry=go_on)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.ranges("/a.model")[1] is not None


def test_user_and_password_are_sent_but_neither_shown_nor_noted(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT, authorization="Basic bWU6czNjcmV0", cuts=[1_000_000])  # me:s3cret
    secret = server.url.replace("http://", "http://me:s3cret@") + "/a.model?token=t0ken#frag"
    said: list[str] = []
    got = download(secret, tmp_path / "a", on_retry=said.append, wait=lambda _: None)
    assert (tmp_path / "a").read_bytes() == CONTENT
    noted = (tmp_path / "a.part.json").read_text()
    for text in (noted, got.url, *said):
        assert "s3cret" not in text
        assert "t0ken" not in text


def test_no_room_is_said_before_the_download(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.model"] = Served(CONTENT)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT) - 1))
    with pytest.raises(DownloadError, match="no room"):
        get(server, tmp_path / "a")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to test with")
def test_a_disk_that_fills_up_keeps_the_part(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.model"] = Served(CONTENT)
    code = (
        "import resource, sys; from pathlib import Path; from stunet.weights.download import download\n"
        "from stunet.errors import DownloadError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: download(sys.argv[1], Path(sys.argv[2]))\n"
        "except DownloadError as error: print(error)"
    )
    args = [sys.executable, "-c", code, f"{server.url}/a.model", str(tmp_path / "a")]
    said = subprocess.run(args, check=True, capture_output=True, text=True).stdout
    assert "no room for a download" in said
    assert os.strerror(errno.EFBIG) in said
    assert 0 < (tmp_path / "a").stat().st_size <= 1_000_000
    get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.ranges("/a.model")[1] is not None


@pytest.mark.parametrize("note", ["{", "[]", '{"url": 3}', '{"total": "many"}'])
def test_a_damaged_note_is_none(server: FileServer, tmp_path: Path, note: str) -> None:
    server.files["/a.model"] = Served(CONTENT)
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "a.part.json").write_text(note)
    get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a", "gopher://h/a", "/etc/passwd", "http:///a", "http://h:port/a", "", "http://[::1/a"]
)  # fmt: skip
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="http://"):
        check_url(url)
    with pytest.raises(DownloadError, match="http://"):
        download(url, tmp_path / "a")


def test_addresses_as_they_are_shown() -> None:
    assert clean_url("https://u:p@host.org:8443/a/b.model?key=1#x") == "https://host.org:8443/a/b.model"
    assert clean_url("http://[::1]:80/a") == "http://[::1]:80/a"
    assert file_name_of("https://host/x/small%20one.model?download=true") == "small one.model"
