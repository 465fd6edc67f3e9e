from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from stunet.datasets.phantoms import PHANTOM_LABELS, make_phantom, write_phantom_dataset, write_phantom_masks
from stunet.datasets.raw import hold_out, read_image, read_raw_dataset
from stunet.errors import DatasetError


def test_phantoms_are_told_apart_by_seed_and_case() -> None:
    a, b = make_phantom(1, 2), make_phantom(1, 2)
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.segmentation, b.segmentation)
    for other in (make_phantom(1, 3), make_phantom(2, 2)):
        assert a.image.shape != other.image.shape or not np.array_equal(a.image, other.image)


@pytest.mark.parametrize("case", range(5))
def test_phantoms_look_like_ct_and_attenuation_alone_does_not_tell_organs_apart(case: int) -> None:
    phantom = make_phantom(0, case)
    assert phantom.image.shape == phantom.segmentation.shape
    assert set(np.unique(phantom.segmentation)) == set(PHANTOM_LABELS.values())
    voxels = {name: phantom.image[phantom.segmentation == value] for name, value in PHANTOM_LABELS.items()}
    assert all(60 < organ.mean() < 260 for name, organ in voxels.items() if name != "background")
    for a, b in (("liver", "spleen"), ("spleen", "kidneys"), ("kidneys", "aorta"), ("aorta", "spine")):
        assert np.percentile(voxels[a], 98) > np.percentile(voxels[b], 2), (a, b)
    assert phantom.image[:, 0, 0].mean() == pytest.approx(-1000, abs=20)
    assert max(phantom.spacing) > 1.3 * min(phantom.spacing)


def test_written_phantoms_pass_nnunets_own_check_and_are_equal_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("Dataset001_A", "Dataset001_B"):
        write_phantom_dataset(tmp_path / name, n_training=5, n_test=1, seed=3)
        verify_dataset_integrity(str(tmp_path / name), num_processes=1)
        files = sorted((tmp_path / name).rglob("*.nii.gz"))
        assert [len(list((tmp_path / name / sub).iterdir())) for sub in ("imagesTr", "labelsTr", "imagesTs")] == [
            5,
            5,
            1,
        ]
        hashes.append(
            [hashlib.sha256(sitk.GetArrayFromImage(sitk.ReadImage(str(f))).tobytes()).digest() for f in files]
        )
    assert hashes[0] == hashes[1]
    image, properties = read_image(tmp_path / "Dataset001_A" / "imagesTs" / "phantom_005_0000.nii.gz")
    phantom = make_phantom(3, 5)
    assert properties["spacing"] == pytest.approx(phantom.spacing)
    assert np.array_equal(image, np.round(phantom.image))


def test_holding_out_leaves_training_images_in_place(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "Dataset001_A", n_training=8, n_test=0, seed=0)
    dataset = read_raw_dataset(tmp_path / "Dataset001_A")
    new = tmp_path / "Dataset002_B"
    held_out = hold_out(dataset, new, n_held_out=2, seed=1)
    assert held_out == hold_out(dataset, tmp_path / "Dataset003_C", n_held_out=2, seed=1)
    assert not (new / "imagesTr").exists()
    again = read_raw_dataset(new)
    assert sorted([*again.cases, *held_out]) == sorted(dataset.cases)
    assert all(images == dataset.cases[case][0] for case, (images, _) in again.cases.items())
    verify_dataset_integrity(str(new), num_processes=1)
    for case in held_out:
        assert (new / "imagesTs" / f"{case}_0000.nii.gz").read_bytes() == dataset.cases[case][0][0].read_bytes()
        assert (new / "labelsTs" / f"{case}.nii.gz").read_bytes() == dataset.cases[case][1].read_bytes()


def test_the_real_dataset_is_read(shared: Path) -> None:
    dataset = read_raw_dataset(shared / "data" / "Dataset004_Hippocampus")
    assert len(dataset.cases) == 200
    assert dataset.dataset_json["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}


def test_too_few_cases_to_hold_out(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "Dataset001_A", n_training=5, n_test=0)
    with pytest.raises(DatasetError, match="too few cases: 5"):
        hold_out(read_raw_dataset(tmp_path / "Dataset001_A"), tmp_path / "b", n_held_out=1)


def test_incomplete_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_A"
    with pytest.raises(DatasetError, match="no such folder"):
        read_raw_dataset(folder)
    folder.mkdir()
    with pytest.raises(DatasetError, match="is not an nnU-Net raw dataset"):
        read_raw_dataset(folder)
    write_phantom_dataset(folder, n_training=2, n_test=0)
    (folder / "labelsTr" / "phantom_001.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"phantom_001\.nii\.gz is missing"):
        read_raw_dataset(folder)
    write_phantom_dataset(folder, n_training=2, n_test=0)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT", "1": "PET"}}))
    with pytest.raises(DatasetError, match="1 of 2 channels"):
        read_raw_dataset(folder)
    del content["labels"]
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="labels"):
        read_raw_dataset(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="is not an nnU-Net raw dataset"):
        read_raw_dataset(folder)


def test_phantoms_in_totalsegmentators_layout(tmp_path: Path) -> None:
    write_phantom_masks(tmp_path, n_training=10, n_test=2, seed=3, missing=0.4)
    lines = (tmp_path / "meta.csv").read_text().split()
    assert lines[0] == "image_id;split"
    splits = dict(line.split(";") for line in lines[1:])
    assert [splits[f"s{case:04d}"] for case in (0, 4, 9, 10, 11)] == ["train", "val", "val", "test", "test"]
    n_masks = {"train": 0, "val": 0, "test": 0}
    for case, split in splits.items():
        phantom = make_phantom(3, int(case[1:]))
        ct, properties = read_image(tmp_path / case / "ct.nii.gz")
        np.testing.assert_array_equal(ct[0] if ct.ndim == 4 else ct, np.round(phantom.image))
        assert properties["spacing"] == pytest.approx(phantom.spacing)
        for mask in (tmp_path / case / "segmentations").iterdir():
            n_masks[split] += 1
            value = PHANTOM_LABELS[mask.name.removesuffix(".nii.gz")]
            np.testing.assert_array_equal(read_image(mask)[0], phantom.segmentation == value)
    assert (n_masks["val"], n_masks["test"]) == (10, 10)  # annotated in full
    assert 12 <= n_masks["train"] <= 36  # of 40
