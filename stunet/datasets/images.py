"""Images without labels as a raw dataset: a folder, a BIDS tree, or a list of files. Images stay where they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from skimage.filters import threshold_otsu

from stunet.datasets.imports import ENDING, ImportCase, ImportReport, Record, case_files, run_import
from stunet.errors import DatasetError, reading
from stunet.files import fingerprint
from stunet.labels.labels import BACKGROUND, check_names
from stunet.volumes import check_finite, check_same_grid, read_volume, write_labels

IMAGE_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")
BODY = "body"
"""The only label: where there is something, so that nnU-Net can plan, and patches need not lie in the air."""

_FORMAT = 1
_AIR = -500  # HU; images that go below it are taken for CT


def find_images(source: str | os.PathLike[str], *, pattern: str = "*") -> dict[str, tuple[Path, ...]]:
    """Find the images of cases; several channels by suffix, as nnU-Net has it: ``NAME_0000.nii.gz``, ``NAME_0001…``.

    Args:
        source: A folder, whose subfolders count too (a BIDS tree without its ``derivatives``); or a text file with a
            path in each line, relative to it.
        pattern: Which file names count, for example ``*_T1w.nii.gz``.

    Returns:
        For each case its channels. It is named after its file; where two files have one name, after their folders too.

    Raises:
        DatasetError: No images, a channel that is missing, or cases of different numbers of channels.
    """
    source = Path(source)
    if source.is_dir():
        files = [path for path in sorted(source.rglob("*")) if "derivatives" not in path.relative_to(source).parts]
    else:
        with reading(source, "no folder and no list of images", DatasetError, "give one of them"):
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        files = [source.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    files = [path for path in files if fnmatch(path.name, pattern) and not path.name.startswith(".")]
    # A file in a list may be missing: it is named, and the others go on.
    files = [path for path in files if path.name.casefold().endswith(IMAGE_ENDINGS) and not path.is_dir()]
    if not files:
        raise DatasetError(f"no image in {source}: give {', '.join(IMAGE_ENDINGS)}, see --pattern")
    channels: dict[Path, dict[int, Path]] = {}
    for path in files:
        ending = next(e for e in IMAGE_ENDINGS if path.name.casefold().endswith(e))
        stem = path.name[: -len(ending)]
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
        case, channel = (path.with_name(numbered[1]), int(numbered[2])) if numbered else (path.with_name(stem), 0)
        if same := channels.setdefault(case, {}).get(channel):
            raise DatasetError(f"two files for channel {channel} of a case, {same} and {path}: leave one out")
        channels[case][channel] = path
    stems = [case.name for case in channels]
    root = Path(os.path.commonpath([case.parent for case in channels]))
    cases: dict[str, tuple[Path, ...]] = {}
    for case, found in channels.items():
        name = case.name if stems.count(case.name) == 1 else "_".join(case.relative_to(root).parts)
        if sorted(found) != [*range(len(found))]:
            raise DatasetError(f"{case}: channels {sorted(found)} instead of 0, 1, …: add what is missing")
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        if name in cases:
            raise DatasetError(f"two cases that would be called {name}, one of them {case}: rename one")
        cases[name] = tuple(found[channel].absolute() for channel in sorted(found))
    check_names(cases, source, DatasetError)
    numbers = {len(paths): name for name, paths in cases.items()}
    if len(numbers) > 1:
        (few, one), (more, other) = sorted(numbers.items())[:2]
        raise DatasetError(f"{one} has {few} channels, {other} has {more}: import them apart, see --pattern")
    return cases


@dataclass(frozen=True, kw_only=True)
class UnlabelledCase(ImportCase):
    """A case of images alone."""

    images: tuple[Path, ...]

    def source(self) -> Record:
        """Return the fingerprint."""
        return {"images": [str(path) for path in self.images], "source": fingerprint(self.images)}

    def write(self) -> Record:
        """Check the images; write where the first one is brighter than Otsu's threshold, as the label map."""
        first, *others = (read_volume(path) for path in self.images)
        for volume in (first, *others):
            check_finite(volume)
            check_same_grid(volume, first)
        values = first.values
        low, high = float(values.min()), float(values.max())
        if low == high:
            raise DatasetError(f"{first.path} has the same value everywhere: leave it out")
        body = (values > threshold_otsu(values)).astype(np.uint8)  # type: ignore[no-untyped-call]
        # On the image's grid, in a format that does not depend on the image's.
        header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), first.affine).header
        write_labels(body, replace(first, header=header), self.outputs[0])
        return {"voxels": {BODY: int(body.sum())}, "lowest": low}


def import_images(
    cases: Mapping[str, tuple[Path, ...]],
    folder: str | os.PathLike[str],
    *,
    channel_names: tuple[str, ...] = (),
    num_processes: int = 1,
    on_case: Callable[[str, bool], None] = lambda case, reused: None,
) -> ImportReport:
    """Make a raw dataset of unlabelled cases, or resume making it; no image is copied.

    Args:
        cases: As of :func:`find_images`.
        folder: The new dataset's folder in ``nnUNet_raw``.
        channel_names: By which nnU-Net chooses the normalization; by default ``CT`` where most cases have values below
            -500, or the channels' numbers.
        num_processes: Cases at a time.
        on_case: Called as a case is done, with its name and whether an earlier run had finished it.

    Raises:
        DatasetError: A folder that holds something else, or no case that could be read.
    """
    folder, n_channels = Path(folder), len(next(iter(cases.values())))
    if channel_names and len(channel_names) != n_channels:
        raise DatasetError(f"{len(channel_names)} channel names for {n_channels} channels: give one for each")
    jobs = [
        UnlabelledCase(name=name, images=images, annotated=(BODY,), outputs=case_files(folder, name)[1:])
        for name, images in cases.items()
    ]

    def describe(report: ImportReport) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]:
        lowest = [record["lowest"] for record in report.records.values()]
        is_ct = n_channels == 1 and float(np.median(lowest)) < _AIR
        names = channel_names or (("CT",) if is_ct else tuple(f"image {i}" for i in range(n_channels)))
        listed = {
            name: {"images": record["images"], "label": f"labelsTr/{name}{ENDING}"}
            for name, record in report.records.items()
        }
        described = {"channel_names": {str(i): name for i, name in enumerate(names)}, "numTraining": len(listed)}
        described |= {"labels": {BACKGROUND: 0, BODY: 1}, "file_ending": ENDING, "unlabelled": True}
        return {**described, "overwrite_image_reader_writer": "SimpleITKIO", "dataset": listed}, {}, {}

    return run_import(
        folder,
        {"format": _FORMAT, "kind": "images", "channel_names": list(channel_names)},
        jobs,
        describe,
        structures=[BODY],
        left_out=(),
        outputs_of=lambda name, record: case_files(folder, name)[1:] if name in cases else (),
        remedy="give other images",
        allow_unannotated=False,
        num_processes=num_processes,
        on_case=on_case,
    )
