"""``stunet predict`` as it is typed: single images, DICOM series, the model's spacing, and what the manifest says."""

from __future__ import annotations

import inspect
import json
import locale
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from prediction_models import smooth_image, write_image, write_model

import stunet
from stunet.cli.main import main
from stunet.files import file_sha256

SPACING = (1.5, 0.7, 0.8)
IMAGE = smooth_image((14, 30, 26))
UID = "1.2.826.0.1.3680043.2.1125.1"
#: An oblique grid: X along the first row, and so on.
AXES = np.linalg.qr(np.array([[1.0, 0.2, -0.1], [-0.2, 1.0, 0.3], [0.1, -0.3, 1.0]]))[0]
AXES = AXES * np.sign(np.diag(AXES)) * [1, 1, np.linalg.det(AXES * np.sign(np.diag(AXES)))]


def type_command(*args: object) -> int:
    """Run ``stunet predict`` in this process and return its exit status."""
    before, sys.argv = sys.argv, ["stunet", "predict", *map(str, args), "-device", "cpu", "-npp", "0", "-nps", "0"]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert type_command(*args) == 2
    said = capsys.readouterr().err
    assert "error:" in said
    return said


def read(path: Path) -> Any:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def write_series(
    folder: Path, array: Any = IMAGE, uid: str = UID, change: Callable[[int, dict[str, str]], None] | None = None
) -> list[Path]:
    """Write an array as DICOM slices, whose names and instance numbers are in another order than their positions."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    paths = []
    encoding = locale.setlocale(locale.LC_CTYPE)
    for i, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((SPACING[2], SPACING[1]))
        position = np.array([5.0, -7.0, 3.0]) + AXES[:, 2] * SPACING[0] * i
        tags = {
            "0008|0060": "CT", "0008|103e": f"thorax {len(array)}", "0020|000d": "1.2.3", "0020|000e": uid,
            "0008|0018": f"{uid}.{i}", "0020|0013": str(len(array) - i), "0028|1053": "1", "0028|1052": "-1024",
            "0020|0032": "\\".join(f"{v:.10f}" for v in position),
            "0020|0037": "\\".join(f"{v:.10f}" for v in AXES[:, :2].T.ravel()),
        }  # fmt: skip
        if change is not None:
            change(i, tags)
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        paths.append(folder / f"{(i * 5) % 14:03d}_{uid[-1]}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, encoding)  # writing DICOM, unlike reading it, sets another one
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", num_classes=5, spacing=(1.4, 1.1, 1.2))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Any:
    """Labels of :data:`IMAGE`, from a folder in nnU-Net's layout."""
    root = tmp_path_factory.mktemp("expected")
    write_image(root / "images" / "a_0000.nii.gz", IMAGE, SPACING)
    assert type_command("-i", root / "images", "-o", root / "out", "-m", model) == 0
    labels = read(root / "out" / "a.nii.gz")
    assert len(np.unique(labels)) > 3
    return labels


@pytest.mark.parametrize(
    ("names", "given", "cases"),
    [
        (["ct.nii.gz"], "ct.nii.gz", ["ct"]),
        (["ct_0000.nii"], "ct_0000.nii", ["ct"]),
        (["ct.mha"], "ct.mha", ["ct"]),
        (["ct.nrrd"], "ct.nrrd", ["ct"]),
        (["scan_2024.nii.gz", "b.mha"], ".", ["b", "scan_2024"]),
        (["a_0000.nrrd", "mask.nii.gz"], ".", ["a"]),
    ],
)
def test_images_of_any_format_and_name(
    model: Path, expected: Any, tmp_path: Path, names: Sequence[str], given: str, cases: Sequence[str]
) -> None:
    for name in names:
        write_image(tmp_path / "images" / name, IMAGE, SPACING)
    assert type_command("-i", tmp_path / "images" / given, "-o", tmp_path / "out", "-m", model, "--statistics") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{case}.nii.gz" for case in cases]
    for case in cases:
        assert np.array_equal(read(tmp_path / "out" / f"{case}.nii.gz"), expected)


