"""Files and folders that appear atomically: complete, or not at all."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml
from filelock import FileLock, Timeout

from stunet.errors import CommandError, DatasetError, FormError, UsageError, reading

#: The dataset.json of a union lists the files of each case, for some 10,000 of them.
_MAX_JSON_BYTES = 256 * 2**20
_GZIP_TRAILER_BYTES = 8  # checksum and length of the content

AnyPath = str | os.PathLike[str]


def temporary_path(path: AnyPath) -> Path:
    """Return where this process writes a file or folder until it is finished: beside it, on the same file system."""
    path = Path(path)
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The content is on disk (fsync) before it is renamed, and so is the rename before the block is left: after a crash
    at any moment ``path`` holds either the old content or the new. An error inside the block leaves ``path`` untouched
    and removes the temporary file; a killed process leaves it behind for :func:`remove_leftovers`.
    """
    path, temporary = Path(path), temporary_path(path)
    try:
        with naming_file(path):
            yield temporary
            move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_into_place(temporary: AnyPath, path: AnyPath) -> None:
    """Rename a finished file or folder on the same file system; it is on disk before, and its name after."""
    sync_files([temporary])
    os.replace(temporary, path)
    sync_files([Path(path).parent])


def sync_files(paths: Iterable[AnyPath]) -> None:
    """Wait until the contents of files and folders are on disk (fsync)."""
    for path in paths:
        # Windows cannot open a folder, and some network file systems cannot fsync one; the files in it are safe by now.
        is_folder = Path(path).is_dir()
        with suppress(OSError) if is_folder else nullcontext():
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def file_sha256(path: AnyPath) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(paths: Iterable[Path], details: object = None) -> str:
    """Return a digest of files, gzip files by size and trailer, which takes a small part of the time of reading all.

    Raises:
        DatasetError: A file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(details).encode())
    for path in paths:
        with reading(path, "an unreadable file", DatasetError, "check it, or leave its case out"):
            if path.suffix != ".gz":  # no checksum at its end
                digest.update(file_sha256(path).encode())
                continue
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _GZIP_TRAILER_BYTES, 0))
                digest.update(size.to_bytes(8, "little") + file.read())
    return digest.hexdigest()


@contextmanager
def atomic_folder(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block ends without an error.

    All files and folders in it are on disk (fsync) before it is renamed. An error inside the block, a full disk for
    example, removes the temporary folder with all that is in it. Folders above it are made where they are missing.

    Raises:
        UsageError: Something stands at ``path``, before the block or after it.
    """
    path, temporary = Path(path), temporary_path(path)
    refuse_existing(path)
    temporary.mkdir(parents=True)
    try:
        with naming_file(path):
            yield temporary
        sync_files(temporary.rglob("*"))
        refuse_existing(path)  # a rename would silently replace an empty folder
        move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: AnyPath) -> None:
    """Check that nothing stands where an output shall be, not even a broken link.

    Raises:
        UsageError: Something does.
    """
    if os.path.lexists(path):
        raise UsageError(f"an output that exists: {os.fspath(path)}; choose another one with -o, or remove it")


