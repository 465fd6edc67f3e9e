"""Masks per second of an import beside a loop of nibabel's get_fdata over the same masks: one JSON line. By hand.

python tests/benchmarks/import_throughput.py TOTALSEGMENTATOR_FOLDER [REPETITIONS]

On one core, by turns. Two sources: the folder as it is, and its case with the most masks at the size of a whole
scan (voxels repeated, noise added to the CT), as small images show mostly what a case costs once. The import also
reads, checks and copies the CT, writes and syncs, none of which the loop does: ``ratio_with_ct`` adds the CT to it,
``ratio_of_merging`` leaves all but the masks out of ours. Ratios with ``cpu`` count the process's own seconds, which a
busy machine disturbs less. Memory is the rise of a process's peak above what it held before, in volumes of one byte per
voxel.
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

from stunet.datasets import SourceCase, choose_structures, import_cases, read_totalsegmentator
from stunet.labels import merge_masks
from stunet.labels.nifti import open_volume

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


def compare(source: Path, workspace: Path, repetitions: int) -> dict[str, object]:
    found = read_totalsegmentator(source)
    _, structures = choose_structures(found, version="2")
    masks = [case.mask(name) for case in found.cases.values() for name in structures if name in case.masks]
    images = [case.ct for case in found.cases.values()]
    results: dict[str, list[float]] = {}
    for i in range(repetitions + 1):
        target = workspace / f"Dataset{i:03d}_A"
        ours = timed(partial(import_cases, list(found.cases.values()), structures, target, details={}))
        merging = timed(partial(merge_all, list(found.cases.values()), structures))
        of_masks, of_images = timed(partial(read_one_by_one, masks)), timed(partial(read_one_by_one, images))
        if i == 0:  # the first round fills the page cache
            continue
        row = {"masks_per_second": len(masks) / ours[0], "masks_per_second_merged": len(masks) / merging[0]}
        for kind, j in (("", 0), ("cpu_", 1)):
            row[f"{kind}ratio"] = of_masks[j] / ours[j]
            row[f"{kind}ratio_of_merging"] = of_masks[j] / merging[j]
            row[f"{kind}ratio_with_ct"] = (of_masks[j] + of_images[j]) / ours[j]
        for name, value in row.items():
            results.setdefault(name, []).append(value)
    return {
        "cases": len(images),
        "masks": len(masks),
        "million_voxels": round(sum(math.prod(nib.load(path).shape) for path in images) / 1e6, 1),
        **{name: spread(values) for name, values in results.items()},
    }


def read_one_by_one(paths: list[Path]) -> None:
    for path in paths:  # none is kept: a hundred would fill the memory, and their time would be the swap's
        nib.load(path).get_fdata()


def merge_all(cases: list[SourceCase], structures: list[str]) -> None:
    for case in cases:
        masks = [(i, case.mask(name)) for i, name in enumerate(structures, start=1) if name in case.masks]
        with open_volume(case.ct) as ct:
            merge_masks(masks, ct, len(structures))


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
from stunet.labels.mask_cases import MaskCase, import_case
source, out, n = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
masks = sorted((source / "segmentations").glob("*.nii.gz"))[:n]
masks = tuple((i, path.name, path) for i, path in enumerate(masks, 1))
job = MaskCase("a", "train", source / "ct.nii.gz", masks, n, out / "i", out / "l", out / "r", False)
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


def main() -> None:
    source, repetitions = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = read_totalsegmentator(source)
    largest = max(found.cases.values(), key=lambda case: len(case.masks))
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        enlarge(largest.folder, workspace / "enlarged" / largest.name)
        case = workspace / "enlarged" / largest.name
        result = {
            "benchmark": "import_throughput",
            "as_it_is": compare(source, workspace / "a", repetitions),
            "enlarged": compare(case.parent, workspace / "b", repetitions),
            "peak_volumes": {str(n): peak_volumes(case, workspace, n) for n in (1, 10, len(largest.masks))},
            "repetitions": repetitions,
            "cores": 1,
            "versions": {name: version(name) for name in ("stunet", "nibabel", "isal", "numpy")},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
