"""Published weights: which exist, fetched into the cache or a folder of the user's own, and verified.

:mod:`pooch` downloads from addresses and ``huggingface_hub`` from repositories, where it resumes what was cut. A file
appears under its name only after it has been checked: checksum, length, and that it opens safely as that network.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import msgspec
from filelock import FileLock, Timeout
from msgspec import Meta, Struct
from platformdirs import user_cache_path

from stunet.environment import did_you_mean
from stunet.errors import CheckpointError, DownloadError, UsageError
from stunet.files import file_sha256, move_into_place, write_json
from stunet.labels.labels import load_vocabulary

REGISTRY_VARIABLE = "STUNET_REGISTRY"
"""Environment variable that names a further registry; its entries go before ours of the same name."""
CACHE_VARIABLE = "STUNET_CACHE"
"""Environment variable that names the folder for fetched weights."""

_Text = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(gt=0)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}"
_URL = r"^(?i:https?)://([^/?#@\s]*@)?(\[[0-9a-fA-F:.]+\]|[^/?#@:\s\[\]]+)(:\d+)?([/?#]|\Z)"  # with a host
_File = Annotated[str, Meta(pattern=_NAME + r"\.(model|pth|safetensors|pkl)\Z")]  # no path: it stays in its folder
_Hub = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(@[\w.\-/]+)?\Z")]
_Url = Annotated[str, Meta(pattern=_URL)]
Say = Callable[[str], None]
"""What takes lines that a person may want to read."""

_ATTEMPTS = 5  # connections before a download is given up
_TIMEOUTS = (10.0, 60.0)  # seconds to connect, and without a byte
_LONGEST_PAUSE = 600.0  # seconds that are waited where a server asks for it
_PASSING = (408, 425, 429)  # answers that may be another one next time, as those of 500 and above


def clean_url(url: str) -> str:
    """Return an address without what may be secret in it: user, password, query and fragment.

    >>> clean_url("https://me:s3cret@host.org/a.model?key=1")
    'https://host.org/a.model'
    """
    if not re.match(_URL, url):
        return "an address that cannot be read"
    return re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])


class Place(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a person can get a file: a web page, and the file as that page names it."""

    page: _Url
    item: _Text


class WeightsFile(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of published weights."""

    file: _File  # its name
    url: _Url | None = None  # where a program may download it
    hub: _Hub | None = None  # hugging Face repository with such a file, OWNER/NAME or OWNER/NAME@REVISION
    bytes: _Positive | None = None  # its length where it is known
    approximate_bytes: _Positive | None = None  # its length as a page rounds it, for the table alone
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None  # its checksum where it is known
    by_hand: tuple[Place, ...] | None = ()  # where a person can get it

    @property
    def is_pickle(self) -> bool:
        """Whether it is one of nnU-Net v1's pickles, that is, belongs to weights but holds none."""
        return self.file.endswith(".pkl")


class WeightsEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Published weights of one network."""

    name: Annotated[str, Meta(pattern=_NAME + r"\Z")]  # what a user types
    size: _Text  # size of the network as stunet.network.size_of names it
    outputs: _Positive  # outputs, background included
    files: tuple[WeightsFile, ...]  # the weights and the pickles that belong to them
    title: str | None = None  # what it was trained on
    input_channels: _Positive | None = None  # channels of the image, where known
    labels: str | None = None  # name of the label vocabulary with the order of the outputs, where known
    licence: str | None = None  # licence of the weights, where known
    page: _Url | None = None  # the page of those who published them
    sources: dict[str, str] | None = None  # where each of these facts is from

    def __post_init__(self) -> None:
        if self.labels is not None and len(load_vocabulary(self.labels).labels) != self.outputs:
            raise ValueError(f"{self.name} has {self.outputs} outputs, which {self.labels} does not name")
        names = [file.file for file in self.files]
        if len(names) - len(self.pickles) != 1 or len({name.lower() for name in names}) != len(names):
            raise ValueError(f"files {names} are not one file with weights, and .pkl files of other names")

    @property
    def weights_file(self) -> WeightsFile:
        """The file with the tensors."""
        return next(file for file in self.files if not file.is_pickle)

    @property
    def pickles(self) -> tuple[WeightsFile, ...]:
        """The files that belong to it."""
        return tuple(file for file in self.files if file.is_pickle)


class _Registry(Struct, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    weights: list[WeightsEntry]


def load_registry() -> dict[str, WeightsEntry]:
    """Return all known weights by name: those of the user's registry (``STUNET_REGISTRY``) first, then ours.

    Raises:
        UsageError: The user's registry is missing, not JSON or malformed.
    """
    known: dict[str, WeightsEntry] = {}
    if named := os.environ.get(REGISTRY_VARIABLE):
        try:
            entries = msgspec.json.decode(Path(named).read_bytes(), type=_Registry).weights
            names = [entry.name for entry in entries]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} twice")
        except (OSError, ValueError) as error:
            text = f"{named}, a registry of weights that cannot be used: {error}"
            raise UsageError(f"{text}; correct it, or unset {REGISTRY_VARIABLE}") from error
        known = dict(zip(names, entries, strict=True))
    ours = msgspec.json.decode((files("stunet.weights") / "registry.json").read_bytes(), type=_Registry)
    return known | {entry.name: entry for entry in ours.weights if entry.name not in known}


def list_models() -> list[str]:
    """Return the names of all published weights that can be fetched, those of the user's own registry first.

    >>> list_models()[:2]
    ['small_ep4k', 'base_ep4k']
    """
    return list(load_registry())


def find_entry(name: str) -> WeightsEntry:
    """Return the weights of this name.

    Raises:
        UsageError: There are none, or the user's registry is malformed.
    """
    known = load_registry()
    if name not in known:
        close = did_you_mean(name, known)
        raise UsageError(f"unknown weights {name}, and no such file: {close}`stunet list` shows {', '.join(known)}")
    return known[name]


class Record(Struct, frozen=True):
    """What is known of a file since it was fetched, or first verified: its length and SHA-256 then.

    Without user, password and query in the address, which is None where the file was put there by hand; dates in UTC.
    """

    name: str
    url: str | None
    date: str
    bytes: int
    sha256: str


def entry_folder(name: str) -> Path:
    """Return the folder of these weights: ``STUNET_CACHE``, else the platform's cache, then ``weights/NAME``."""
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named).expanduser() if named else user_cache_path("stunet", appauthor=False)
    return root / "weights" / name


