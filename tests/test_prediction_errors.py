"""Input that ``stunet predict`` cannot use: what is wrong is said, and nothing half-written is left."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from prediction_models import smooth_image, write_image, write_model

from stunet.cli.main import main
from stunet.errors import CheckpointError, DatasetError
from stunet.inference import Case, load_model, read_geometry

IMAGE = smooth_image((16, 16, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", num_classes=3)


def predict(*args: Any) -> int:
    """Run ``stunet predict`` in this process, which saves its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stunet", "predict", *map(str, args), "-device", "cpu", "-npp", "0", "-nps", "0"])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


def outputs(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def check_refused(
    capsys: pytest.CaptureFixture[str], args: tuple[Any, ...], expected: tuple[str, ...], output: Path
) -> None:
    assert predict(*args) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert not outputs(output)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], ("no images for this model", "no files", "CASE_0000.nii.gz")),
        (["a_0000.png", "b_0000.tif"], ("no images for this model", "a_0000.png, b_0000.tif", "DICOM")),
    ],
)
def test_folders_without_images(
    model: Path, tmp_path: Path, files: list[str], expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for name in files:
        (tmp_path / "images" / name).touch()
    args = ("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model)
    check_refused(capsys, args, expected, tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("-i", "{tmp}/none"), ("/none is missing", "-i")),
        (("-m", "{tmp}/none"), ("/none is missing", "-m")),
        (("-d", "4"), ("-d 4", "-m MODEL")),
        (("-step_size", "1.5"), ("-step_size 1.5",)),
        (("-part_id", "2", "-num_parts", "2"), ("-part_id 2", "0 to 1")),
        (("--memory", "much"), ("--memory much", "8GB")),
        (("--memory", "0GB"), ("--memory 0GB",)),
        (("--memory", "300MB"), ("--memory 0.29GB", "GB at least", "16 x 16 x 16")),
        (("--structures", "liver"), ("liver", "structure_1, structure_2")),
        (("-f", "0", "3"), ("fold_3/checkpoint_final.pth", "-f")),
        (("-chk", "checkpoint_best.pth"), ("fold_0/checkpoint_best.pth", "checkpoint_final.pth", "-chk")),
    ],
)
def test_arguments(
    model: Path, tmp_path: Path, args: tuple[str, ...], expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    given = {"-i": tmp_path / "images", "-o": tmp_path / "out", "-m": model}
    extra = [arg.format(tmp=tmp_path) for arg in args]
    usual = [str(part) for option, value in given.items() if option not in extra for part in (option, value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stunet", "predict", *usual, "-device", "cpu", *extra])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert not outputs(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: (m / "plans.json").unlink(), ("no plans.json", "dataset.json, fold_0")),
        (lambda m: (m / "dataset.json").unlink(), ("no dataset.json",)),
        (lambda m: (m / "dataset.json").write_text("{"), ("cannot be read", "dataset.json")),
        (lambda m: (m / "dataset.json").write_text('{"labels": {"background": 0}}'), ("cannot use", "channel_names")),
        (lambda m: (m / "plans.json").write_text('{"configurations": {}}'), ("cannot use",)),
        (lambda m: shutil.rmtree(m / "fold_0"), ("fold_0/checkpoint_final.pth", "but no checkpoint")),
        (lambda m: (m / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK"), ("truncated",)),
    ],
)
def test_model_folders(
    model: Path, tmp_path: Path, change: Any, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(model, tmp_path / "model")
    change(damaged)
    write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    args = ("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", damaged)
    check_refused(capsys, args, expected, tmp_path / "out")


def test_weights_of_another_network(model: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(model, tmp_path / "model")
    path = damaged / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["network_weights"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        _ = load_model(damaged).network
    checkpoint["trainer_name"] = "nnUNetTrainerOfMine"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"nnUNetTrainerOfMine .* not installed"):
        load_model(damaged).build_network()


def test_a_checkpoint_is_not_asked_for_code(model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    damaged = shutil.copytree(model, tmp_path / "model")
    torch.save({"network_weights": {}, "current_epoch": Evil()}, damaged / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match="safely"):
        load_model(damaged)
    assert not (tmp_path / "owned").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def patch_header(path: Path, **fields: Any) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)))


def write_4d(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10, 3), np.int16), np.eye(4)), path)