def test_inputs_that_cannot_be_meant(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.nii.gz", "a.mha"):
        write_image(tmp_path / "two" / name, IMAGE)
    (tmp_path / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    for given, words in (
        (tmp_path / "two", "a.mha and a.nii.gz"),
        (tmp_path / "notes.txt", "no images for this model"),
        (tmp_path / "nowhere", "is missing"),
    ):
        assert words in refused(capsys, "-i", given, "-o", out, "-m", model)
    assert "--series" in refused(capsys, "-i", tmp_path / "two" / "a.mha", "-o", out, "-m", model, "--series", UID)
    two_channels = write_model(tmp_path / "model", num_classes=3, n_channels=2)
    said = refused(capsys, "-i", tmp_path / "two" / "a.mha", "-o", out, "-m", two_channels)
    assert "CASE_0000.nii.gz to CASE_0001.nii.gz" in said
    assert not out.exists()


def test_a_dicom_series_is_the_volume_that_it_makes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "patient")
    volume = sitk.GetImageFromArray(IMAGE)
    volume.SetSpacing(SPACING[::-1])
    volume.SetOrigin((5.0, -7.0, 3.0))
    volume.SetDirection(AXES.ravel().tolist())
    sitk.WriteImage(volume, str(tmp_path / "volume.nii.gz"))
    for given in ("patient", "volume.nii.gz"):
        options = ("-o", tmp_path / "out", "-m", model, "--statistics")
        assert type_command("-i", tmp_path / given, *options) == 0
    got, wanted = (sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz")) for case in ("patient", "volume"))
    assert len(np.unique(sitk.GetArrayFromImage(wanted))) > 3
    assert np.array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(wanted))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(got, get)(), getattr(wanted, get)(), atol=1e-5)
    statistics = [
        json.loads((tmp_path / "out" / "statistics" / f"{c}.json").read_text()) for c in ("patient", "volume")
    ]
    assert statistics[0] == statistics[1]
    assert "Predicted patient: 4 structures found" in capsys.readouterr().out


def test_of_several_series_one_is_chosen(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path / "patient")
    write_series(tmp_path / "patient", IMAGE[:2], uid=f"{UID}.7")
    out = ("-o", tmp_path / "out", "-m", model)
    said = refused(capsys, "-i", tmp_path / "patient", *out)
    assert f"{UID}  14 slices  thorax 14" in said
    assert f"{UID}.7  2 slices  thorax 2" in said
    assert f"--series {UID}\n" in said
    assert "2 others" in refused(capsys, "-i", tmp_path / "patient", *out, "--series", "1.2")
    assert type_command("-i", tmp_path / "patient", *out, "--series", UID) == 0
    assert read(tmp_path / "out" / "patient.nii.gz").shape == IMAGE.shape
    said = refused(capsys, "-i", tmp_path / "patient", *out, "--series", f"{UID}.7", "--continue")
    assert "other images" in said


def shift(amount: float, only: int | None = None, along: int = 2) -> Callable[[int, dict[str, str]], None]:
    def change(i: int, tags: dict[str, str]) -> None:
        if only in (None, i):
            position = np.array([float(v) for v in tags["0020|0032"].split("\\")])
            position += AXES[:, along] * amount * (1 if only is not None else i)
            tags["0020|0032"] = "\\".join(f"{v:.10f}" for v in position)

    return change


@pytest.mark.parametrize(
    ("change", "drop", "words"),
    [
        (None, 6, "but 3 mm between"),
        (shift(-1.5, only=4), None, "mm between"),
        (shift(0.9, only=4), None, "mm between"),
        (shift(0.4, along=1), None, "tilted gantry"),
        (lambda i, tags: tags.update({"0020|0037": "1\\0\\0\\0\\1\\0"}) if i == 3 else None, None, "orientation"),
        (lambda i, tags: tags.pop("0020|0032"), None, "no regular volume"),
        (shift(0.1, only=4), None, None),  # as rounded positions have it
    ],
    ids=["missing", "doubled", "uneven", "tilted", "turned", "nowhere", "rounded"],
)
def test_a_series_must_be_a_regular_volume(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, drop: int | None, words: str | None
) -> None:
    paths = write_series(tmp_path / "patient", change=change)
    if drop is not None:
        paths[drop].unlink()
    status = type_command("-i", tmp_path / "patient", "-o", tmp_path / "out", "-m", model)
    assert (status == 0) == (words is None)
    assert words is None or words in capsys.readouterr().err
    assert (tmp_path / "out" / "patient.nii.gz").exists() == (words is None)


def test_a_file_as_output(model: Path, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "ct.nii.gz", IMAGE, SPACING)
    out = tmp_path / "new" / "labels.nii.gz"
    assert type_command("-i", tmp_path / "ct.nii.gz", "-o", out, "-m", model) == 0
    assert np.array_equal(read(out), expected)
    assert sorted(path.name for path in out.parent.iterdir()) == ["labels.manifest.json", "labels.nii.gz"]
    assert set(json.loads((out.parent / "labels.manifest.json").read_text())["cases"]) == {"ct"}
    write_image(tmp_path / "two" / "a.nii.gz", IMAGE, SPACING)
    write_image(tmp_path / "two" / "b.nii.gz", IMAGE, SPACING)
    other = tmp_path / "other.nii.gz"
    assert "2 images" in refused(capsys, "-i", tmp_path / "two", "-o", other, "-m", model)
    assert "no folder" in refused(capsys, "-i", tmp_path / "ct.nii.gz", "-o", other, "-m", model, "--masks")
    assert "no folder" in refused(capsys, "-i", tmp_path / "ct.nii.gz", "-o", tmp_path / "x.nii", "-m", model)
    assert type_command("-i", tmp_path / "ct.nii.gz", "-o", out, "-m", model) == 0
    (tmp_path / "mine.nii.gz").write_bytes(b"a reference")
    for place, words in (("ct.nii.gz", "would replace an image"), ("mine.nii.gz", "no prediction to replace")):
        before = (tmp_path / place).read_bytes()
        assert words in refused(capsys, "-i", tmp_path / "ct.nii.gz", "-o", tmp_path / place, "-m", model)
        assert (tmp_path / place).read_bytes() == before
    assert not list(tmp_path.glob("other*"))
    assert not list(tmp_path.glob(".scratch*"))