def missing_files(entry: WeightsEntry, folder: Path) -> list[str]:
    """Return the names of the entry's files that are not in a folder."""
    return [file.file for file in entry.files if not (folder / file.file).is_file()]


def _require_files(entry: WeightsEntry, folder: Path) -> None:
    if missing := missing_files(entry, folder):
        raise CheckpointError(f"no {', '.join(missing)} in {folder}: run `stunet weights fetch {entry.name}`")


def cached_weights(path: str | os.PathLike[str]) -> Path:
    """Return a path where there is something, else the weights of this name that ``stunet weights fetch`` has cached.

    Raises:
        CheckpointError: They are not in the cache, or a file has another length than when it was fetched.
        UsageError: No weights have this name.
    """
    if Path(path).exists():
        return Path(path)
    name = str(path)
    entry, folder = find_entry(name), entry_folder(name)
    _require_files(entry, folder)
    for file in entry.files:
        path = folder / file.file
        known, got = read_record(path) or file, path.stat().st_size
        if known.bytes not in (None, got):
            raise CheckpointError(f"{path} has {got} bytes, not {known.bytes}: `stunet weights fetch {name} --force`")
    return folder / entry.weights_file.file


def record_path(path: Path) -> Path:
    """Return where the record of a file lies."""
    return path.with_name(f"{path.name}.record.json")


