"""Coverage of a dataset: counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from masks import SHAPE, bind_manifest, save

from stunet.labels.annotations import measure_coverage

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3, "whole": 4, "ignore": 5}


def coverage_of(folder: Path, num_processes: int = 1, **options: Any) -> dict[str, Any]:
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
    files["w"] = folder / "w.nii.gz"
    return measure_coverage(manifest, files, ignore=5, num_processes=num_processes, **options)


def test_coverage_by_hand(tmp_path: Path) -> None:
    coverage = coverage_of(tmp_path)
    rows = [tuple(row.values()) for row in coverage["structures"]]
    assert rows == [("a", 1, 1, 2, 7), ("b", 2, 2, 1, 7), ("c", 3, 0, 1, 6), ("whole", 4, 1, 1, 4)]
    assert coverage["never_annotated"] == ["c"]
    assert coverage["never_present"] == []
    assert coverage["occurs_without_annotation"] == {"y": ["a"], "z": ["c"]}
    assert coverage["unknown_values"] == {"z": [9]}
    assert list(coverage["unreadable"]) == ["w"]
    assert "w.nii.gz" in str(coverage["unreadable"]["w"])


def test_sources_of_a_union_by_hand(tmp_path: Path) -> None:
    coverage = coverage_of(tmp_path, source_of={"w": "B", "x": "B", "y": "A", "z": "B", "gone": "C"})
    rows = [tuple(row.values()) for row in coverage["sources"]]
    assert rows == [  # w cannot be read; label 9 of z is no structure, and the ignore label of x neither
        ("A", 1, {"whole": 1}, {"a": 1, "whole": 1}),
        ("B", 2, {"a": 1, "b": 2}, {"a": 1, "b": 1, "c": 1}),
        ("C", 0, {}, {}),
    ]
    assert coverage["sources"][0] == {
        "name": "A", "cases": 1, "annotated": {"whole": 1}, "present": {"a": 1, "whole": 1}
    }  # fmt: skip
    swapped = coverage_of(tmp_path, source_of={"x": "A", "z": "B"})
    assert [set(row["annotated"]) - set(row["present"]) for row in swapped["sources"]] == [set(), {"b"}]  # z has no b
    assert coverage_of(tmp_path)["sources"] == []


def test_processes_change_nothing(tmp_path: Path) -> None:
    assert coverage_of(tmp_path, 2) == coverage_of(tmp_path, 1)


@pytest.mark.parametrize("annotated", [["a"], ["a", "b", "c"]])
def test_annotated_and_absent_is_not_the_same_as_not_annotated(tmp_path: Path, annotated: list[str]) -> None:
    save(np.ones(SHAPE, np.uint8), tmp_path / "x.nii.gz")
    labels = {name: LABELS[name] for name in ("background", "a", "b", "c")}
    manifest = bind_manifest({"version": 1, "cases": {"x": annotated}}, labels=labels, source="m.json")
    coverage = measure_coverage(manifest, {"x": tmp_path / "x.nii.gz"})
    absent = [name for name in "abc" if name in annotated and name != "a"]
    assert coverage["never_present"] == absent
    assert coverage["never_annotated"] == [name for name in "abc" if name not in annotated]
