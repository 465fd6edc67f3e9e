"""One case of separate masks becomes an image and a label map; what the processes of an import do.

Nothing here imports torch or nnU-Net, which each process would load anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.errors import DatasetError
from stunet.files import clone_or_copy, file_sha256, place_files, start_sync, sync_files, temporary_path
from stunet.labels.label_maps import merge_masks
from stunet.labels.nifti import check_finite, open_volume, write_volume

__all__ = [
    "ImportedCase",
    "MaskCase",
    "StagedCase",
    "fingerprint",
    "finished_record",
    "import_case",
    "place_cases",
    "stage_case",
]

_TRAILER_BYTES = 8  # a gzip file ends with checksum and length of its content


@dataclass(frozen=True)
class MaskCase:
    """A case to import.

    Attributes:
        name: Name of the case.
        split: ``train``, ``val`` or ``test``; goes into the record.
        ct: Its image, a ``.nii.gz`` file.
        masks: Label value, structure and file of each mask, later ones painted over earlier ones.
        n_labels: The highest label value of the dataset.
        image: Where the image goes.
        label: Where the label map goes.
        record: Where the record goes, whose presence says that both are whole.
        link: Whether the image is linked instead of copied.
    """

    name: str
    split: str
    ct: Path
    masks: tuple[tuple[int, str, Path], ...]
    n_labels: int
    image: Path
    label: Path
    record: Path
    link: bool


@dataclass(frozen=True)
class ImportedCase:
    """What has become of a case.

    Attributes:
        reused: Whether an earlier run had finished it.
        record: ``split``; ``source`` and ``output``, fingerprints; ``voxels`` in the label map by structure that it
            annotates; and ``overlaps``, voxels that a structure has lost, by the structure that took them.
    """

    reused: bool
    record: dict[str, Any]


@dataclass(frozen=True)
class StagedCase:
    """A case that is finished but for the names of its files.

    Attributes:
        image: Temporary path of the image.
        label: Temporary path of the label map.
        record: The record, without the fingerprint of the output.
    """

    image: Path
    label: Path
    record: dict[str, Any]


def import_case(case: MaskCase) -> ImportedCase:
    """Import a case: image, label map, record, each whole or not at all and in this order.

    What an earlier run has finished is kept where neither the source's files nor the output have changed since.

    Raises:
        DatasetError: A file that cannot be read, or a mask that does not fit the image.
    """
    staged = stage_case(case)
    return staged if isinstance(staged, ImportedCase) else place_cases([(case, staged)])[0]


def stage_case(case: MaskCase) -> ImportedCase | StagedCase:
    """The part of :func:`import_case` that takes the processor's time: read and check, write under other names.

    A case that fails leaves nothing behind.

    Raises:
        DatasetError: A file that cannot be read, or a mask that does not fit the image.
    """
    source = fingerprint([case.ct, *(path for _, _, path in case.masks)], [str(mask[:2]) for mask in case.masks])
    record = finished_record(case.record, case.image, case.label)
    if record is not None and record["source"] == source and record["split"] == case.split:
        return ImportedCase(True, record)
    image, label = map(temporary_path, (case.image, case.label))
    try:
        with open_volume(case.ct) as ct:
            _stage_image(case, image)
            check_finite(ct)  # to its end: a truncated image would show only when it is preprocessed
            merged = merge_masks([(value, path) for value, _, path in case.masks], ct, case.n_labels)
            write_volume(merged.labels, ct, label)
    except BaseException:
        _remove(image, label)
        raise
    names = {value: structure for value, structure, _ in case.masks}
    overlaps: dict[str, dict[str, int]] = {}
    for (loser, winner), n in sorted(merged.overlaps.items()):
        overlaps.setdefault(names[loser], {})[names[winner]] = n
    voxels = {names[value]: n for value, n in merged.voxels.items()}
    record = {"split": case.split, "source": source, "output": "", "voxels": voxels, "overlaps": overlaps}
    return StagedCase(image, label, record)


def place_cases(cases: Sequence[tuple[MaskCase, StagedCase]]) -> list[ImportedCase]:
    """The part of :func:`import_case` that waits for the disk: give files their names, and write the records."""
    placed = []
    images = [staged.image for case, staged in cases if not case.link]
    try:
        for case, _ in cases:
            case.record.write_text("{}", encoding="utf-8")  # begun, and not whole
        sync_files([*images, *(staged.label for _, staged in cases)])
        place_files((staged.image, case.image) for case, staged in cases)
        place_files((staged.label, case.label) for case, staged in cases)
        for case, staged in cases:
            if case.link:
                _remove(staged.image)  # renaming one link of a file to another link of it does nothing
            record = {**staged.record, "output": fingerprint([case.image, case.label])}
            _write_record(record, case.record)
            placed.append(ImportedCase(False, record))
    except BaseException:
        for _, staged in cases:
            _remove(staged.image, staged.label)
        raise
    return placed


def _write_record(record: dict[str, Any], path: Path) -> None:
    # Not synced: where the machine fails, a case without its record is imported again.
    temporary = temporary_path(path)
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, path)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def finished_record(record: Path, *outputs: Path) -> dict[str, Any] | None:
    """The record of a case that an earlier run has finished, where the files that it wrote are as they were then."""
    try:
        content = dict(json.loads(record.read_text(encoding="utf-8")))
        return content if content["output"] == fingerprint(list(outputs)) else None
    except (OSError, ValueError, KeyError, TypeError, DatasetError):
        return None


def fingerprint(paths: list[Path], details: list[str] | None = None) -> str:
    """A digest of files: gzip files by size and trailer, which takes a small part of the time of reading all bytes.

    Raises:
        DatasetError: A file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(details).encode())
    for path in paths:
        try:
            if path.suffix != ".gz":  # no checksum at its end
                digest.update(file_sha256(path).encode())
                continue
            # Python's file objects would take several times as long, and there are a hundred masks in a case.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                size = os.lseek(descriptor, 0, os.SEEK_END)
                os.lseek(descriptor, max(size - _TRAILER_BYTES, 0), os.SEEK_SET)
                digest.update(size.to_bytes(8, "little") + os.read(descriptor, _TRAILER_BYTES))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DatasetError(
                "an unreadable file",
                got=f"{path}: {error.strerror}",
                expected="a file that can be read",
                remedy="Check that it is there and readable, or leave its case out.",
            ) from error
    return digest.hexdigest()


def _stage_image(case: MaskCase, path: Path) -> None:
    if not case.link:
        clone_or_copy(case.ct, path)
        start_sync(path)  # so that the disk works while the masks are being decoded
        return
    path.unlink(missing_ok=True)
    try:
        os.link(case.ct.resolve(), path)
    except OSError:  # another file system, or one without hard links
        path.symlink_to(case.ct.resolve())