def read_record(path: Path) -> Record | None:
    """Return the record beside a file; None where there is none, or none that can be read."""
    try:
        return msgspec.json.decode(record_path(path).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def noted_sha256(path: Path) -> str:
    """Return the SHA-256 that was noted of a file, where length and time say that it is the same; else compute it."""
    record, now = read_record(path), path.stat()
    fetched = datetime.fromisoformat(record.date).timestamp() + 1 if record else 0.0
    return record.sha256 if record and record.bytes == now.st_size and now.st_mtime < fetched else file_sha256(path)


def write_record(path: Path, *, name: str, url: str | None, sha256: str) -> None:
    """Note beside a file what it is now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(msgspec.to_builtins(Record(name, url, now, path.stat().st_size, sha256)), record_path(path))


# Fetching


@dataclass(frozen=True)
class Verified:
    """A file that is fine: its checksum, and human-readable what that was equal to; empty where none was known."""

    path: Path
    sha256: str
    compared_with: str


def fetch(
    entry: WeightsEntry,
    *,
    folder: Path | None = None,
    urls: Sequence[str] = (),
    hub: str | None = None,
    force: bool = False,
    attempts: int = _ATTEMPTS,
    say: Say = lambda text: None,
) -> Path:
    """Get the files of published weights: each appears under its name only after it has been checked.

    Files that are there already are checked, not downloaded. Of several processes that fetch into one folder, one
    downloads and the others wait for it.

    Args:
        entry: What to get.
        folder: Where to put it, the cache by default.
        urls: Addresses that go before the registry's: each for the file that its last part names, else for the weights.
        hub: Hugging Face repository that goes before the weights' addresses, ``OWNER/NAME[@REVISION]``.
        force: Download files again that are there already.
        attempts: Connections before a download is given up.
        say: Told what is being done.

    Returns:
        The file with the weights.

    Raises:
        CheckpointError: A file that has arrived, or is there, is not the published one.
        DownloadError: A download failed; or a file can only be had by hand, then it says how.
        UsageError: Two addresses for one file.
    """
    folder = entry_folder(entry.name) if folder is None else folder
    if bad := [url for url in urls if not re.match(_URL, url)]:
        scheme = bad[0].split("://")[0] + "://…" if "://" in bad[0] else "an address without http://"
        raise DownloadError(f"{scheme} cannot be downloaded from; give one that begins with http:// or https://")
    sources = {file.file: _sources(entry, file, urls, hub) for file in entry.files}
    by_hand = []
    with alone_with(folder / ".partial" / "lock", say):
        for file in (*entry.pickles, entry.weights_file):  # the small ones first: what fails shall fail early
            if (folder / file.file).is_file() and not (sources[file.file] and force):
                _verify_present(folder / file.file, entry)
                say(f"{file.file} is there already, and fine")
            elif sources[file.file]:
                _fetch_file(entry, file, sources[file.file], folder, attempts, say)
            else:
                by_hand.append(file)
    if by_hand:
        names, how = ", ".join(file.file for file in by_hand), _by_hand(entry, by_hand, folder)
        text = f"{entry.name} has files that no program can download, {names}: get them by hand\n{how}"
        raise DownloadError(f"{text}\n  or give an address that you know with --url or --hf")
    return folder / entry.weights_file.file


def _sources(entry: WeightsEntry, file: WeightsFile, urls: Sequence[str], hub: str | None) -> list[str]:
    """Return where a file may be had, in the order to try: addresses, and Hugging Face repositories after ``hf:``."""
    others = {other.file for other in entry.files} - {file.file}
    ends = {url: unquote(urlsplit(url).path).rpartition("/")[2] for url in urls}
    mine = [url for url, end in ends.items() if end == file.file or (end not in others and not file.is_pickle)]
    if len(mine) > 1:
        raise UsageError(f"two addresses for {file.file}, {clean_url(mine[0])} and {clean_url(mine[1])}: give one")
    known = [f"hf:{file.hub}"] if file.hub else []  # the hub's downloads can be resumed
    known += [file.url] if file.url else []
    if hub and not (file.is_pickle and known):  # a repository of weights often lacks the pickles
        known = [f"hf:{hub}"]
    return mine or known


@contextmanager
def alone_with(lock_path: Path, say: Say) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends, and explain a full disk.

    Raises:
        DownloadError: The folder above the lock's, or what the block writes there, cannot be written.
    """
    lock, folder = FileLock(lock_path), lock_path.parents[1]
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            say(f"Another process works in {folder}: waiting for it")
            lock.acquire()
        yield
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror or error})"
        raise DownloadError(f"{text}: make room, or choose another folder with --to or STUNET_CACHE") from error
    finally:
        lock.release()


def _fetch_file(
    entry: WeightsEntry, file: WeightsFile, sources: Sequence[str], folder: Path, attempts: int, say: Say
) -> None:
    part, path = folder / ".partial" / file.file, folder / file.file
    try:
        _require_room(part, file.bytes)
        url, stated = _download(sources, part, attempts, say)
        say(f"Checking {file.file}")
        sha256 = verify_file(part, entry, stated=stated, shown=clean_url(url)).sha256
        record_path(path).unlink(missing_ok=True)
        move_into_place(part, path)
    except (DownloadError, CheckpointError) as error:
        if not file.by_hand:
            raise
        raise type(error)(f"{error}\n  or get it by hand\n{_by_hand(entry, [file], folder)}") from error
    finally:
        part.unlink(missing_ok=True)
    write_record(path, name=entry.name, url=clean_url(url), sha256=sha256)


