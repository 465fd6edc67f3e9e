"""Published weights into the cache, or into a folder of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from stunet.errors import CheckpointError, DownloadError, UsageError
from stunet.files import move_into_place
from stunet.weights.addresses import check_url, clean_url, file_name_of
from stunet.weights.cache import entry_folder, part_path, remove_record, write_record
from stunet.weights.checks import check_file, pickles_of, verify_present
from stunet.weights.download import ATTEMPTS, download
from stunet.weights.hub import HubFile, locate
from stunet.weights.parts import remove_part
from stunet.weights.registry import WeightsEntry, WeightsFile

__all__ = ["Listener", "alone_with", "fetch"]


class Listener:
    """What a fetch tells of itself; does nothing unless methods are replaced."""

    def begin(self, file: str, url: str) -> None:
        """A file is being downloaded."""

    def progress(self, done: int, total: int | None) -> None:
        """So many bytes of it are there."""

    def note(self, text: str) -> None:
        """Something that a person may want to know."""

    def work(self, text: str) -> None:
        """Something begins that takes a while and says nothing of its progress."""


@dataclass(frozen=True)
class _Source:
    """Where a file is downloaded from: an address or a Hugging Face repository."""

    url: str | None = None
    hub: str | None = None


def fetch(
    entry: WeightsEntry,
    *,
    folder: Path | None = None,
    urls: Sequence[str] = (),
    hub: str | None = None,
    force: bool = False,
    attempts: int = ATTEMPTS,
    listener: Listener | None = None,
) -> Path:
    """Get the files of published weights: each appears under its name only after it has been checked.

    Files that are there already are checked, not downloaded. Of several processes that fetch into one folder, one
    downloads and the others wait for it. A download that was cut, stopped or killed goes on where it ended.

    Args:
        entry: What to get.
        folder: Where to put it, the cache by default.
        urls: Addresses that go before the registry's: each for the file that its last part names, else for the weights.
        hub: Hugging Face repository that goes before the weights' addresses, ``OWNER/NAME[@REVISION]``.
        force: Download files again that are there already.
        attempts: Connections in a row that may bring nothing new before a download is given up.
        listener: Told of progress.

    Returns:
        The file with the weights.

    Raises:
        CheckpointError: A file that has arrived, or is there, is not the published one.
        DownloadError: A download failed; or a file can only be had by hand, then it says how.
        UsageError: Two addresses for one file.
    """
    folder = entry_folder(entry.name) if folder is None else folder
    listener = listener or Listener()
    sources = _choose_sources(entry, urls, hub)
    by_hand = []
    with alone_with(part_path(folder, "lock"), listener):
        for file in (*entry.pickles, entry.weights_file):  # the small ones first: what fails shall fail early
            source, is_there = sources[file.file], (folder / file.file).is_file()
            if is_there and (source is None or not force):
                verify_present(entry, file, folder)
                listener.note(f"{file.file} is there already, and fine")
            elif source is None:
                by_hand.append(file)
            else:
                _fetch_file(entry, file, source, folder, attempts, listener)
    if by_hand:
        raise _by_hand_error(entry, by_hand, folder)
    return folder / entry.weights_file.file


def _choose_sources(entry: WeightsEntry, urls: Sequence[str], hub: str | None) -> dict[str, _Source | None]:
    chosen: dict[str, _Source | None] = {}
    for file in entry.files:
        known = _Source(file.url, file.hub) if file.url or file.hub else None
        # A repository of weights often lacks the pickles, so those come from it only where nothing else is known.
        chosen[file.file] = _Source(hub=hub) if hub and (known is None or not file.is_pickle) else known
    given: set[str] = set()
    for url in urls:
        check_url(url)
        name = file_name_of(url)
        name = name if name in chosen else entry.weights_file.file
        if name in given:
            raise UsageError(
                "two addresses for one file",
                got=f"{clean_url(url)}, and another one for {name}",
                expected=f"one address for each of {', '.join(chosen)}, ending with that name",
                remedy="Leave one --url out, or give an address that ends with the file's name.",
            )
        given.add(name)
        chosen[name] = _Source(url)
    return chosen


@contextmanager
def alone_with(lock_path: Path, listener: Listener) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends, and explain a full disk.

    Args:
        lock_path: The lock, in a folder of its own.
        listener: Told where another process has it.

    Raises:
        DownloadError: The folder, or what the block writes, cannot be written.
    """
    lock = FileLock(lock_path)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            listener.note(f"Another process works in {lock_path.parents[1]}: waiting for it")
            lock.acquire()
        yield
    except OSError as error:
        raise DownloadError(
            "a folder that cannot be written to",
            got=f"{lock_path.parents[1]}: {error.strerror or error}",
            expected="a folder with room for the weights",
            remedy="Choose another one with --to or STUNET_CACHE, or make room.",
        ) from error
    finally:
        lock.release()


