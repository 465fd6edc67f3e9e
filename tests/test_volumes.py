"""Volumes on disk and masks merged: against nibabel, SimpleITK and plain loops."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from masks import AFFINE, SHAPE, save

from stunet.datasets.totalsegmentator import MergedMasks, merge_masks
from stunet.errors import DatasetError
from stunet.volumes import check_same_grid, count_labels, read_volume, write_labels

LARGE = (70, 65, 60)


def read_all(path: Path) -> np.ndarray:
    return read_volume(path).values


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", "<i4", ">i4", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_values_are_nibabels(tmp_path: Path, dtype: str, kind: type, ending: str) -> None:
    volume = np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)
    path = tmp_path / f"a.{ending}"
    header = kind.header_class(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(np.dtype(dtype))
    nib.save(kind(volume, AFFINE, header), path)
    assert np.array_equal(read_all(path), nib.load(path).get_fdata())


def test_scaling_and_trailing_axes_are_nibabels(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4, 1), AFFINE)
    image.header.set_slope_inter(0.25, -2)
    nib.save(image, tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata()[..., 0]
    assert np.abs(expected).max() > 0
    assert np.array_equal(read_all(tmp_path / "a.nii.gz"), expected)


def test_gzip_files_of_several_members(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 2, LARGE).astype(np.uint8)
    save(volume, tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(
        b"".join(gzip.compress(content[i : i + 99999]) for i in range(0, 400000, 99999))
    )
    assert np.array_equal(read_all(tmp_path / "a.nii.gz"), volume)


@pytest.mark.parametrize("cut", [0, 1, 60, 200, -9, -4, -1])
def test_truncated_files_are_named(tmp_path: Path, cut: int) -> None:
    save(np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.uint8), tmp_path / "a.nii.gz")
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[:cut])
    with pytest.raises(DatasetError, match=r"unreadable image file \S*a\.nii\.gz"):
        read_all(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("shape", [SHAPE, (96, 61, 179)])  # with its header, 2^20 bytes: the end of a buffer
def test_a_wrong_checksum_is_found(tmp_path: Path, shape: tuple[int, ...]) -> None:
    volume = np.random.default_rng(0).integers(0, 99, shape).astype(np.uint8)
    save(volume, tmp_path / "a.nii.gz")
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    content[-6] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(DatasetError, match="unreadable image file"):
        read_all(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("content", [b"", b"no image", bytes(400), gzip.compress(bytes(352), mtime=0)])
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(DatasetError, match="unreadable image file"):
        read_all(tmp_path / "a.nii.gz")
    with pytest.raises(DatasetError, match="missing image file"):
        read_all(tmp_path / "b.nii.gz")


def test_images_that_are_no_volumes(tmp_path: Path) -> None:
    save(np.zeros((*SHAPE, 2), np.uint8), tmp_path / "series.nii.gz")
    save(np.zeros(SHAPE, np.complex64), tmp_path / "complex.nii.gz")
    for name, expected in (("series", "not three axes"), ("complex", "not single numbers")):
        with pytest.raises(DatasetError, match=expected):
            read_all(tmp_path / f"{name}.nii.gz")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_written_maps_are_as_nibabel_and_simpleitk_read_them(tmp_path: Path, dtype: type) -> None:
    oblique = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-1.5, 0.8, 2.5]), [10.0, -20.0, 30.0]
    )
    image = nib.Nifti1Image(np.zeros(LARGE, np.int16), oblique)
    image.set_qform(oblique, 1)
    image.set_sform(oblique, 1)
    nib.save(image, tmp_path / "ct.nii.gz")
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, LARGE, dtype=dtype)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(labels, read_volume(tmp_path / "ct.nii.gz"), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    written = nib.load(tmp_path / "a.nii.gz")
    assert written.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(written.dataobj), labels)
    assert np.array_equal(written.affine, nib.load(tmp_path / "ct.nii.gz").affine)
    a, b = sitk.ReadImage(str(tmp_path / "a.nii.gz")), sitk.ReadImage(str(tmp_path / "ct.nii.gz"))
    assert (a.GetSpacing(), a.GetOrigin(), a.GetDirection()) == (b.GetSpacing(), b.GetOrigin(), b.GetDirection())
    assert np.array_equal(sitk.GetArrayFromImage(a), labels.T)
    assert a.GetPixelIDTypeAsString() in ("8-bit unsigned integer", "16-bit unsigned integer")


def test_grids_are_compared_at_the_corners(tmp_path: Path) -> None:
    def compare(affine: np.ndarray, shape: tuple[int, ...] = SHAPE) -> None:
        save(np.zeros(shape, np.uint8), tmp_path / "mask.nii.gz", affine=affine)
        check_same_grid(read_volume(tmp_path / "mask.nii.gz"), read_volume(tmp_path / "ct.nii.gz"))

    save(np.zeros(SHAPE, np.int16), tmp_path / "ct.nii.gz")
    compare(AFFINE + 1e-5)
    moved, stretched, flipped = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    moved[0, 3] += 0.06 * 1.5
    compare(moved - (moved - AFFINE) / 3)  # two thirds of it are within a twentieth of a voxel
    stretched[0, 0] *= 1.01  # 0.15 mm after ten voxels
    flipped[0, 0] *= -1
    for affine in (moved, stretched, flipped):
        with pytest.raises(DatasetError, match=r"mask\.nii\.gz lies .* mm elsewhere, .*, than \S*ct\.nii\.gz"):
            compare(affine)
    with pytest.raises(DatasetError, match=r"another shape, \(9, 11, 7\), than .*\(11, 9, 7\)"):
        compare(AFFINE, (9, 11, 7))


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", "<u2", "<i4", "<f4", ">f8"])
def test_masks_of_any_type(tmp_path: Path, dtype: str) -> None:
    inside = np.random.default_rng(1).random(LARGE) < 0.01
    save(np.zeros(LARGE, np.int16), tmp_path / "ct.nii.gz")
    header = nib.Nifti1Header(endianness=dtype[0] if dtype[0] == ">" else "<")
    header.set_data_dtype(np.dtype(dtype))
    nib.save(nib.Nifti1Image(inside.astype(dtype), AFFINE, header), tmp_path / "mask.nii.gz")
    merged = merge_masks([(7, tmp_path / "mask.nii.gz")], read_volume(tmp_path / "ct.nii.gz"), 255)
    assert merged.labels.dtype == np.uint8
    assert np.array_equal(merged.labels, 7 * inside)
    assert merged.voxels == {7: inside.sum()}


def test_scaled_masks_count_by_their_scaled_value(tmp_path: Path) -> None:
    stored = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE) % 2
    image = nib.Nifti1Image(stored, AFFINE)
    nib.save(image, tmp_path / "ct.nii.gz")
    content = bytearray(gzip.decompress((tmp_path / "ct.nii.gz").read_bytes()))
    content[112:120] = np.array([-1.0, 1.0], "<f4").tobytes()  # slope and intercept: stored 0 is inside alone
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(bytes(content)))
    assert np.array_equal(nib.load(tmp_path / "mask.nii.gz").get_fdata() > 0.5, stored == 0)
    merged = merge_masks([(1, tmp_path / "mask.nii.gz")], read_volume(tmp_path / "ct.nii.gz"), 300)
    assert merged.labels.dtype == np.uint16
    assert np.array_equal(merged.labels, stored == 0)


def test_a_label_map_is_no_mask(tmp_path: Path) -> None:
    save(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) % 4, tmp_path / "mask.nii.gz")
    with pytest.raises(DatasetError, match="values 1, 2, 3"):
        merge_masks([(1, tmp_path / "mask.nii.gz")], read_volume(tmp_path / "mask.nii.gz"), 4)


def test_scaling_that_gives_0_and_1(tmp_path: Path) -> None:
    """nibabel stores a mask of floats in 8 or 16 bits with a slope, by which its values are not quite 0 and 1."""
    inside = np.random.default_rng(0).random(SHAPE) < 0.1
    save(np.zeros(SHAPE, np.int16), tmp_path / "ct.nii.gz")
    for dtype in (np.uint8, np.int16):
        image = nib.Nifti1Image(inside.astype(np.float64), AFFINE)
        image.set_data_dtype(dtype)
        nib.save(image, tmp_path / "mask.nii.gz")
        assert set(np.unique(nib.load(tmp_path / "mask.nii.gz").get_fdata())) != {0, 1}
        merged = merge_masks([(1, tmp_path / "mask.nii.gz")], read_volume(tmp_path / "ct.nii.gz"), 255)
        assert np.array_equal(merged.labels, inside)


@pytest.mark.parametrize(
    ("dtype", "slope", "values", "expected"),
    [
        ("f4", (1, 0), (0.3, 0.5), "values 0.3, 0.5"),
        ("f4", (1, 0), (1, np.nan), "nan"),
        ("f4", (1, 0), (0.99999,), "values 0.99999"),
        ("i2", (1, 0), (-1,), "values -1"),
        ("u1", (1, 0), (1, 255), "values 1, 255"),
        ("u1", (1, 0), (7,), "values 7"),
        ("u1", (1, 1), (1,), "values 1, 2"),  # scl_inter fills the volume
        ("u1", (1, 1), (0,), "1 everywhere, by slope 1 and intercept 1"),
        ("u1", (0.5, 0), (1,), "values 0.5"),
    ],
)
def test_other_values_are_no_masks(
    tmp_path: Path, dtype: str, slope: tuple[float, float], values: tuple[float, ...], expected: str
) -> None:
    volume = np.zeros(SHAPE, dtype)
    volume.ravel()[: len(values)] = values
    save(volume, tmp_path / "ct.nii.gz")
    content = bytearray(gzip.decompress((tmp_path / "ct.nii.gz").read_bytes()))
    content[112:120] = np.array(slope, "<f4").tobytes()
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DatasetError, match=f"mask.nii.gz: .*{expected}"):
        merge_masks([(1, tmp_path / "mask.nii.gz")], read_volume(tmp_path / "ct.nii.gz"), 255)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_counting_labels(tmp_path: Path, name: str, dtype: type) -> None:
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / name))
    assert count_labels(tmp_path / name) == {v: int((labels == v).sum()) for v in range(4)}


def test_values_that_are_no_labels(tmp_path: Path) -> None:
    for value in (0.5, -1.0, np.nan, 1e9):
        volume = np.zeros(SHAPE, np.float32)
        volume[1, 2, 3] = value
        save(volume, tmp_path / "a.nii.gz")
        with pytest.raises(DatasetError, match="values that are no labels"):
            count_labels(tmp_path / "a.nii.gz")
    (tmp_path / "a.nrrd").write_text("no image")
    with pytest.raises(DatasetError, match="unreadable image file"):
        count_labels(tmp_path / "a.nrrd")


def merged_with(volumes: list[np.ndarray], folder: Path, first: int = 1, n_labels: int = 255) -> MergedMasks:
    """Label values from ``first`` on."""
    for i, volume in enumerate(volumes):
        save(volume, folder / f"{i}.nii.gz")
    save(np.zeros(volumes[0].shape, np.int16), folder / "ct.nii.gz")
    return merge_masks(
        [(i + first, folder / f"{i}.nii.gz") for i in range(len(volumes))], read_volume(folder / "ct.nii.gz"), n_labels
    )


@pytest.mark.parametrize("n_labels", [255, 256])
@pytest.mark.parametrize("ones", [1, 255])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 1), (8, 2, 1), (11, 9, 7), (65, 65, 65), (128, 64, 33)])
def test_painting_equals_a_plain_loop(tmp_path: Path, shape: tuple[int, ...], ones: int, n_labels: int) -> None:
    rng = np.random.default_rng(0)
    volumes = [(ones * (rng.random(shape) < share)).astype(np.uint8) for share in (0.3, 0.01, 0, 0.3, 0)]
    volumes[3][-1, -1, -1] = volumes[0][-1, -1, -1] = ones  # the last voxel of a word that is not full
    values = range(n_labels - 4, n_labels + 1)
    merged = merged_with(volumes, tmp_path, values[0], n_labels)
    labels, lost = np.zeros(shape, int), {}
    for value, volume in zip(values, volumes, strict=True):
        for other in np.unique(labels[volume > 0]).tolist():
            if other:
                lost.setdefault(other, {})[value] = int((labels[volume > 0] == other).sum())
        labels[volume > 0] = value
    assert merged.labels.dtype == (np.uint8 if n_labels == 255 else np.uint16)
    assert np.array_equal(merged.labels, labels)
    assert merged.voxels == {value: int((labels == value).sum()) for value in values}
    assert merged.overlaps == lost
    assert values[3] in lost[values[0]]


def test_each_blank_mask_is_compared_with_its_image(tmp_path: Path) -> None:
    blank = [np.zeros(SHAPE, np.uint8)] * 3
    assert merged_with(blank, tmp_path).voxels == {1: 0, 2: 0, 3: 0}
    moved = AFFINE.copy()
    moved[0, 3] += 1
    small = np.zeros((3, 4, 5), np.uint8)
    for volume, affine, expected in ((small, AFFINE, "another shape"), (blank[0], moved, "1 mm elsewhere")):
        save(volume, tmp_path / "2.nii.gz", affine=affine)
        with pytest.raises(DatasetError, match=expected):
            merge_masks([(i + 1, tmp_path / f"{i}.nii.gz") for i in range(3)], read_volume(tmp_path / "ct.nii.gz"), 3)
    (tmp_path / "2.nii.gz").write_bytes((tmp_path / "1.nii.gz").read_bytes()[:-1])
    with pytest.raises(DatasetError, match="unreadable image file"):
        merge_masks([(i + 1, tmp_path / f"{i}.nii.gz") for i in range(3)], read_volume(tmp_path / "ct.nii.gz"), 3)


@pytest.mark.parametrize("offset", [353, 357, 400])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_voxels_begin_where_nibabel_says(tmp_path: Path, offset: int, ending: str) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16), AFFINE)
    content = bytearray(image.to_bytes())
    content[108:112] = np.float32(offset).tobytes()
    content[352:352] = bytes(offset - 352)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    assert np.array_equal(read_all(path), nib.load(path).get_fdata())
    assert np.array_equal(read_all(path), image.get_fdata())


def test_voxels_do_not_begin_within_the_header(tmp_path: Path) -> None:
    """nibabel refuses 1 to 351, and of 0 it makes voxels of the header's own bytes."""
    for offset in (0, 1, 351):
        content = bytearray(nib.Nifti1Image(np.ones(SHAPE, np.int16), AFFINE).to_bytes())
        content[108:112] = np.float32(offset).tobytes()
        (tmp_path / "a.nii").write_bytes(content)
        with pytest.raises(DatasetError, match=r"unreadable image file \S*a\.nii"):
            read_all(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_volumes_larger_than_memory_are_refused_before_they_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = np.zeros((200, 200, 100), np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / name), useCompression=True)
    assert (tmp_path / name).stat().st_size < volume.nbytes / 100
    monkeypatch.setattr("stunet.volumes.available_bytes", lambda: volume.nbytes - 1)
    with pytest.raises(DatasetError, match=rf"{name} \(.*GB of voxels, more than .* memory"):
        count_labels(tmp_path / name)
    assert read_volume(tmp_path / name, header_only=True).voxels.shape == (100, 200, 200)
    monkeypatch.undo()
    assert count_labels(tmp_path / name) == {0: volume.size}
