"""What an import leaves in a dataset's folder so that it can be continued: settings, records of cases, a lock."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stunet.errors import DatasetError, UsageError
from stunet.files import locked, remove_leftovers, write_json

__all__ = ["ENDING", "REPORT_NAME", "ImportState", "claim_folder", "dataset_folder"]

REPORT_NAME = "import_report.json"
"""Name of the file that says what an import has found; beside ``dataset.json``."""

ENDING = ".nii.gz"
"""File ending of imported images and label maps."""

_STATE, _LOCK = ".import", ".import.lock"
_SETTINGS = "settings.json"
_RECORD_ENDING = ".case.json"


@dataclass(frozen=True)
class ImportState:
    """A dataset's folder while an import works on it.

    Attributes:
        folder: The dataset's folder.
        ending: File ending of images and label maps.
    """

    folder: Path
    ending: str = ENDING

    def label(self, case: str) -> Path:
        """Where the label map of a training case belongs; the folder is made."""
        labels = self.folder / "labelsTr"
        labels.mkdir(exist_ok=True)
        return labels / f"{case}{self.ending}"

    def files(self, case: str, split: str) -> tuple[Path, Path]:
        """Where a case's image and label map belong; their folders are made."""
        part = "Ts" if split == "test" else "Tr"
        images, labels = self.folder / f"images{part}", self.folder / f"labels{part}"
        images.mkdir(exist_ok=True)
        labels.mkdir(exist_ok=True)
        return images / f"{case}_0000{self.ending}", labels / f"{case}{self.ending}"

    def record(self, case: str) -> Path:
        """Where a case's record is."""
        return self.folder / _STATE / f"{case}{_RECORD_ENDING}"

    def started(self) -> list[str]:
        """Cases that this or an earlier run has begun to write."""
        names = (path.name for path in (self.folder / _STATE).glob(f"*{_RECORD_ENDING}"))
        return sorted(name.removesuffix(_RECORD_ENDING) for name in names)

    def tidy(self, splits: Mapping[str, str]) -> None:
        """Remove files of cases that an import began and that are not part of the dataset, or of another part now.

        Args:
            splits: The split of each case that is part of the dataset.

        Raises:
            DatasetError: Files that no import wrote stand among the others; nnU-Net would take them for cases.
        """
        began = set(self.started())
        for part in ("Tr", "Ts"):
            mine = {name for name, split in splits.items() if (split == "test") == (part == "Ts")}
            for kind, ending in (("images", f"_0000{self.ending}"), ("labels", self.ending)):
                sub = self.folder / f"{kind}{part}"
                for path in sorted(sub.iterdir()) if sub.is_dir() else ():
                    case = path.name.removesuffix(ending)
                    if case not in began or not path.name.endswith(ending):
                        raise _foreign(path)
                    if case not in mine:
                        path.unlink()
                if part == "Ts" and not mine and sub.is_dir():
                    sub.rmdir()
        for case in began - set(splits):
            self.record(case).unlink()


def _foreign(path: Path) -> DatasetError:
    return DatasetError(
        "a file that the import did not write",
        got=path,
        expected="imported cases alone",
        remedy="Move it elsewhere and run the same command again.",
    )


def dataset_folder(dataset_id: int, name: str, *, raw: Path, others: Collection[Path] = ()) -> Path:
    """The folder of a new raw dataset, which need not exist yet.

    Args:
        dataset_id: From 1 to 999.
        name: What follows ``Dataset101_``.
        raw: The folder that ``nnUNet_raw`` names.
        others: nnU-Net's other folders, where the id must be free too.

    Raises:
        UsageError: An id or name that nnU-Net cannot take.
        DatasetError: The id belongs to a dataset of another name.
    """
    if not 1 <= dataset_id <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UsageError(
            "an impossible id or name",
            got=f"{dataset_id}, {name!r}",
            expected="an id from 1 to 999; letters, digits, hyphens and underscores",
            remedy="Correct -d or --name.",
        )
    full_name = f"Dataset{dataset_id:03d}_{name}"
    taken = [d for root in (raw, *others) for d in sorted(root.glob(f"Dataset{dataset_id:03d}_*"))]
    taken = [d for d in taken if d.name != full_name]
    if taken:
        raise DatasetError(
            "a dataset id that is taken",
            got=f"{dataset_id}: {taken[0]}",
            expected="an id that no dataset has",
            remedy="Choose another one with -d.",
        )
    return raw / full_name


@contextmanager
def claim_folder(folder: Path, settings: Mapping[str, Any], *, ending: str = ENDING) -> Iterator[ImportState]:
    """Make a folder ours for one import, new or continued, for the length of the block.

    ``dataset.json`` is removed at the start, since cases may change; the block writes it as its last act. What is kept
    for continuing disappears when the block ends without an error. The lock file stays.

    Raises:
        DatasetError: The folder holds something else, or an import with other settings.
        CommandError: Another import is at work there.
    """
    _check_ours(folder, settings)  # before anything is written there
    state = folder / _STATE
    with locked(folder / _LOCK, "import into the same dataset"):
        _check_ours(folder, settings)  # another import may have ended in between
        state.mkdir(exist_ok=True)
        for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs", _STATE, "."):
            remove_leftovers(folder / sub, "*")
        if not (state / _SETTINGS).exists():
            _restore_records(folder, ImportState(folder))
            write_json(settings, state / _SETTINGS)
        (folder / "dataset.json").unlink(missing_ok=True)
        yield ImportState(folder, ending)
        # First, so that a kill from here on makes the next run take all records from the report.
        (state / _SETTINGS).unlink()
        shutil.rmtree(state)


def _check_ours(folder: Path, settings: Mapping[str, Any]) -> None:
    known = _known_settings(folder, settings)
    if known == settings or not folder.exists():
        return
    others = [entry for entry in folder.iterdir() if entry.name not in (_STATE, _LOCK)]
    if known is None and not others:
        return
    detail = "no import of this kind"
    if known is not None:
        detail = "an import with other " + ", ".join(key for key in settings if known.get(key) != settings[key])
    raise DatasetError(
        "a dataset that is there already",
        got=f"{folder}: {detail}",
        expected="nothing, or an import with the same settings, to continue",
        remedy="Choose another id with -d, or remove the folder.",
    )


def _known_settings(folder: Path, like: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the import that a folder holds, finished or not."""
    for path in (folder / _STATE / _SETTINGS, folder / REPORT_NAME):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {key: content.get(key) for key in like}
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _restore_records(folder: Path, state: ImportState) -> None:
    """Take the records of a finished import out of its report again."""
    try:
        cases = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["cases"]
    except FileNotFoundError:
        return
    for name, record in cases.items():
        write_json(record, state.record(name))