def remove_leftovers(folder: AnyPath, name: str, *, of_the_dead: bool = False) -> list[Path]:
    """Remove the unfinished files and folders that killed processes left in ``folder``; see :func:`temporary_path`.

    Args:
        folder: The folder to clean, not searched recursively.
        name: Name of the finished files, may be a glob pattern such as ``checkpoint_*.pth``.
        of_the_dead: Whether only those of processes that no longer run on this machine are removed. Needed wherever
            another process may be writing: a live temporary file looks the same.

    Returns:
        What was removed.
    """
    here = f".{glob.escape(socket.gethostname())}" if of_the_dead else ""
    found = sorted(Path(folder).glob(f".{name}{here}.*.tmp"))
    leftovers = [path for path in found if not (of_the_dead and _is_running(path.name.split(".")[-2]))]
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def _is_running(pid: str) -> bool:
    if pid == str(os.getpid()):  # left by an earlier process that had this one's id
        return False
    if not pid.isdecimal() or os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(int(pid), 0)
    except (OSError, OverflowError) as error:  # of another user, or on a system that does not say
        return not isinstance(error, ProcessLookupError)
    try:  # in a container, where nobody may have asked for a dead process's status
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Yield a folder for unfinished files within ``output``, which is made; those of killed processes are removed."""
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output, "scratch", of_the_dead=True)
    folder = temporary_path(output / "scratch")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock for the length of the block; the system releases it when the process ends, however it ends.

    Args:
        path: The lock file, which stays: whoever removed it could remove one that another process holds by now.
        doing: What only one process may do at a time, for the error.

    Raises:
        CommandError: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise CommandError(f"another {doing} holds {path}: wait until it has ended") from None


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object out of a file of others', of a bearable size.

    Raises:
        ValueError: It is not, or no JSON; callers wrap this in :func:`stunet.errors.reading`.
    """
    path = Path(path)
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes, more than {_MAX_JSON_BYTES}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} instead of a JSON object")
    return content


def write_json(content: Any, path: AnyPath) -> None:
    """Write ``content`` as JSON with nnU-Net's indentation, atomically."""
    write_json_files({Path(path): content})


def write_json_files(contents: dict[Path, Any]) -> None:
    """Write several files as :func:`write_json` does, which appear in this order, once all of them are written."""
    with ExitStack() as stack:
        for path, content in reversed(contents.items()):  # which is the order in which the stack is left
            temporary = stack.enter_context(atomic_path(path))
            temporary.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Make failures to write name the file, as the system does where it cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


Name = Annotated[str, msgspec.Meta(min_length=1)]
Names = Annotated[list[Name], msgspec.Meta(min_length=1)]

_MAX_YAML_LENGTH = 2**20  # which takes PyYAML a minute


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which by itself lets the last of equal keys win in silence, and aliases multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        _unique([(self.construct_object(key), value) for key, value in node.value])
        return dict(super().construct_mapping(node, deep))


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, n in Counter(key for key, _ in pairs).items():
        if n > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_document(path: str | os.PathLike[str]) -> Any:
    """Read a JSON or YAML file as plain values; what is JSON counts as that, whatever its name. Nothing in it is run.

    Raises:
        FormError: Missing, no text, of another format, too large, an alias, or a key twice in one mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            if path.suffix == ".json":
                raise
        if len(text) > _MAX_YAML_LENGTH:
            raise ValueError(f"{len(text)} characters that are no JSON; of YAML at most {_MAX_YAML_LENGTH} are read")
        # A SafeLoader: it makes plain values only.
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506
    except (OSError, yaml.YAMLError, ArithmeticError, LookupError, AttributeError, ValueError, TypeError) as error:
        raise FormError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise FormError("nested too deeply") from error


def decode(content: Any, form: Any, place: str = "") -> Any:
    """Turn plain values into what a type declares.

    msgspec names the fields of structures and the places of lists; the keys of mappings are named here.

    >>> decode({"liver": 1, "kidney": "2"}, dict[str, int])
    Traceback (most recent call last):
    stunet.errors.FormError: ['kidney']: Expected int, got str

    Raises:
        FormError: The values are of another form; names the place and what was expected there.
    """
    if isinstance(content, dict):
        for arm in get_args(form) if get_origin(form) in (Union, UnionType) else (form,):
            if get_origin(arm) is dict:
                for key, value in content.items():
                    decode(key, get_args(arm)[0], f"a key of {place}" if place else "a key")
                    decode(value, get_args(arm)[1], f"{place}[{key!r}]")
            elif isinstance(arm, type) and issubclass(arm, msgspec.Struct):
                for name, field in get_type_hints(arm, include_extras=True).items():
                    if name in content:
                        decode(content[name], field, f"{place}.{name}" if place else name)
    try:
        return msgspec.convert(content, form)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at $")
        raise FormError(f"{place}{path}: {problem}".removeprefix(": ")) from error