def write_nan(path: Path) -> None:
    values = IMAGE.astype(np.float32)
    values[1, 2, 3:5] = np.nan
    write_image(path, values)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ("unreadable image file", "bad_0000.nii.gz")),
        (lambda p: p.write_bytes(b"no image at all"), ("cannot be read", "bad_0000.nii.gz")),
        (lambda p: p.write_bytes(b""), ("cannot be read",)),
        (write_4d, ("4 axes (8 x 9 x 10 x 3)",)),
        (lambda p: patch_header(p, pixdim=[1, 0, 1, 1, 0, 0, 0, 0]), ("impossible spacing of 0 x 1 x 1 mm",)),
        (lambda p: patch_header(p, pixdim=[1, 1, -2, 1, 0, 0, 0, 0]), ("impossible spacing of 1 x -2 x 1 mm",)),
        (lambda p: patch_header(p, pixdim=[1, 1, 1, np.nan, 0, 0, 0, 0]), ("impossible spacing",)),
        (write_nan, ("2 voxels are NaN",)),
        (lambda p: shutil.copy(p, str(p).replace("_0000", "_0001")), ("2 channels (0000, 0001)",)),
        (lambda p: p.rename(str(p).replace("_0000", "_0003")), ("1 channels (0003)",)),
    ],
    ids=["truncated", "foreign", "empty", "4d", "zero", "negative", "nan-spacing", "nan", "more", "number"],
)
def test_a_bad_case_is_named_and_the_others_are_predicted(
    model: Path, tmp_path: Path, damage: Any, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    damage(write_image(tmp_path / "images" / "bad_0000.nii.gz", IMAGE))
    assert predict("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model) == 2
    captured = capsys.readouterr()
    for part in ("Failed: bad", *expected, "1 of 2 failed", "--continue"):
        assert part in captured.err
    assert "Predicted a" in captured.out
    assert outputs(tmp_path / "out") == [
        "a.nii.gz", "dataset.json", "labels.json", "manifest.json", "plans.json", "predict_from_raw_data_args.json",
    ]  # fmt: skip


def test_an_output_folder_that_cannot_be_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    (tmp_path / "file").touch()
    args = ("-i", tmp_path / "images", "-o", tmp_path / "file" / "out", "-m", model)
    check_refused(capsys, args, ("cannot be used", f"{tmp_path / 'file' / 'out'}: Not a directory"), tmp_path / "none")


def test_channels_on_different_grids(tmp_path: Path) -> None:
    files = [
        write_image(tmp_path / "a_0000.nii.gz", IMAGE, (1, 1, 2)),
        write_image(tmp_path / "a_0001.nii.gz", IMAGE, (1, 1, 1)),
    ]
    with pytest.raises(DatasetError, match=r"a_0001[\s\S]*1 x 1 x 1 mm[\s\S]*2 x 1 x 1 mm"):
        read_geometry(Case("a", tuple(files)), 2)


FULL = """
import resource, signal, sys
from stunet.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as it does on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are Linux's here")
def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-500, 500, (24, 24, 24)).astype(np.int16)
    write_image(tmp_path / "images" / "a_0000.nii.gz", noise)
    args = ["-i", "images", "-o", "out", "-m", str(model), "-device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-c", FULL, "40000", "predict", *args], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "Failed: a:" in result.stderr
    assert "disk is full" in result.stderr
    assert "1 of 1 failed" in result.stderr
    assert not [name for name in outputs(tmp_path / "out") if not name.endswith(".json")]
    assert json.loads((tmp_path / "out" / "labels.json").read_text())


def test_a_label_map_that_was_not_written_to_its_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ITK's NIfTI writer says nothing where the disk is full."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    usual = SimpleITKIO.write_seg

    def write_half(self: Any, seg: Any, path: str, properties: Any) -> None:
        usual(self, seg, path, properties)
        truncate(Path(path))

    write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    monkeypatch.setattr(SimpleITKIO, "write_seg", write_half)
    assert predict("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.nii.gz").exists()
    assert sitk.ReadImage(str(tmp_path / "images" / "a_0000.nii.gz")).GetSize() == (16, 16, 16)


def test_a_spacing_without_a_unit_is_taken_as_mm(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_image(tmp_path / "images" / "a_0000.nii.gz", IMAGE)
    assert read_geometry(Case("a", (path,)), 1).has_unit
    patch_header(path, xyzt_units=0)
    assert predict("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model) == 0
    assert "1 case without a unit" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_continuing_with_anything_else_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file is changed then, so that ``labels.json`` says what is in the label maps."""
    images, out = tmp_path / "images", tmp_path / "out"
    write_image(images / "a_0000.nii.gz", IMAGE)
    usual = ("-i", images, "-o", out, "--structures", "structure_1")
    assert predict(*usual, "-m", model) == 0
    before = contents(out)
    other = write_model(tmp_path / "other", num_classes=3, folds=("1", "0"))  # its fold 0 has other weights
    shutil.copytree(other / "fold_1", shutil.copytree(model, tmp_path / "both") / "fold_1")
    capsys.readouterr()
    for changed, *expected in (
        (("-m", model, "--structures", "structure_2"), "structures: structure_2 instead of structure_1"),
        (("-m", other, "-f", "0"), "fold_0: "),
        (("-m", tmp_path / "both"), "fold_1: ", "instead of none"),
        (("-m", model, "-step_size", "0.3"), "step_size: 0.3 instead of 0.5"),
        (("-m", model, "--disable_tta"), "mirroring: False instead of True"),
        (("-m", model, "--masks"), "masks: True"),
        (("-m", model, "--names-in-header"), "names_in_header: True"),
    ):
        assert predict(*usual, *changed, "--continue") == 2
        message = capsys.readouterr().err
        for part in ("a prediction of other settings", "out has a.nii.gz", *expected, "manifest.json", "-o"):
            assert part in message, changed
        assert contents(out) == before, changed
    write_image(images / "a_0000.nii.gz", IMAGE[::-1])
    assert predict(*usual, "-m", model, "--continue") == 2
    assert "a prediction of other images" in capsys.readouterr().err
    write_image(images / "a_0000.nii.gz", IMAGE)
    write_image(images / "b_0000.nii.gz", IMAGE)
    assert predict(*usual, "-m", shutil.copytree(model, tmp_path / "moved"), "--continue") == 0  # the same model
    assert "Cases to predict: 1, 1 are finished already" in capsys.readouterr().out
    assert sorted(json.loads((out / "manifest.json").read_text())["images"]) == ["a", "b"]
    (out / "manifest.json").unlink()
    for arguments in (("--continue",), ()):
        assert predict(*usual, "-m", model, *arguments) == 2
        assert "without a record" in capsys.readouterr().err


def test_predicting_again_leaves_nothing_of_before(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for name in "ab":
        write_image(images / f"{name}_0000.nii.gz", IMAGE)
    usual = ("-i", images, "-o", out, "-m", model)
    assert predict(*usual, "--masks", "--structures", "structure_1") == 0
    truncate(images / "b_0000.nii.gz")
    assert predict(*usual, "--masks", "--structures", "structure_2") == 2  # b fails now
    assert [path.name for path in out.glob("*.nii.gz")] == ["a.nii.gz"]
    assert [path.name for path in out.glob("*/segmentations/*")] == ["structure_2.nii.gz"]
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.nii.gz"))))) == {0, 2}
    write_image(images / "b_0000.nii.gz", IMAGE)
    assert predict(*usual, "--masks", "--structures", "structure_2", "--continue") == 0
    assert "1 are finished already" in capsys.readouterr().out
    (images / "b_0000.nii.gz").unlink()
    before = contents(out)
    assert predict(*usual) == 2  # b would stay, without structure_1
    assert "a prediction of other settings" in capsys.readouterr().err
    assert contents(out) == before


def test_images_are_not_replaced(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a_0000", "a_0000_0000"):  # the second case's prediction would be called as the first one's image
        write_image(tmp_path / f"{name}.nii.gz", IMAGE)
    before = contents(tmp_path)
    assert predict("-i", tmp_path, "-o", tmp_path, "-m", model) == 2
    assert "would replace an image" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_names_are_no_formulas_and_a_failed_picture_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"background": 0, "$\\frac$": 1, "[/red]": 2}
    model = write_model(tmp_path / "model", num_classes=3, labels=labels)
    write_image(tmp_path / "images" / "$_$[old]_0000.nii.gz", IMAGE)
    args = ("-i", tmp_path / "images", "-m", model, "--preview", "--names-in-header")
    assert predict(*args, "-o", tmp_path / "out") == 0
    assert "Predicted $_$[old]" in capsys.readouterr().out
    assert (tmp_path / "out" / "previews" / "$_$[old].png").read_bytes().startswith(b"\x89PNG")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("stunet.inference.outputs.draw_preview", fail)
    assert predict(*args, "-o", tmp_path / "again") == 0
    assert "no preview: ValueError: no font" in capsys.readouterr().out
    assert (tmp_path / "again" / "$_$[old].nii.gz").is_file()
