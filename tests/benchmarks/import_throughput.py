"""Masks per second of an import beside a loop of nibabel's get_fdata over the same files: one JSON line. By hand.

python tests/benchmarks/import_throughput.py TOTALSEGMENTATOR_FOLDER [REPETITIONS]

On one core, by turns, in one process, whose start and imports count on neither side.

- The loop: ``nibabel.load(path).get_fdata()`` for each mask that the import reads, then for each CT. Nothing is kept.
- The import: all of ``import_cases`` into an empty folder. CTs and masks are unpacked and their checksums found right,
  grids compared, masks merged and overlaps counted, label maps packed, CTs copied (or hard links of them made:
  ``linked``), all of it synced and renamed, records, manifest, folds, report and dataset.json written.

``ratio`` is the loop's time over the import's: both read the same files once. ``ratio_masks_only`` leaves the CTs out
of the loop and not out of the import. Of what the import does, ``merging`` is unpacking and merging of the masks alone,
and ``unpacking_images`` reading the CTs to their end alone, which is what bounds an import of few masks for each CT.
Ratios with ``cpu`` count the process's own seconds, which a busy machine disturbs less.

Three sources: the folder as it is; its case with the most masks alone; and that case at the size of a whole scan
(voxels repeated, noise added to the CT), as small images show mostly what a case costs once. Memory is the rise of a
process's peak above what it held before, in volumes of one byte per voxel.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np

from stunet.datasets.totalsegmentator import (
    SourceCase,
    choose_structures,
    import_cases,
    merge_masks,
    read_totalsegmentator,
)
from stunet.volumes import read_volume

VOXELS = 12e6  # 1.5 mm scans of the trunk have about so many


def enlarge(case: Path, target: Path) -> None:
    image = nib.load(case / "ct.nii.gz")
    factors = [2, 2, max(1, round(VOXELS / (4 * math.prod(image.shape))))]

    def repeat(path: Path) -> np.ndarray:
        volume = np.asarray(nib.load(path).dataobj)
        for axis, n in enumerate(factors):
            volume = volume.repeat(n, axis)
        return volume

    (target / "segmentations").mkdir(parents=True)
    affine = image.affine @ np.diag([*(1 / n for n in factors), 1])
    ct = repeat(case / "ct.nii.gz")
    noise = np.random.default_rng(0).normal(0, 10, ct.shape)
    nib.save(nib.Nifti1Image((ct + noise).astype(np.int16), affine), target / "ct.nii.gz")
    for mask in sorted((case / "segmentations").glob("*.nii.gz")):
        nib.save(nib.Nifti1Image(repeat(mask), affine), target / "segmentations" / mask.name)


def compare(cases: list[SourceCase], structures: list[str], workspace: Path, repetitions: int) -> dict[str, object]:
    masks = [case.mask(name) for case in cases for name in structures if name in case.masks]
    images = [case.ct for case in cases]
    results: dict[str, list[float]] = {}
    for i in range(repetitions + 1):
        row = measure(cases, structures, workspace / f"round_{i}", masks, images)
        if i == 0:  # the first round fills the page cache
            continue
        for name, value in row.items():
            results.setdefault(name, []).append(value)
    return {
        "cases": len(images),
        "masks": len(masks),
        "million_voxels": round(sum(math.prod(nib.load(path).shape) for path in images) / 1e6, 1),
        **{name: spread(values) for name, values in results.items()},
    }


def measure(
    cases: list[SourceCase], structures: list[str], target: Path, masks: list[Path], images: list[Path]
) -> dict[str, float]:
    """One round: each side's time by the clock and of the process, and ratios of them."""
    ours = partial(import_cases, cases, structures, details={})
    copied = timed(partial(ours, target / "Dataset001_Copied"))
    of_masks, of_images = timed(partial(read_one_by_one, masks)), timed(partial(read_one_by_one, images))
    linked = timed(partial(ours, target / "Dataset002_Linked", link_images=True))
    merging, unpacking = timed(partial(merge_all, cases, structures)), timed(partial(unpack, images))
    row = {"masks_per_second": len(masks) / copied[0], "masks_per_second_of_loop": len(masks) / of_masks[0]}
    for kind, j in (("", 0), ("cpu_", 1)):
        loop = of_masks[j] + of_images[j]
        row |= {
            f"{kind}ratio": loop / copied[j],
            f"{kind}ratio_linked": loop / linked[j],
            f"{kind}ratio_masks_only": of_masks[j] / copied[j],
            f"{kind}ratio_masks_only_linked": of_masks[j] / linked[j],
            f"{kind}ratio_of_merging": of_masks[j] / merging[j],
            f"{kind}ratio_of_unpacking_images": of_images[j] / unpacking[j],
            f"{kind}share_of_unpacking_images": unpacking[j] / copied[j],
        }
    return row


def unpack(paths: list[Path]) -> None:
    for path in paths:
        read_volume(path)


def read_one_by_one(paths: list[Path]) -> None:
    for path in paths:  # none is kept: a hundred would fill the memory, and their time would be the swap's
        nib.load(path).get_fdata()


def merge_all(cases: list[SourceCase], structures: list[str]) -> None:
    for case in cases:
        masks = [(i, case.mask(name)) for i, name in enumerate(structures, start=1) if name in case.masks]
        merge_masks(masks, read_volume(case.ct), len(structures))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 2) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


MEMORY = """
import sys
from pathlib import Path
from stunet.datasets.imports import import_case
from stunet.datasets.totalsegmentator import MaskCase, SourceCase
source, out, n = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
names = tuple(sorted(path.name[:-7] for path in (source / "segmentations").glob("*.nii.gz"))[:n])
case = SourceCase("a", source, frozenset(names), "train")
outputs = (out / "i.nii.gz", out / "l.nii.gz")
job = MaskCase(name="a", outputs=outputs, annotated=tuple(names), case=case, structures=names, link=False)
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
import_case(job)
print(peak() - before)
"""


def peak_volumes(case: Path, workspace: Path, n_masks: int) -> float:
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(case), str(workspace), str(n_masks)], check=True, capture_output=True
    )
    return round(int(output.stdout) / math.prod(nib.load(case / "ct.nii.gz").shape), 2)


def cases_of(source: Path) -> tuple[list[SourceCase], list[str]]:
    found = read_totalsegmentator(source)
    return list(found.cases.values()), choose_structures(found, version="2")[1]


def main() -> None:
    source, repetitions = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cases, structures = cases_of(source)
    largest = max(cases, key=lambda case: len(case.masks))
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        case = workspace / "enlarged" / largest.name
        enlarge(largest.folder, case)
        result = {
            "benchmark": "import_throughput",
            "as_it_is": compare(cases, structures, workspace / "a", repetitions),
            "most_masks": compare([largest], structures, workspace / "b", repetitions),
            "enlarged": compare(*cases_of(case.parent), workspace / "c", repetitions),
            "peak_volumes": {str(n): peak_volumes(case, workspace, n) for n in (1, 10, len(largest.masks))},
            "repetitions": repetitions,
            "cores": 1,
            "versions": {name: version(name) for name in ("stunet", "nibabel", "isal", "numpy")},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
