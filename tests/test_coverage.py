"""Coverage of a dataset: counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from masks import SHAPE, save

from stunet.labels import Coverage, bind_manifest, measure_coverage

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3, "whole": 4, "ignore": 5}


def coverage_of(folder: Path, num_processes: int = 1) -> Coverage:
    files = {}
    for case, voxels in {"x": {1: 5, 2: 7, 5: 3}, "y": {1: 2, 4: 4}, "z": {3: 6, 9: 1}}.items():
        volume = np.zeros(SHAPE, np.uint8)
        volume.ravel()[: sum(voxels.values())] = np.repeat(list(voxels), list(voxels.values()))
        save(volume, folder / f"{case}.nii.gz")
        files[case] = folder / f"{case}.nii.gz"
    (folder / "w.nii.gz").write_bytes(b"broken")
    content = {
        "version": 1,
        "cases": {"w": ["a"], "x": ["a", "b"], "y": ["whole"], "z": ["b"]},
        "superclasses": {"whole": ["a", "b"]},
    }
    manifest = bind_manifest(content, labels=LABELS, source="m.json")
    return measure_coverage(
        manifest, {**files, "w": folder / "w.nii.gz"}, ignore=5, num_processes=num_processes
    )  # fmt: skip


def test_coverage_by_hand(tmp_path: Path) -> None:
    coverage = coverage_of(tmp_path)
    rows = [(r.name, r.value, r.annotated, r.present, r.voxels) for r in coverage.structures]
    assert rows == [("a", 1, 1, 2, 7), ("b", 2, 2, 1, 7), ("c", 3, 0, 1, 6), ("whole", 4, 1, 1, 4)]
    assert coverage.never_annotated == ["c"]
    assert coverage.never_present == []
    assert coverage.contradictions == {"y": ["a"], "z": ["c"]}
    assert coverage.unknown_values == {"z": [9]}
    assert list(coverage.unreadable) == ["w"]
    assert "w.nii.gz" in str(coverage.unreadable["w"])


def test_processes_change_nothing(tmp_path: Path) -> None:
    assert coverage_of(tmp_path, 2).as_json() == coverage_of(tmp_path, 1).as_json()


@pytest.mark.parametrize("annotated", [["a"], ["a", "b", "c"]])
def test_annotated_and_absent_is_not_the_same_as_not_annotated(tmp_path: Path, annotated: list[str]) -> None:
    save(np.ones(SHAPE, np.uint8), tmp_path / "x.nii.gz")
    labels = {name: LABELS[name] for name in ("background", "a", "b", "c")}
    manifest = bind_manifest({"version": 1, "cases": {"x": annotated}}, labels=labels, source="m.json")
    coverage = measure_coverage(manifest, {"x": tmp_path / "x.nii.gz"})
    absent = [name for name in "abc" if name in annotated and name != "a"]
    assert coverage.never_present == absent
    assert coverage.never_annotated == [name for name in "abc" if name not in annotated]