def _require_room(part: Path, n_bytes: int | None) -> None:
    """Check that a file fits on the disk, beside what is there of it already."""
    begun = [*part.parent.glob(part.name), *part.parent.rglob("*.incomplete")]  # the others are huggingface_hub's
    missing = (n_bytes or 0) - sum(path.stat().st_size for path in begun)
    if missing > (free := shutil.disk_usage(part.parent).free):
        text = f"{part.parents[1]} has {free / 1e9:.2f} GB free, and {missing / 1e9:.2f} GB are missing of {part.name}"
        raise DownloadError(f"{text}: make room, or choose another folder with --to or STUNET_CACHE")


def _download(sources: Sequence[str], part: Path, attempts: int, say: Say) -> tuple[str, str | None]:
    """Download a file from the first source that gives it; returns its address, and the SHA-256 where it is stated."""
    source, *others = sources
    try:
        if source.startswith("hf:"):
            return _from_hub(source.removeprefix("hf:"), part, say)
        return source, _from_url(source, part, attempts, say)
    except DownloadError as error:
        if not others:
            raise
        say(str(error))
        return _download(others, part, attempts, say)


def _from_url(url: str, part: Path, attempts: int, say: Say) -> str | None:
    """Download a file; returns the SHA-256 that Hugging Face states in the answer that redirects to large files."""
    import pooch  # type: ignore[import-untyped]
    import requests
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    stated: list[str] = []

    def look(response: requests.Response, **_: Any) -> None:
        if url.lower().startswith("https:") and not response.url.lower().startswith("https:"):
            raise DownloadError(f"{clean_url(url)} redirects to {clean_url(response.url)}, which is not https")
        _require_room(part, int(response.headers.get("Content-Length") or 0))
        stated.extend(re.findall('^"?([0-9a-f]{64})"?$', response.headers.get("X-Linked-ETag", "")))

    say(f"Downloading {clean_url(url)}")
    bar, headers = sys.stderr.isatty(), {"Accept-Encoding": "identity"}
    get = pooch.HTTPDownloader(bar, 2**18, timeout=_TIMEOUTS, headers=headers, hooks={"response": look})
    for attempt in count(1):
        try:
            get(url, str(part), None)
            break
        except requests.RequestException as error:
            status = None if error.response is None else error.response.status_code
            pause = min(0.5 * 2 ** (attempt - 1), 30)
            with suppress(AttributeError, InvalidHeader):  # a busy server may say when to come again
                pause = max(pause, Retry().get_retry_after(error.response.raw) or 0)  # type: ignore[union-attr]
            lasting = isinstance(error, ValueError) or (400 <= (status or 0) < 500 and status not in _PASSING)
            if lasting or attempt == attempts or pause > _LONGEST_PAUSE:
                text = f"{clean_url(url)} could not be downloaded in {attempt} attempts, {_reason(error)}"
                remedy = "check the address and the connection, or give another address with --url or --hf"
                text += f", to be asked again in {pause:g} s" * (pause > _LONGEST_PAUSE)
                raise DownloadError(f"{text}: {remedy}") from None  # whose own text shows what is secret in the address
            say(f"{_reason(error)}; again in {pause:g} s")
            time.sleep(pause)
    return stated[-1] if stated else None


def _reason(error: BaseException) -> str:
    """What the server or the system says, without the address."""
    response = getattr(error, "response", None)
    if response is not None and response.status_code >= 400:
        hint = {401: ", use --hf after `hf auth login`", 403: ", it is not public, or its link has run out"}
        return f"the server answers {response.status_code} {response.reason}{hint.get(response.status_code, '')}"
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"no connection ({getattr(error, 'strerror', None) or type(error).__name__})"


