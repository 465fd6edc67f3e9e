"""Whether files are the weights that they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stunet.errors import CheckpointError
from stunet.files import file_sha256
from stunet.weights.cache import entry_folder, missing_files, read_record, write_record
from stunet.weights.registry import WeightsEntry, WeightsFile

__all__ = ["Verified", "check_file", "describe_file", "pickles_of", "verify", "verify_file", "verify_present"]


@dataclass(frozen=True)
class Verified:
    """A file that is fine.

    Attributes:
        path: The file.
        sha256: Its checksum.
        compared_with: What the checksum was equal to, in words; empty where none was known.
    """

    path: Path
    sha256: str
    compared_with: str


def verify(entry: WeightsEntry, folder: Path | None = None) -> list[Verified]:
    """Check the files of published weights, and note the checksum of those that have none yet.

    Args:
        entry: What they should be.
        folder: Where they lie, the cache by default.

    Raises:
        CheckpointError: A file is missing, has changed since it was fetched, or is not what the registry says.
    """
    folder = entry_folder(entry.name) if folder is None else folder
    missing = missing_files(entry, folder)
    if missing:
        raise CheckpointError(
            "weights that are not complete",
            got=f"{entry.name}: no {', '.join(missing)} in {folder}",
            expected=f"the files {', '.join(file.file for file in entry.files)}",
            remedy=f"Run `stunet weights fetch {entry.name}`, which says how to get them.",
        )
    return [verify_present(entry, file, folder) for file in (*entry.pickles, entry.weights_file)]


def verify_file(path: Path, entry: WeightsEntry) -> Verified:
    """Check a file that lies anywhere against one of the entry's files; notes nothing.

    Raises:
        CheckpointError: It is not what the registry says.
    """
    if not path.is_file():
        raise CheckpointError("missing file", got=path, expected="a file", remedy="Check the path.")
    file = next((f for f in entry.files if f.file == path.name), None)
    if file is None:  # under a name of the user's own
        file = entry.weights_file if path.suffix != ".pkl" else WeightsFile(path.name)
    known = _known_checksums(path, entry, file)
    sha256 = check_file(path, entry, file, checksums=known, shown=str(path), remedy="Fetch or copy it again.")
    return Verified(path, sha256, " and ".join(known.values()))


def describe_file(path: Path) -> str:
    """What weights a file holds, in words, where nothing is known that it should be.

    Raises:
        CheckpointError: It cannot be read safely, or holds no STU-Net.
    """
    from stunet.weights import open_weights, read_pickle  # PyTorch, which listing weights does not need

    if path.suffix == ".pkl":
        read_pickle(path)
        return "a pickle with values alone"
    architecture = open_weights([path]).architecture
    return (
        f"STU-Net {architecture.size.name}, {architecture.n_axes}D, {architecture.input_channels} input channels, "
        f"{architecture.num_classes} outputs"
    )


def pickles_of(entry: WeightsEntry, file: WeightsFile, folder: Path) -> list[Path]:
    """The pickles in a folder that are read along with a file: none with a pickle itself."""
    present = [folder / pickle.file for pickle in entry.pickles if (folder / pickle.file).is_file()]
    return [] if file.is_pickle else present


def check_file(
    path: Path,
    entry: WeightsEntry,
    file: WeightsFile,
    *,
    checksums: Mapping[str, str],
    shown: str,
    remedy: str,
    pickles: Sequence[Path] = (),
) -> str:
    """Check one file: its length and checksum where they are known, and always that it is what it is called.

    Args:
        path: The file.
        entry: The weights that it should belong to.
        file: Which of their files it should be.
        checksums: SHA-256 that it should have, each with who says so.
        shown: What messages call the file.
        remedy: What the user can do if it is not fine.
        pickles: The pickles that belong to it, to be read along with weights.

    Returns:
        Its SHA-256.

    Raises:
        CheckpointError: It is another file.
    """
    from stunet.weights import open_weights, read_pickle

    with path.open("rb") as opened:
        start = opened.read(512).lstrip().lower()
    length = path.stat().st_size
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        expected = f"{file.file}; links often lead to a page that has the link proper"
        raise _not_the_published(f"{shown}: a web page of {length} bytes", expected, remedy)
    if file.bytes is not None and length != file.bytes:
        raise _not_the_published(f"{shown}: {length} bytes", f"{file.bytes} bytes", remedy)
    sha256 = file_sha256(path)
    for checksum, whose in checksums.items():
        if sha256 != checksum:
            got = f"{shown}: SHA-256 {sha256} ({length} bytes)"
            raise _not_the_published(got, f"SHA-256 {checksum} ({whose})", remedy)
    try:
        if file.is_pickle:
            read_pickle(path)
            return sha256
        architecture = open_weights([path, *pickles]).architecture
    except CheckpointError as error:
        raise _not_the_published(f"{shown}: {error.problem}: {error.got}", error.expected, remedy) from error
    got_network = (architecture.size.name, architecture.input_channels, architecture.num_classes)
    network = (entry.size, entry.input_channels or architecture.input_channels, entry.outputs)
    if got_network != network:
        words = "STU-Net {} with {} input channels and {} outputs"
        raise _not_the_published(f"{shown}: {words.format(*got_network)}", words.format(*network), remedy)
    return sha256


def verify_present(entry: WeightsEntry, file: WeightsFile, folder: Path) -> Verified:
    """Check one of the entry's files, and note its checksum if that has not been done.

    Raises:
        CheckpointError: It has changed since it was fetched, or is not what the registry says.
    """
    path = folder / file.file
    known = _known_checksums(path, entry, file)
    sha256 = check_file(
        path,
        entry,
        file,
        checksums=known,
        shown=str(path),
        remedy=f"Run `stunet weights fetch {entry.name} --force`, or put the published file there.",
        pickles=pickles_of(entry, file, folder),
    )
    if read_record(path) is None:
        write_record(path, name=entry.name, url=None, sha256=sha256)
    return Verified(path, sha256, " and ".join(known.values()))


def _known_checksums(path: Path, entry: WeightsEntry, file: WeightsFile) -> dict[str, str]:
    """Checksums that a file should have, with who says so."""
    known = {file.sha256: "the registry"} if file.sha256 else {}
    record = read_record(path)
    if record is not None and record.name == entry.name:
        known.setdefault(record.sha256, f"noted {record.date}")
    return known


def _not_the_published(got: str, expected: str, remedy: str) -> CheckpointError:
    return CheckpointError("a file that is not the published one", got=got, expected=expected, remedy=remedy)