def _fetch_file(
    entry: WeightsEntry, file: WeightsFile, source: _Source, folder: Path, attempts: int, listener: Listener
) -> None:
    if source.url is not None:
        found = HubFile(source.url, headers={}, sha256=None, bytes=None)
    else:
        found = locate(source.hub or "", file.file)
    part, path = part_path(folder, file.file), folder / file.file
    listener.begin(file.file, clean_url(found.url))
    try:
        got = download(
            found.url,
            part,
            headers=found.headers,
            expected_bytes=file.bytes or found.bytes,
            attempts=attempts,
            on_progress=listener.progress,
            on_retry=listener.note,
        )
    except DownloadError as error:
        if not file.by_hand:
            raise
        remedy = f"{error.remedy}\n  Or get the file by hand:\n{_by_hand(entry, [file], folder)}"
        raise DownloadError(error.problem, got=error.got, expected=error.expected, remedy=remedy) from error
    stated = {checksum: "Hugging Face" for checksum in (found.sha256, got.stated_sha256) if checksum}
    checksums = {**stated, **({file.sha256: "the registry"} if file.sha256 else {})}
    listener.work(f"Checking {file.file}")
    try:
        checked = check_file(
            part,
            entry,
            file,
            checksums=checksums,
            shown=got.url,
            remedy=f"Nothing was put into {folder}. {_advice(file)}",
            pickles=pickles_of(entry, file, folder),
        )
    except CheckpointError:
        remove_part(part)  # there is nothing to go on with
        raise
    remove_record(path)
    move_into_place(part, path)
    remove_part(part)
    write_record(path, name=entry.name, url=got.url, sha256=checked)


def _advice(file: WeightsFile) -> str:
    pages = [place.page for place in file.by_hand]
    if pages:
        return f"Fetch again, give another address with --url or --hf, or get {file.file} by hand: {' or '.join(pages)}"
    return "Fetch again, or give another address with --url or --hf."


def _by_hand_error(entry: WeightsEntry, missing: Sequence[WeightsFile], folder: Path) -> DownloadError:
    return DownloadError(
        "files that a program cannot download",
        got=f"{entry.name}: no address for {', '.join(file.file for file in missing)}",
        expected=f"these files in {folder}",
        remedy=f"Get them by hand:\n{_by_hand(entry, missing, folder)}\n"
        "  Where you know an address, give it with --url or --hf instead.",
    )


def _by_hand(entry: WeightsEntry, missing: Sequence[WeightsFile], folder: Path) -> str:
    """Which page to open, what to get there, where to put it, and what to run then."""
    items: dict[str, list[str]] = {}
    for file in missing:
        pages = " or ".join(dict.fromkeys(place.page for place in file.by_hand)) or entry.page or "the publisher's page"
        names = " or ".join(dict.fromkeys(place.item for place in file.by_hand)) or file.file
        items.setdefault(pages, []).append(f"    get {names}\n      and put it at {folder / file.file}")
    lines = [line for pages, files in items.items() for line in (f"  - open {pages}", *files)]
    return "\n".join([*lines, f"  then run: stunet weights verify {entry.name}"])