def _from_hub(repository: str, part: Path, say: Say) -> tuple[str, str | None]:
    """Download a file of a Hugging Face repository; returns its address, and the SHA-256 where that is stated.

    ``huggingface_hub`` knows the token of the user (``hf auth login``, ``HF_TOKEN``), shows a bar of its own, and
    resumes a file that was cut, also in another process.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        remedy = "run `pip install huggingface_hub`, or give an address with --url"
        raise DownloadError(f"huggingface_hub is not installed: {remedy}") from None
    repo_id, _, revision = repository.partition("@")
    try:
        found = get_hf_file_metadata(hf_hub_url(repo_id, part.name, revision=revision or None))
        _require_room(part, found.size)
        revision = found.commit_hash or revision
        url = hf_hub_url(repo_id, part.name, revision=revision or None)
        say(f"Downloading {clean_url(url)}")
        hf_hub_download(repo_id, part.name, revision=revision or None, local_dir=part.parent)
        shutil.rmtree(part.parent / ".cache", ignore_errors=True)  # its notes
    except DownloadError:
        raise
    except Exception as error:  # whatever HTTP client it uses in this version has its own errors
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
        text = f"{repository} does not give {part.name}, {type(error).__name__}: {said}"
        raise DownloadError(f"{text}; check --hf, or run `hf auth login` where it is not public") from None
    return url, found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None


def _by_hand(entry: WeightsEntry, missing: Sequence[WeightsFile], folder: Path) -> str:
    """Which page to open, what to get there, where to put it, and what to run then."""
    lines = []
    for file in missing:
        places = file.by_hand or (Place(entry.page or "the publisher's page", file.file),)
        pages = " or ".join(f"{place.item} from {place.page}" for place in places)
        lines.append(f"  - get {pages}\n    and put it at {folder / file.file}")
    return "\n".join([*lines, f"  then run: stunet weights verify {entry.name}"])


def verify(entry: WeightsEntry, folder: Path | None = None) -> list[Verified]:
    """Check the files of published weights, by default in the cache, and note checksums of those that have none yet.

    Raises:
        CheckpointError: A file is missing, has changed since it was fetched, or is not what the registry says.
    """
    folder = entry_folder(entry.name) if folder is None else folder
    _require_files(entry, folder)
    return [_verify_present(folder / file.file, entry) for file in (*entry.pickles, entry.weights_file)]


def _verify_present(path: Path, entry: WeightsEntry) -> Verified:
    verified = verify_file(path, entry)
    if read_record(path) is None:
        write_record(path, name=entry.name, url=None, sha256=verified.sha256)
    return verified


def verify_file(path: Path, entry: WeightsEntry, *, stated: str | None = None, shown: str = "") -> Verified:
    """Check length and checksum of a file where they are known, and always that it is what it is called; note nothing.

    Args:
        path: The file, which lies anywhere; under a name of the user's own it should be the weights.
        entry: What it should be of.
        stated: The SHA-256 that its server states.
        shown: What messages call the file, where that is not its path.

    Raises:
        CheckpointError: It is not what the registry says.
    """
    from stunet.weights.convert import open_weights  # PyTorch, which listing weights does not need
    from stunet.weights.read import read_pickle, require_file

    unnamed = entry.weights_file if path.suffix != ".pkl" else WeightsFile(path.name)
    file = next((file for file in entry.files if file.file == path.name), unnamed)

    def other(got: str, expected: str) -> CheckpointError:
        remedy = f"`stunet weights fetch {entry.name} --force` gets it again, from another address with --url or --hf"
        text = f"{shown or path} is not the published {file.file}: {got} instead of {expected}"
        return CheckpointError(f"{text}; {remedy}")

    with require_file(path, "file").open("rb") as opened:
        is_page = opened.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head"))
    length, sha256, record = path.stat().st_size, file_sha256(path), read_record(path)
    known = {stated: "Hugging Face"} | {file.sha256: "the registry"}
    if record is not None and record.name == entry.name:
        known.setdefault(record.sha256, f"noted {record.date}")
    known.pop(None, None)
    fine = Verified(path, sha256, " and ".join(known.values()))
    if is_page:
        raise other(f"a web page of {length} bytes", "the file that its link proper leads to")
    if file.bytes is not None and length != file.bytes:
        raise other(f"{length} bytes", f"{file.bytes} bytes")
    for checksum, whose in known.items():
        if sha256 != checksum:
            raise other(f"SHA-256 {sha256} ({length} bytes)", f"SHA-256 {checksum} ({whose})")
    try:
        if file.is_pickle:
            read_pickle(path)
            return fine
        found = open_weights([path]).architecture
    except CheckpointError as error:
        raise other(f"a file that cannot be used ({error})", "a whole one") from error
    got = (found.size.name, found.input_channels, found.num_classes)
    network = (entry.size, entry.input_channels or found.input_channels, entry.outputs)
    if got != network:
        words = "STU-Net {} with {} input channels and {} outputs"
        raise other(words.format(*got), words.format(*network))
    return fine


def describe_file(path: Path) -> str:
    """Describe what weights a file holds, where nothing is known that it should be.

    Raises:
        CheckpointError: It cannot be read safely, or holds no STU-Net.
    """
    from stunet.weights.convert import open_weights
    from stunet.weights.read import read_pickle

    if path.suffix == ".pkl":
        read_pickle(path)
        return "a pickle with values alone"
    found = open_weights([path]).architecture
    channels = f"{found.input_channels} input channels, {found.num_classes} outputs"
    return f"STU-Net {found.size.name}, {found.n_axes}D, {channels}"
