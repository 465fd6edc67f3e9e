"""What unions of datasets hold: against a plain remapping."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from raw_datasets import voxels, write_raw
from union_cases import A_LABELS, B_LABELS, NAMES, annotated, contents, dataset_json, run, write_sources

from stunet.datasets.unions import import_union, merge_sources, read_union_source, sources_of_cases
from stunet.errors import DatasetError
from stunet.labels.mappings import UnionMapping


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sources(tmp_path)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_label_maps_manifest_and_references(raw: Path, num_processes: int) -> None:
    before = contents(raw)
    report = run(raw, num_processes=num_processes)
    union = raw / "Dataset700_U"
    labels = ["background", "liver", "kidney_left", "kidney_right", "spleen", "liver tumour", "kidney"]
    cases = [f"D007_a{i}" for i in range(4)] + ["D123_x"]
    assert dataset_json(union) == {
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(labels)},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "dataset": {
            name: {
                "images": [f"../{NAMES[name == 'D123_x']}/imagesTr/{name[5:]}_0000.nii.gz"],
                "label": f"labelsTr/{name}.nii.gz",
            }
            for name in cases
        },
    }
    values = {NAMES[0]: [0, 1, 2, 3], NAMES[1]: [0, 6, 4, 5]}
    for name in cases:
        source = NAMES[name == "D123_x"]
        written = nib.load(union / "labelsTr" / f"{name}.nii.gz")
        original = nib.load(raw / source / "labelsTr" / f"{name[5:]}.nii.gz")
        assert np.array_equal(
            voxels(Path(written.get_filename())), np.array(values[source])[voxels(Path(original.get_filename()))]
        )
        assert written.get_data_dtype() == np.uint8
        for key in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "xyzt_units"):
            kept = slice(0, 4) if key == "pixdim" else ...
            assert np.array_equal(written.header[key][kept], original.header[key][kept]), key
    everything = {"a": labels[1:4], "x": ["spleen", "liver tumour", "kidney"]}
    assert annotated(union) == {name: everything[name[5]] for name in cases}
    manifest = json.loads((union / "annotated_labels.json").read_text())
    assert manifest["superclasses"] == {"kidney": ["kidney_left", "kidney_right"]}
    assert manifest["weights"] == {**dict.fromkeys(cases[:4], 0.5), "D123_x": 1.0}
    assert list(report.records) == cases
    assert (report.failed, report.left_out, report.kept, report.has_folds) == ({}, [], [], False)
    assert not list(union.rglob("*_0000*"))
    assert {k: v for k, v in contents(raw).items() if not k.startswith("Dataset700")} == before


def test_again_and_elsewhere_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    run(raw)
    first = contents(raw / "Dataset700_U")
    times = {p: p.stat().st_mtime_ns for p in (raw / "Dataset700_U" / "labelsTr").iterdir()}
    report = run(raw, num_processes=2)
    assert report.reused == 5
    assert contents(raw / "Dataset700_U") == first
    assert times == {p: p.stat().st_mtime_ns for p in times}
    moved = tmp_path / "moved"
    for name in NAMES:
        shutil.copytree(raw / name, moved / name, copy_function=shutil.copyfile)
    run(moved)
    assert contents(moved / "Dataset700_U") == first


def test_manifests_of_sources_count_case_by_case(raw: Path) -> None:
    manifest = {"groups": {"k": ["Left Kidney", "right kidney"]}, "cases": {"a0": ["liver"], "a1": "k"},
                "default": ["liver", "Left Kidney", "right kidney"]}  # fmt: skip
    write_raw(raw / NAMES[0], A_LABELS, [f"a{i}" for i in range(4)], manifest=manifest)
    run(raw)
    everything = ["liver", "kidney_left", "kidney_right"]
    assert annotated(raw / "Dataset700_U") == {
        "D007_a0": ["liver"], "D007_a1": ["kidney_left", "kidney_right"], "D007_a2": everything, "D007_a3": everything,
        "D123_x": ["spleen", "liver tumour", "kidney"],
    }  # fmt: skip


def test_a_structure_of_several_labels_is_annotated_where_all_of_them_are(raw: Path) -> None:
    manifest = {"cases": {"x": ["kidneys", "Spleen"], "y": ["kidneys", "liver tumour", "Spleen"], "z": ["Spleen"]}}
    write_raw(raw / NAMES[1], B_LABELS, ["x", "y", "z"], manifest=manifest)
    mapping = UnionMapping({123: {"kidneys": "organ", "liver tumour": "organ", "Spleen": "ignore"}}, None, "m.yaml")
    report = run(raw, mapping=mapping)
    union = raw / "Dataset700_U"
    labels = dataset_json(union)["labels"]
    assert (labels["organ"], labels["ignore"]) == (4, 5)
    assert report.left_out == ["D123_x", "D123_z"]
    assert annotated(union)["D123_y"] == ["organ"]
    original = voxels(raw / NAMES[1] / "labelsTr" / "y.nii.gz")
    assert np.array_equal(voxels(union / "labelsTr" / "D123_y.nii.gz"), np.array([0, 4, 5, 4])[original])
    assert not (union / "labelsTr" / "D123_x.nii.gz").exists()
    # Of x, "kidneys" alone says nothing certain about the organ. "liver tumour", which x has without annotating it, is
    # the source's contradiction: it stays, for "stunet labels check" to find.
    mapping = UnionMapping({123: {"kidneys": "organ", "liver tumour": "organ"}}, None, "m.yaml")
    run(raw, "Dataset701_U", mapping)
    assert annotated(raw / "Dataset701_U")["D123_x"] == ["spleen"]
    assert dataset_json(raw / "Dataset701_U")["labels"]["spleen"] == 5
    original = voxels(raw / NAMES[1] / "labelsTr" / "x.nii.gz")
    written = voxels(raw / "Dataset701_U" / "labelsTr" / "D123_x.nii.gz")
    assert np.array_equal(written, np.array([0, 0, 5, 4])[original])


def test_ignore_labels_become_one(raw: Path) -> None:
    write_raw(raw / NAMES[1], {**B_LABELS, "ignore": 4}, ["x"])
    run(raw)
    labels = dataset_json(raw / "Dataset700_U")["labels"]
    assert list(labels)[-2:] == ["kidney", "ignore"]
    assert labels["ignore"] == max(labels.values()) == 7
    original = voxels(raw / NAMES[1] / "labelsTr" / "x.nii.gz")
    assert np.array_equal(
        voxels(raw / "Dataset700_U" / "labelsTr" / "D123_x.nii.gz"), np.array([0, 6, 4, 5, 7])[original]
    )


def test_weights_keep_the_proportions_of_a_source(raw: Path) -> None:
    cases = [f"a{i}" for i in range(4)]
    manifest = {"cases": {}, "default": ["liver"], "weights": {"a0": 5}}
    write_raw(raw / NAMES[0], A_LABELS, cases, manifest=manifest)

    def weights() -> dict[str, float]:
        return dict(json.loads((raw / "Dataset700_U" / "annotated_labels.json").read_text())["weights"])

    run(raw, weights={NAMES[1]: 0.25}, allow_unannotated=True)
    # mean of 5, 1, 1, 1 is 2, and shall be 1 / sqrt(4)
    assert weights() == {"D007_a0": 1.25, "D007_a1": 0.25, "D007_a2": 0.25, "D007_a3": 0.25, "D123_x": 0.25}
    run(raw, weights={NAMES[1]: 3}, allow_unannotated=True)  # no other import: only the manifest changes
    assert weights()["D123_x"] == 3


def test_a_union_of_a_union(raw: Path) -> None:
    run(raw)
    write_raw(raw / "Dataset008_C", {"background": 0, "L1": 1, "kidney": 2}, ["c"])
    sources = [read_union_source(raw / name) for name in ("Dataset700_U", "Dataset008_C")]
    import_union(sources, merge_sources(sources), raw / "Dataset701_V")
    content = dataset_json(raw / "Dataset701_V")
    assert list(content["labels"]) == [
        "background", "liver", "kidney_left", "kidney_right", "spleen", "liver tumour", "vertebrae_L1", "kidney",
    ]  # fmt: skip
    assert content["dataset"]["D700_D123_x"]["images"] == ["../Dataset123_B/imagesTr/x_0000.nii.gz"]
    original = voxels(raw / NAMES[1] / "labelsTr" / "x.nii.gz")
    assert np.array_equal(
        voxels(raw / "Dataset701_V" / "labelsTr" / "D700_D123_x.nii.gz"), np.array([0, 7, 4, 5])[original]
    )
    assert annotated(raw / "Dataset701_V")["D700_D123_x"] == ["spleen", "liver tumour", "kidney"]
    assert annotated(raw / "Dataset701_V")["D008_c"] == ["vertebrae_L1", "kidney"]
    assert sources_of_cases(raw / "Dataset701_V", ["D700_D123_x", "D008_c", "D009_c", "c"]) == {
        "D700_D123_x": "Dataset700_U", "D008_c": "Dataset008_C"
    }  # fmt: skip
    assert sources_of_cases(raw / NAMES[0], ["D700_D123_x"]) == {}


def test_folds_are_carried_where_all_sources_have_them(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = {NAMES[0]: {"train": ["a2", "a0"], "val": ["a3"]}, NAMES[1]: {"train": ["x"], "val": []}}
    (raw / NAMES[0] / "splits_final.json").write_text(json.dumps([folds[NAMES[0]], {"train": ["a3"], "val": ["a0"]}]))
    assert not run(raw).has_folds
    (raw / NAMES[1] / "splits_final.json").write_text(json.dumps([folds[NAMES[1]]]))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    assert run(raw).has_folds
    expected = [{"train": ["D007_a0", "D007_a2", "D123_x"], "val": ["D007_a3"]}]
    for folder in (raw / "Dataset700_U", tmp_path / "preprocessed" / "Dataset700_U"):
        assert json.loads((folder / "splits_final.json").read_text()) == expected
    (raw / NAMES[1] / "splits_final.json").write_text(json.dumps([{"train": ["y"], "val": []}]))
    with pytest.raises(DatasetError, match=r"Dataset123_B\S* is .* cannot be used .*'y'"):
        run(raw)


def test_what_has_changed_since_is_done_again(raw: Path) -> None:
    run(raw)
    write_raw(raw / NAMES[0], A_LABELS, [f"a{i}" for i in range(3)])  # one case less
    shutil.copyfile(raw / NAMES[0] / "labelsTr" / "a0.nii.gz", raw / NAMES[0] / "labelsTr" / "a1.nii.gz")
    (raw / "Dataset700_U" / "labelsTr" / "D007_a2.nii.gz").write_bytes(b"damaged")
    assert run(raw).reused == 2
    run(raw, "Dataset701_U")
    assert contents(raw / "Dataset700_U") == contents(raw / "Dataset701_U")


def test_many_structures_take_two_bytes(raw: Path) -> None:
    write_raw(raw / NAMES[1], {"background": 0, **{f"s{i}": i for i in range(1, 300)}}, ["x"], dtype=np.int16)
    run(raw)
    written = nib.load(raw / "Dataset700_U" / "labelsTr" / "D123_x.nii.gz")
    original = voxels(raw / NAMES[1] / "labelsTr" / "x.nii.gz")
    assert written.get_data_dtype() == np.uint16
    assert original.max() > 255
    assert np.array_equal(np.asarray(written.dataobj), np.where(original, original + 3, 0))


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_other_file_endings(raw: Path, ending: str) -> None:
    for name, labels in zip(NAMES, (A_LABELS, B_LABELS), strict=True):
        shutil.rmtree(raw / name)
        write_raw(raw / name, labels, ["c"], file_ending=".nii")
        if ending != ".nii":
            for path in sorted((raw / name).rglob("*.nii")):
                image = sitk.ReadImage(str(path))
                sitk.WriteImage(image, str(path.with_suffix(ending)))
                path.unlink()
            text = (raw / name / "dataset.json").read_text()
            (raw / name / "dataset.json").write_text(text.replace(".nii", ending))
    for folder in ("Dataset700_U", "Dataset701_U"):
        run(raw, folder)
    union = raw / "Dataset700_U"
    assert contents(union) == contents(raw / "Dataset701_U")
    written, original = (
        sitk.ReadImage(str(path))
        for path in (union / "labelsTr" / f"D123_c{ending}", raw / NAMES[1] / "labelsTr" / f"c{ending}")
    )
    assert np.array_equal(sitk.GetArrayFromImage(written), np.array([0, 6, 4, 5])[sitk.GetArrayFromImage(original)])
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(written, geometry)(), getattr(original, geometry)(), rtol=1e-12)
    assert run(raw).reused == 2
    (raw / NAMES[0] / "labelsTr" / f"c{ending}").write_bytes(b"broken")
    assert list(run(raw).failed) == ["D007_c"]


def test_file_endings_in_upper_case(raw: Path) -> None:
    run(raw)
    for folder in (raw / NAMES[0], raw / NAMES[1]):
        for path in folder.rglob("*.nii.gz"):
            path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
        description = (folder / "dataset.json").read_text()
        (folder / "dataset.json").write_text(description.replace(".nii.gz", ".NII.GZ"))
    run(raw, "Dataset701_U")
    plain, upper = raw / "Dataset700_U" / "labelsTr", raw / "Dataset701_U" / "labelsTr"
    written = {path.name.replace(".NII.GZ", ".nii.gz"): path.read_bytes() for path in upper.iterdir()}
    assert written == contents(plain)
    assert dataset_json(upper.parent)["file_ending"] == ".NII.GZ"