def test_a_prediction_passes_through_few_files(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "ct.nii.gz", IMAGE, SPACING)
    root, entered = str(Path(stunet.__file__).parent), set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(root) and code.co_flags & inspect.CO_OPTIMIZED:  # no body of a module or class
            entered.add(Path(code.co_filename).relative_to(root))

    sys.setprofile(enter)
    try:
        assert type_command("-i", tmp_path / "ct.nii.gz", "-o", tmp_path / "labels.nii.gz", "-m", model) == 0
    finally:
        sys.setprofile(None)
    assert len(entered) <= 18, sorted(map(str, entered))


READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")


@pytest.mark.parametrize("reader", READERS)
def test_voxels_at_the_models_spacing_lie_where_nnunets_preprocessing_has_them(
    tmp_path: Path, reader: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Images of coordinates, which nnU-Net crops and resamples: they come out as the coordinates of the new voxels."""
    shape, spacing = (18, 40, 36), (2.0, 0.7, 0.8)
    model = write_model(
        tmp_path / "model", num_classes=3, spacing=(1.5, 1.2, 1.3), image_reader_writer=reader,
        transpose_forward=[1, 2, 0], transpose_backward=[2, 0, 1],
    )  # fmt: skip
    grid = sitk.Image(*[int(n) for n in shape[::-1]], sitk.sitkFloat32)
    grid.SetSpacing(spacing[::-1])
    grid.SetOrigin((50.0, -70.0, 30.0))
    turned = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]) @ AXES
    grid.SetDirection(turned.ravel().tolist())
    points = np.array([grid.TransformIndexToPhysicalPoint(index[::-1]) for index in np.ndindex(*shape)])
    coordinates = points.reshape(*shape, 3).astype(np.float32) + 1000  # 0 is cropped
    plans_content = json.loads((model / "plans.json").read_text())
    content = plans_content["configurations"]["3d_fullres"]
    content["normalization_schemes"] = ["NoNormalization"]
    plans = PlansManager(plans_content)
    configuration = plans.get_configuration("3d_fullres")
    dataset_json = json.loads((model / "dataset.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    resampled = []
    for axis in range(3):
        values = coordinates[..., axis].copy()
        values[:3], values[:, :5], values[:, :, -4:] = 0, 0, 0
        image = sitk.GetImageFromArray(values)
        image.CopyInformation(grid)
        sitk.WriteImage(image, str(images / f"c{axis}_0000.nii.gz"))
        data, _, _ = configuration.preprocessor_class(verbose=False).run_case(
            [str(images / f"c{axis}_0000.nii.gz")], None, plans, configuration, dataset_json
        )
        resampled.append(np.asarray(data)[0].transpose(plans.transpose_backward) - 1000)
    assert type_command("-i", images, "-o", tmp_path / "out", "-m", model, "--lowres") == 0
    assert "Restored affine" not in "".join(capfd.readouterr())
    written = sitk.ReadImage(str(tmp_path / "out" / "c0.nii.gz"))
    assert sorted(written.GetSize()) == sorted(resampled[0].shape)
    assert np.allclose(sorted(written.GetSpacing()), sorted((1.2, 1.3, 1.5)), rtol=0.06)
    if "Reorient" in reader:  # which works in RAS, and writes in the image's own orientation
        written = sitk.DICOMOrient(written, "RAS")
    here = np.array([written.TransformIndexToPhysicalPoint(p[::-1]) for p in np.ndindex(*resampled[0].shape)])
    here = here.reshape(*resampled[0].shape, 3)
    inner = (slice(4, -4),) * 3
    for axis in range(3):
        assert np.abs(resampled[axis] - here[..., axis])[inner].max() < 0.02


def test_labels_at_the_models_spacing_are_the_largest_logits(
    model: Path, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE, SPACING)
    for options in (["--lowres"], []):
        out = tmp_path / ("low" if options else "full")
        command = ("-i", path.parent, "-o", out, "-m", model, "--statistics", "--masks", "--preview", *options)
        assert type_command(*command) == 0
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    configuration = predictor.configuration_manager
    data, _, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(path)], None, predictor.plans_manager, configuration, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(np.asarray(data)))
    low = sitk.ReadImage(str(tmp_path / "low" / "a.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(low), logits.argmax(0).numpy())
    voxel = np.prod(low.GetSpacing()) / 1000
    measured, full = (
        json.loads((tmp_path / out / "statistics" / "a.json").read_text()) for out in ("low", "full")
    )  # fmt: skip
    image = sitk.ReadImage(str(path), sitk.sitkFloat64)
    there = sitk.GetArrayFromImage(sitk.Resample(image, low, sitk.Transform(), sitk.sitkLinear, -1e6))
    for value in range(1, 5):
        of_structure = measured[f"structure_{value}"]
        inside = sitk.GetArrayFromImage(low) == value
        assert of_structure["voxels"] == inside.sum()
        assert of_structure["volume_ml"] == pytest.approx(inside.sum() * voxel, abs=1e-5)
        inside &= there > -1e6  # SimpleITK has no values beyond the centres of the outermost voxels
        mean = of_structure["mean_intensity"][0]
        assert mean == pytest.approx(there[inside].mean(), abs=12)
    volumes = [sum(s["volume_ml"] for s in of.values()) for of in (measured, full)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.05)
    mask = sitk.ReadImage(str(tmp_path / "low" / "a" / "segmentations" / "structure_1.nii.gz"))
    assert mask.GetOrigin() == low.GetOrigin()
    regions = write_model(
        tmp_path / "regions", num_classes=2, labels={"background": 0, "whole": [1, 2], "part": 2}
    )  # fmt: skip
    assert "--lowres" in refused(capsys, "-i", path.parent, "-o", tmp_path / "no", "-m", regions, "--lowres")


def test_the_manifest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for i in range(3):
        write_image(images / f"c{i}_0000.nii.gz", smooth_image((12, 13, 14), i), SPACING)
    (images / "c1_0000.nii.gz").write_bytes(b"damaged")
    command = ("-i", images, "-o", out, "-m", model)
    assert type_command(*command) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["versions"] == {name: version(name) for name in ("stunet", "nnunetv2", "torch")}
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    assert manifest["model"]["folder"] == str(model)
    assert manifest["model"]["checkpoints"]["0"]["sha256"] == file_sha256(checkpoint)
    assert manifest["model"]["licence"] is None
    assert manifest["started"] <= manifest["finished"]
    assert manifest["seconds"] > 0
    assert "cannot be read" in manifest["failures"]["c1"]
    assert set(manifest["cases"]) == {"c0", "c2"}
    for case, content in manifest["cases"].items():
        values, counts = np.unique(read(out / f"{case}.nii.gz"), return_counts=True)
        found = {entry["labels"][0]: entry for entry in content["structures"].values()}
        assert {label: entry["voxels"] for label, entry in found.items()} == {
            int(v): int(n) for v, n in zip(values, counts, strict=True) if v
        }
        for entry in found.values():
            assert entry["volume_ml"] == pytest.approx(entry["voxels"] * np.prod(SPACING) / 1000)

    del manifest["cases"]["c2"]  # as where a process was killed between the label map and the manifest
    (out / "manifest.json").write_text(json.dumps(manifest))
    write_image(images / "c1_0000.nii.gz", smooth_image((12, 13, 14), 1), SPACING)
    capsys.readouterr()
    assert type_command(*command, "--c") == 0
    assert "2 are finished already" in capsys.readouterr().out
    again = json.loads((out / "manifest.json").read_text())
    assert set(again["cases"]) == {"c0", "c1", "c2"}
    assert again["failures"] == {}
    for case in ("c0", "c2"):
        assert again["cases"][case]["structures"].keys() == {
            f"structure_{v}" for v in np.unique(read(out / f"{case}.nii.gz")) if v
        }
    shutil.rmtree(out)
    for part in (0, 1):
        assert type_command(*command, "-num_parts", 2, "-part_id", part) == 0
    assert [
        list(json.loads((out / f"manifest.{part}.json").read_text())["cases"]) for part in (0, 1)
    ] == [["c0", "c2"], ["c1"]]  # fmt: skip
    shared = json.loads((out / "manifest.json").read_text())
    assert set(shared) == {"settings", "images"}
    assert {key: again[key] for key in shared} == shared
    capsys.readouterr()
    for options in (["-num_parts", 2, "-part_id", 0], ["--c"]):  # the other part's predictions, or all, would stay
        assert "lowres: True" in refused(capsys, *command, "--lowres", *options)
    assert all((out / f"c{i}.nii.gz").exists() for i in range(3))
    assert type_command(*command, "--c") == 0
    assert set(json.loads((out / "manifest.json").read_text())["cases"]) == {"c0", "c1", "c2"}
    assert not (out / "manifest.0.json").exists()
