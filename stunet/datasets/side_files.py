"""Files that lie beside ``dataset.json`` and are needed beside the preprocessed data too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet.errors import DatasetError
from stunet.files import atomic_path, remove_leftovers
from stunet.labels import MANIFEST_NAME, AnnotationManifest, read_manifest

__all__ = ["SPLITS_NAME", "carry_new_files", "carry_side_files", "has_annotations", "read_annotations"]

SPLITS_NAME = "splits_final.json"
"""Name of nnU-Net's file with the folds, which it reads from the preprocessed folder alone."""


def carry_side_files(
    raw: str | os.PathLike[str], preprocessed: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Copy manifest and folds from a dataset's raw folder into its preprocessed one.

    Args:
        raw: For example ``$nnUNet_raw/Dataset101_TotalSegmentator``.
        preprocessed: The folder of the same name in ``nnUNet_preprocessed``; made where it does not exist.
        overwrite: Whether files that differ are replaced. Otherwise they are left alone: they may belong to data that
            was preprocessed before the raw dataset changed.

    Returns:
        The files that differ and were left alone.
    """
    raw, preprocessed = Path(raw), Path(preprocessed)
    left = []
    for name in (MANIFEST_NAME, SPLITS_NAME):
        source, target = raw / name, preprocessed / name
        content = source.read_bytes() if source.is_file() else None
        present = target.read_bytes() if target.is_file() else None
        if content == present or (content is None and name == SPLITS_NAME):
            continue  # nnU-Net makes folds of its own where the raw folder has none
        if present is not None and not overwrite:
            left.append(target)
        elif content is None:
            target.unlink()
        else:
            preprocessed.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                temporary.write_bytes(content)
    return left


def carry_new_files(folder: Path, preprocessed: str | os.PathLike[str] | None) -> list[Path]:
    """Carry what an import has just written, and tidy up after one that was killed.

    Args:
        folder: The dataset's folder in ``nnUNet_raw``.
        preprocessed: ``nnUNet_preprocessed``; None where it is not known.

    Returns:
        The files that differ and were left alone.
    """
    if preprocessed is None:
        return []
    target = Path(preprocessed) / folder.name
    for name in (MANIFEST_NAME, SPLITS_NAME):
        remove_leftovers(target, name)
    return carry_side_files(folder, target)


def has_annotations(dataset_name: str) -> bool:
    """Whether a dataset has a manifest, raw or preprocessed; without one every case annotates everything.

    Args:
        dataset_name: For example ``Dataset101_TotalSegmentator``.
    """
    folders = [os.environ.get(variable) for variable in ("nnUNet_raw", "nnUNet_preprocessed")]
    return any((Path(folder) / dataset_name / MANIFEST_NAME).is_file() for folder in folders if folder)


def read_annotations(dataset_name: str, dataset_json: Mapping[str, Any]) -> AnnotationManifest:
    """What the cases of a preprocessed dataset annotate; what trainers call, in the process of rank 0 first.

    The preprocessed folder's manifest counts, since it belongs to the data beside it. Where that folder has none and
    the raw one has, that is carried over, with the folds; so it is when the dataset was preprocessed before
    ``nnUNet_preprocessed`` had a copy. Where both have one and they differ, nobody but the user can know whether the
    data was preprocessed before or after the change, and training on the wrong one would teach that annotated
    structures are background.

    Args:
        dataset_name: For example ``Dataset101_TotalSegmentator``.
        dataset_json: Content of the dataset's ``dataset.json``.

    Raises:
        DatasetError: Raw and preprocessed manifest differ.
        LabelError: The manifest is malformed, or does not fit ``dataset.json``.
    """
    raw, preprocessed = (
        Path(value) / dataset_name if (value := os.environ.get(variable)) else None
        for variable in ("nnUNet_raw", "nnUNet_preprocessed")
    )
    # Training may run where the raw data is not; then there is nothing to compare with.
    if raw is not None and preprocessed is not None and (raw / "dataset.json").is_file():
        _carry_or_refuse(raw, preprocessed)
    folder = preprocessed or raw
    if folder is None:
        raise DatasetError(
            "nnU-Net's folders are not known",
            got="neither nnUNet_raw nor nnUNet_preprocessed",
            expected="at least one of these variables",
            remedy="Set them.",
        )
    return read_manifest(folder / MANIFEST_NAME, labels=dataset_json["labels"])


def _carry_or_refuse(raw: Path, preprocessed: Path) -> None:
    ours = [path for path in carry_side_files(raw, preprocessed) if path.name == MANIFEST_NAME]
    if not ours:
        return
    old, new = _content(ours[0]), _content(raw / MANIFEST_NAME)
    if old == new and old is not None:  # other bytes, same meaning
        return
    changed = "it was removed" if new is None else _first_difference(old or {}, new)
    raise DatasetError(
        "annotations that have changed since they were carried into the preprocessed folder",
        got=f"{ours[0]} differs from {raw / MANIFEST_NAME}: {changed}",
        expected="the same in both",
        remedy="Preprocess again if label maps changed too (nnUNetv2_preprocess). Then, or if only the list was "
        f"mended: stunet labels carry -d {raw.name}",
    )


def _content(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            entry = next(name for name in sorted({*a, *b}) if a.get(name) != b.get(name))
            return f"{key}, {entry}"
        if a != b:
            return key
    return "they cannot be compared"
