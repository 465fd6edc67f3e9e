"""``stunet import union``, and what nnU-Net makes of a union."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from integration.commands import Shell, digests, edit_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from raw_datasets import AFFINE, SHAPE, voxels, write_raw

from stunet.datasets.phantoms import write_phantom_dataset

SIDED, WHOLE, UNION = "Dataset101_Sided", "Dataset004_Whole", "Dataset700_Union"
#: As write_phantom_dataset has them.
PHANTOM = {"liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5}


@pytest.fixture
def sources(shell: Shell) -> Path:
    """Sided: liver and each kidney, four cases. Whole: kidneys, spleen and aorta, three other cases."""
    raw = shell.raw
    for name, n, seed in ((SIDED, 4, 1), (WHOLE, 3, 2)):
        write_phantom_dataset(raw / name, n_training=n, n_test=0, seed=seed)
    for path in (raw / SIDED / "labelsTr").iterdir():
        image = nib.load(path)
        old = np.asarray(image.dataobj)
        right = np.arange(old.shape[0])[:, None, None] < old.shape[0] / 2  # of the patient
        new = np.select([old == 1, (old == 3) & ~right, (old == 3) & right], [1, 2, 3], 0)
        nib.save(nib.Nifti1Image(new.astype(np.uint8), image.affine, image.header), path)
    for path in (raw / WHOLE / "labelsTr").iterdir():
        image = nib.load(path)
        new = np.array([0, 0, 2, 1, 0, 3], np.uint8)[np.asarray(image.dataobj)]
        nib.save(nib.Nifti1Image(new, image.affine, image.header), path)
    for name, labels in ((SIDED, ["Liver", "left kidney", "kidney_r"]), (WHOLE, ["kidneys", "spleen", "aorta"])):
        values = {label: value for value, label in enumerate(["background", *labels])}
        edit_json(raw / name / "dataset.json", labels=values)
    return raw


def test_nnunet_checks_and_preprocesses_a_union(shell: Shell, sources: Path) -> None:
    before = {path: path.read_bytes() for path in sources.rglob("*") if path.is_file()}
    preview = shell.run("stunet import union -d 700 --from 101 4 --dry-run", only_stdout=True)
    (shell.root / "mapping.yaml").write_text(preview)
    assert "kidneys: kidney\n" in preview
    assert not (sources / UNION).exists()
    output = shell.run("stunet import union -d 700 --from 101 4 --mapping mapping.yaml --weights 4=0.25 -np 1")
    assert "7 cases" in output
    dataset = json.loads((sources / UNION / "dataset.json").read_text())
    labels = {name: i for i, name in enumerate(
        ["background", "liver", "kidney_left", "kidney_right", "spleen", "aorta", "kidney"])}  # fmt: skip
    assert dataset["labels"] == labels
    found = json.loads(shell.run("stunet labels check -d 700 --json -np 1", only_stdout=True))
    annotated = {"D101": {"liver", "kidney_left", "kidney_right"}, "D004": {"kidney", "spleen", "aorta"}}
    assert len(found["cases"]) == 7
    for case, content in found["cases"].items():
        assert set(content["annotated"]) == annotated[case[:4]]
        source = sources / (SIDED if case.startswith("D101") else WHOLE) / "labelsTr" / f"{case[5:]}.nii.gz"
        values = [1, 2, 3] if case.startswith("D101") else [6, 4, 5]
        names = {value: name for name, value in labels.items()}
        counts = np.bincount(voxels(source).ravel(), minlength=4)[1:]
        assert content["voxels"] == {names[v]: int(n) for v, n in zip(values, counts, strict=True) if n}
    rows = {row["name"]: row["annotated"] for row in found["structures"]}
    assert rows == {"liver": 4, "kidney_left": 4, "kidney_right": 4, "spleen": 3, "aorta": 3, "kidney": 3}
    assert (found["never_annotated"], found["occurs_without_annotation"]) == ([], {})
    assert [(row["name"], row["cases"], set(row["annotated"])) for row in found["sources"]] == [
        (WHOLE, 3, annotated["D004"]), (SIDED, 4, annotated["D101"])
    ]  # fmt: skip

    shell.run("nnUNetv2_plan_and_preprocess -d 700 --verify_dataset_integrity -c 3d_fullres -npfp 1 -np 1")
    preprocessed = shell.preprocessed / UNION
    manifest = (sources / UNION / "annotated_labels.json").read_bytes()
    assert (preprocessed / "annotated_labels.json").read_bytes() == manifest
    assert json.loads(manifest)["weights"] == {
        case: 0.5 if case.startswith("D101") else 0.25 for case in found["cases"]
    }
    cases = {path.stem.removesuffix("_seg") for path in (preprocessed / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd")}
    assert cases == set(found["cases"])
    for case in cases:
        segmentation, _ = SimpleITKIO().read_seg(str(preprocessed / "gt_segmentations" / f"{case}.nii.gz"))
        assert set(np.unique(segmentation)) <= {0, *(labels[name] for name in annotated[case[:4]])}
    assert {path: path.read_bytes() for path in before} == before


def test_labels_check_tells_the_sources_apart(shell: Shell) -> None:
    raw = shell.raw
    write_raw(raw / SIDED, {"background": 0, "liver": 1, "left kidney": 2}, ["a", "b"])
    write_raw(raw / WHOLE, {"background": 0, "spleen": 1}, ["c"])
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), raw / WHOLE / "labelsTr" / "c.nii.gz")
    shell.run("stunet import union -np 1 -d 700 --from 101 4")
    output = shell.run("stunet labels check -d 700 -np 1")
    table = output[output.index("Structures by source") :].splitlines()
    cells = [line.split() for line in table if "Dataset" in line]
    assert cells == [[WHOLE, "1", "1", "0", "spleen"], [SIDED, "2", "2", "2"]]
    assert json.loads(shell.run("stunet labels check -d 700 -np 1 --json", only_stdout=True))["sources"] == [
        {"name": WHOLE, "cases": 1, "annotated": {"spleen": 1}, "present": {}},
        {"name": SIDED, "cases": 2, "annotated": {"liver": 2, "kidney_left": 2},
         "present": {"liver": 2, "kidney_left": 2}},
    ]  # fmt: skip
    assert "Structures by source" not in shell.run("stunet labels check -d 101 -np 1")


def test_errors(shell: Shell, tmp_path: Path) -> None:
    raw = shell.raw
    write_raw(raw / SIDED, {"background": 0, "liver": 1, "kidney_left": 2}, ["a", "b"])
    write_raw(raw / WHOLE, {"background": 0, "spleen": 1}, ["c"])
    write_raw(raw / "Dataset005_Kidney", {"background": 0, "kidney": 1}, ["c"])
    (tmp_path / "m.yaml").write_text("superclasses: {liver: [spleen]}")

    before = digests(raw)
    for line, expected in (
        ("-d 700 --from 101 9", "9"),
        ("-d 700 --from 101 4 101", SIDED),
        ("-d 700 --from 101 Dataset101_Sided", SIDED),
        ("-d 700 --from 101", "1 datasets"),
        ("-d 101 --from 101 4", SIDED),
        ("-d 4 --name Whole --from 101 4", WHOLE),
        ("-d 700 --from 101 5", "kidney (Dataset005_Kidney) contains kidney_left (Dataset101_Sided)"),
        (f"-d 700 --from 101 4 --mapping {tmp_path}/m.yaml", "liver"),
        (f"-d 700 --from 101 4 --mapping {tmp_path}/n.yaml", "n.yaml"),
        ("-d 700 --from 101 4 --weights 7=1", "7"),
        ("-d 700 --from 101 4 --weights 101=0", "101"),
        ("-d 700 --from 101 4 --weights 101=1 101=2", "101"),
    ):
        shell.refuse(f"stunet import union -np 1 {line}", expected)
    assert digests(raw) == before
    (raw / SIDED / "labelsTr" / "b.nii.gz").write_bytes(b"broken")
    shell.refuse("stunet import union -np 1 -d 700 --from 101 4", "labelsTr/b.nii.gz")
    assert list(json.loads((raw / UNION / "dataset.json").read_text())["dataset"]) == ["D004_c", "D101_a"]
    shell.run("stunet labels check -d 700 -np 1")
