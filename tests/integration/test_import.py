"""``stunet import`` and ``stunet labels`` on generated and on real data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from integration.commands import Shell, digests, verify
from masks import AFFINE, SHAPE, random_masks, save, write_case, write_meta

from stunet.labels.labels import load_vocabulary

DATASET = "Dataset101_TotalSegmentator"


@pytest.mark.slow
def test_killed_with_all_its_processes_and_continued(shell: Shell, tmp_path: Path) -> None:
    structures = ("face", "heart_myocardium", "liver")
    for i in range(40):
        write_case(tmp_path / "source", f"s{i:04d}", random_masks(i, structures), i)
    write_meta(tmp_path / "source", {f"s{i:04d}": "train" if i < 35 else "val" for i in range(40)})
    line = f"stunet import totalsegmentator {tmp_path}/source --structures {','.join(structures)}"
    shell.run(f"{line} -d 102 --name Whole -np 1")
    dataset = tmp_path / "nnUNet_raw" / DATASET
    n_labels = 0

    def wrote_some(log: str) -> bool:
        return len(list((dataset / "labelsTr").glob("*.nii.gz"))) >= n_labels

    for n_labels in (1, 12):  # noqa: B007 - read by wrote_some
        shell.type_and_kill(f"{line} -d 101 -np 2", wrote_some)
        assert not (dataset / "dataset.json").exists()
    output = shell.run(f"{line} -d 101 -np 1")
    assert not re.search(r"\b0 (cases )?were finished before", output)
    assert digests(dataset) == digests(tmp_path / "nnUNet_raw" / "Dataset102_Whole")
    assert json.loads((tmp_path / "nnUNet_preprocessed" / DATASET / "splits_final.json").read_text())[0]["val"] == [
        f"s{i:04d}" for i in range(35, 40)
    ]


def test_bad_cases_exclusion_and_taken_ids(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i, name in enumerate(("s0001", "s0002", "s0864")):
        write_case(source, name, random_masks(i, ("face", "liver")), i)
    (source / "s0864" / "ct.nii.gz").write_bytes(b"corrupt")
    for name, file, value in (("s0003", "ct.nii.gz", np.nan), ("s0004", "segmentations/liver.nii.gz", 0.5)):
        write_case(source, name, random_masks(1, ("face", "liver")))
        save(np.full(SHAPE, value, np.float32), source / name / file)
    line = f"stunet import totalsegmentator {source} --structures face,liver -np 1"
    output = shell.run(f"{line} -d 101 --exclude s0003,s0004,s0864")
    assert "s0864" in output
    output = shell.run(f"{line} -d 102 --exclude none", status=2)
    for part in (
        "s0864/ct.nii.gz",
        "s0003/ct.nii.gz: 693 voxels are NaN",
        "s0004/segmentations/liver.nii.gz: values 0.5",
    ):
        assert part in output
    assert "Traceback" not in output
    for folder in (DATASET, "Dataset102_TotalSegmentator"):
        verify(shell.raw / folder)
    before = digests(tmp_path / "nnUNet_raw")
    for arguments, expected in (
        ("-d 101 --name Other", DATASET),
        ("-d 101 --label-order official", DATASET),
        ("-d 103 --group hearts", "hearts"),
        ("-d 103 --exclude s9999", "s9999"),
    ):
        shell.refuse(f"{line} {arguments}", expected)
    assert digests(tmp_path / "nnUNet_raw") == before


def test_labels_check_finds_labels_that_are_not_annotated(shell: Shell, tmp_path: Path) -> None:
    source, dataset = tmp_path / "source", tmp_path / "nnUNet_raw" / DATASET
    for i, name in enumerate(("a", "b")):
        write_case(source, name, random_masks(i, ("face", "liver", "spleen")), i)
    shell.run(f"stunet import totalsegmentator {source} -d 101 --structures face,liver,spleen -np 1")
    output = shell.run("stunet labels check -d 101 -np 1")
    assert "Every case annotates everything." in output
    assert "1 never present: spleen" in output
    manifest = json.loads((dataset / "annotated_labels.json").read_text())
    (dataset / "annotated_labels.json").write_text(json.dumps({**manifest, "cases": {"a": ["face"], "b": ["liver"]}}))
    output = shell.run("stunet labels check -d 101 -np 1", status=1)
    assert "a has liver and does not annotate it" in output
    assert "1 never annotated: spleen" in output
    preprocessed = tmp_path / "nnUNet_preprocessed" / DATASET / "annotated_labels.json"
    assert preprocessed.read_bytes() != (dataset / "annotated_labels.json").read_bytes()
    shell.run("stunet labels carry -d 101")
    assert preprocessed.read_bytes() == (dataset / "annotated_labels.json").read_bytes()
    for text, expected in (
        (json.dumps({"version": 1, "cases": {"a": ["lung"], "b": ["liver"]}}), "lung"),
        (json.dumps({"version": 1, "cases": {"a": ["face"], "z": ["liver"]}}), "'z'"),
        ("{", "annotated_labels.json"),
    ):
        (dataset / "annotated_labels.json").write_text(text)
        shell.refuse("stunet labels check -d 101 -np 1", expected)
    (dataset / "annotated_labels.json").unlink()
    save(np.zeros((2, 2, 2), np.uint8), dataset / "labelsTr" / "b.nii.gz", affine=AFFINE)
    (dataset / "labelsTr" / "a.nii.gz").write_bytes(b"broken")
    shell.refuse("stunet labels check -d 101 -np 1", "labelsTr/a.nii.gz")


def test_real_cases(shell: Shell, tmp_path: Path, shared: Path) -> None:
    source, dataset = shared / "data" / "totalsegmentator_mini", tmp_path / "nnUNet_raw" / DATASET
    shell.run(f"stunet import totalsegmentator {source} -d 101 -np 1")
    verify(dataset)
    got = json.loads(shell.run("stunet labels check -d 101 --json -np 1", only_stdout=True))
    masks = {case: {p.name[:-7] for p in (source / case / "segmentations").iterdir()} for case in got["cases"]}
    assert {case: set(content["annotated"]) for case, content in got["cases"].items()} == masks
    assert {case: len(names) for case, names in masks.items()} == {"s0000": 117, "s0001": 5, "s0002": 1, "s0003": 8}
    structures = sorted(load_vocabulary("totalsegmentator_v2").labels[1:])
    assert [row["name"] for row in got["structures"]] == structures
    assert {row["name"]: row["annotated"] for row in got["structures"]} == {
        name: sum(name in names for names in masks.values()) for name in structures
    }
    assert (got["never_annotated"], got["occurs_without_annotation"], got["unknown_values"]) == ([], {}, {})
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, **{name: i for i, name in enumerate(structures, start=1)}}
    splits = tmp_path / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    assert json.loads(splits.read_text()) == [{"train": ["s0000", "s0001", "s0002"], "val": ["s0003"]}]
    shutil.rmtree(dataset)
    line = (
        f"stunet import totalsegmentator {source} -d 101 -np 1 --group vertebrae --label-order official --images link"
    )
    shell.run(line)
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    assert list(labels)[:4] == ["background", "sacrum", "vertebrae_S1", "vertebrae_L5"]
    assert sorted(p.name for p in (dataset / "labelsTr").iterdir()) == ["s0000.nii.gz", "s0001.nii.gz", "s0003.nii.gz"]
