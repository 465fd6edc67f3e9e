"""Folders of images through ``stunet predict`` and through nnU-Net's predictor: the same labels, and more files."""

from __future__ import annotations

import csv
import doctest
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from prediction_models import smooth_image, write_image, write_model

from stunet.errors import CommandError, LabelError, UsageError
from stunet.evaluation import evaluate
from stunet.inference import load_model, parse_memory, predict_folder
from stunet.inference import predict as predict_one
from stunet.inference.model import Model
from stunet.inference.outputs import EXTRAS
from stunet.inference.predictor import MemoryPlan, Predictor

SPACING = (1.5, 0.7, 0.8)


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.windows: dict[str, int] = {}
        self.finished_cases: list[str] = []
        self.failures: dict[str, str] = {}
        self.plan: tuple[int, int] | None = None
        self.listeners: dict[str, Any] = {"say": self.say, "warn": self.warn, "on_window": self.window}

    def say(self, text: str) -> None:
        self.notes.append(text)
        if match := re.fullmatch(r"Cases to predict: (\d+)(?:, (\d+) are finished already)?", text):
            self.plan = int(match[1]), int(match[2] or 0)
        if match := re.fullmatch(r"Predicted (\w+): \d+ structures? found", text):
            self.finished_cases.append(match[1])

    def warn(self, text: str) -> None:
        failed, case, problem = text.split(": ", 2)
        assert failed == "Failed"
        self.failures[case] = problem

    def window(self, case: str, n_windows: int) -> None:
        self.windows[case] = self.windows.get(case, 0) + 1
        assert self.windows[case] <= n_windows


def predict(images: Path, output: Path, model: Path, folds: Sequence[str] | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    options = {"n_preparing": 0, "n_writing": 0, **recorder.listeners, **options}
    predict_folder(load_model(model, folds), images, output, **options)
    return recorder


def predict_with_nnunet(images: Path, output: Path, model: Path, folds: Sequence[int] = (0,), **options: Any) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
    output.mkdir()
    predictor.predict_from_files_sequential(str(images), str(output))


def read(path: Path) -> Any:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, a model of two folds, and nnU-Net's predictions with its first."""
    root = tmp_path_factory.mktemp("made")
    write_model(root / "model", num_classes=8, folds=("0", "1"))
    for i, shape in enumerate([(16, 36, 30), (20, 24, 26)]):
        write_image(root / "images" / f"case_{i}_0000.nii.gz", smooth_image(shape, i), SPACING, origin=(5, -7, 3))
    predict_with_nnunet(root / "images", root / "nnunet", root / "model")
    return root


@pytest.mark.parametrize(
    ("options", "spacing", "shape"),
    [
        ({}, (1, 1, 1), (20, 30, 26)),  # no resampling
        ({"folds": ("0", "1", "2"), "mirroring": (0, 2)}, SPACING, (16, 30, 26)),
        ({"spacing": (2.5, 1, 1)}, (5, 0.7, 0.8), (10, 36, 30)),  # planes by the nearest
        ({"spacing": (1, 1, 1)}, (5, 0.7, 0.8), (6, 36, 30)),
        ({"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}, SPACING, (16, 30, 26)),
        ({"patch": (16, 16), "spacing": (0.9, 1.1)}, SPACING, (5, 30, 26)),  # 2D
        ({"n_channels": 2, "spacing": (1.2, 1.4, 1.1)}, SPACING, (16, 30, 26)),
        ({"num_classes": 300}, (2, 2, 2), (9, 10, 11)),  # labels beyond 255
        ({}, (1, 1, 1), (5, 9, 40)),  # smaller than the patch
        ({"image_reader_writer": "NibabelIOWithReorient"}, SPACING, (16, 30, 26)),
    ],
    ids=["same-grid", "folds", "nearest", "thick", "transposed", "2d", "channels", "300", "small", "reoriented"],
)
def test_the_labels_are_nnunets(tmp_path: Path, options: dict[str, Any], spacing: Any, shape: Any) -> None:
    model = write_model(tmp_path / "model", **{"num_classes": 9, **options})
    for channel in range(options.get("n_channels", 1)):
        image = smooth_image(shape, channel)
        image[:3], image[:, :4] = 0, 0  # which preprocessing cuts off
        path = write_image(tmp_path / "images" / f"a_{channel:04d}.nii.gz", image, spacing, origin=(5, -7, 3))
        if "Reorient" in options.get("image_reader_writer", ""):
            flipped = sitk.Flip(sitk.ReadImage(str(path)), [True, False, False])
            sitk.WriteImage(sitk.PermuteAxes(flipped, [1, 0, 2]), str(path))
    predict_with_nnunet(tmp_path / "images", tmp_path / "nnunet", model, range(len(options.get("folds", "0"))))
    predict(tmp_path / "images", tmp_path / "ours", model)
    expected, actual = (sitk.ReadImage(str(tmp_path / folder / "a.nii.gz")) for folder in ("nnunet", "ours"))
    assert len(np.unique(sitk.GetArrayFromImage(expected))) > 2
    assert np.array_equal(sitk.GetArrayFromImage(actual), sitk.GetArrayFromImage(expected))
    for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        assert getattr(actual, get)() == getattr(expected, get)()


def test_folds_share_one_network(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    usual = Model.build_network

    def build(model: Model) -> Any:
        built.append(usual(model))
        return built[-1]

    monkeypatch.setattr(Model, "build_network", build)
    image = read(made / "images" / "case_1_0000.nii.gz")
    one, other = (predict_one(load_model(made / "model", [fold]), image, spacing=SPACING) for fold in "01")
    built.clear()
    model = load_model(made / "model")
    first = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    both = predict_one(model, image, spacing=SPACING)
    assert not np.array_equal(both, one)
    assert not np.array_equal(both, other)
    assert len([network for network in built if not next(network.parameters()).is_meta]) == 1
    torch.testing.assert_close(dict(model.network.state_dict()), first, rtol=0, atol=0)


def test_along_another_axis_labels_differ_at_near_ties_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_classes=40, patch=(16,) * 3, spacing=(1.2, 1.1, 1.3), mirroring=(0,))
    path = write_image(tmp_path / "a_0000.nii.gz", smooth_image((30, 52, 44)), (1.5, 0.8, 0.9))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    plans, configuration, labels = (
        predictor.plans_manager, predictor.configuration_manager, predictor.label_manager,
    )  # fmt: skip
    image, _, properties = configuration.preprocessor_class(verbose=False).run_case(
        [str(path)], None, plans, configuration, predictor.dataset_json
    )
    image = np.asarray(image)
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    expected, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties, return_probabilities=True
    )
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    second, first = np.log(np.sort(probabilities, axis=0)[-2:])
    # Two logits are this close, a few times the last bit of half precision, at less than 1 % of the voxels.
    assert np.quantile(first - second, 0.01) > 0.02
    for axis in (1, 2):
        got = Predictor(load_model(model), plan=MemoryPlan(axis=axis)).predict(image, properties)
        differ = got != expected
        assert differ.mean() < 5e-4
        assert (first - second)[differ].max(initial=0) < 0.02


@pytest.mark.parametrize("changed", [{"step_size": 0.8}, {"mirroring": False}, {"folds": ["1"]}])
def test_options_reach_the_prediction(tmp_path: Path, changed: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", num_classes=5, folds=("0", "1"), mirroring=(0, 1))
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((40, 17, 18)), (1, 1, 1))
    nnunets = {"step_size": "tile_step_size", "mirroring": "use_mirroring"}
    options = {nnunets[name]: value for name, value in changed.items() if name in nnunets}
    folds = [int(fold) for fold in changed.get("folds", ("0", "1"))]
    predict_with_nnunet(tmp_path / "images", tmp_path / "nnunet", model, folds, **options)
    predict(tmp_path / "images", tmp_path / "ours", model, **changed)
    predict(tmp_path / "images", tmp_path / "other", model)
    assert np.array_equal(read(tmp_path / "ours" / "a.nii.gz"), read(tmp_path / "nnunet" / "a.nii.gz"))
    assert not np.array_equal(read(tmp_path / "other" / "a.nii.gz"), read(tmp_path / "nnunet" / "a.nii.gz"))


def test_all_files(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    listener = predict(made / "images", out, made / "model", folds=["0"], write=EXTRAS)
    assert listener.plan == (2, 0)
    assert listener.finished_cases == ["case_0", "case_1"]
    structures = [f"structure_{i}" for i in range(1, 8)]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(
        ["dataset.json", "labels.json", "manifest.json", "plans.json", "predict_from_raw_data_args.json"]
        + ["statistics.csv"]
        + [f"case_{i}{ending}" for i in (0, 1) for ending in (".nii.gz",)]
        + [f"{folder}/case_{i}.{ending}" for i in (0, 1) for folder, ending in
           (("statistics", "json"), ("previews", "png"))]
        + [f"case_{i}/segmentations/{name}.nii.gz" for i in (0, 1) for name in structures]
    )  # fmt: skip
    for name in ("dataset.json", "plans.json"):
        assert json.loads((out / name).read_text()) == json.loads((made / "nnunet" / name).read_text())
    arguments = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert set(json.loads((made / "nnunet" / "predict_from_raw_data_args.json").read_text())) <= set(arguments)
    assert json.loads((out / "labels.json").read_text()) == {"0": "background"} | {
        str(i): f"structure_{i}" for i in range(1, 8)
    }
    for i in (0, 1):
        check_case(made, out, f"case_{i}", structures)
    check_table(out, structures)


def check_case(made: Path, out: Path, case: str, structures: Sequence[str]) -> None:
    labels, image = read(made / "nnunet" / f"{case}.nii.gz"), read(made / "images" / f"{case}_0000.nii.gz")
    assert np.array_equal(read(out / f"{case}.nii.gz"), labels)
    measured = json.loads((out / "statistics" / f"{case}.json").read_text())
    reference = sitk.ReadImage(str(made / "images" / f"{case}_0000.nii.gz"))
    for value, name in enumerate(structures, start=1):
        mask = sitk.ReadImage(str(out / case / "segmentations" / f"{name}.nii.gz"))
        assert np.array_equal(sitk.GetArrayFromImage(mask), labels == value)
        assert mask.GetPixelID() == sitk.sitkUInt8
        assert mask.GetOrigin() == reference.GetOrigin()
        n = int((labels == value).sum())
        assert measured[name]["voxels"] == n
        assert measured[name]["volume_ml"] == pytest.approx(n * np.prod(SPACING) / 1000, rel=1e-4)
        if n:
            assert measured[name]["mean_intensity"] == [pytest.approx(image[labels == value].mean(), abs=1e-3)]
        else:
            assert measured[name]["mean_intensity"] == [None]
    header: Any = nib.load(out / f"{case}.nii.gz").header
    assert np.allclose(nib.load(out / f"{case}.nii.gz").affine, nib.load(made / "nnunet" / f"{case}.nii.gz").affine)
    table = ElementTree.fromstring(header.extensions[0].get_content()).findall("VolumeInformation/LabelTable/Label")
    assert {int(label.attrib["Key"]): label.text for label in table} == dict(enumerate(structures, start=1))
    picture = (out / "previews" / f"{case}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def check_table(out: Path, structures: Sequence[str]) -> None:
    with (out / "statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"]) for row in rows] == [(f"case_{i}", n) for i in (0, 1) for n in structures]
    measured = json.loads((out / "statistics" / "case_1.json").read_text())
    assert int(rows[-1]["voxels"]) == measured[structures[-1]]["voxels"]


def test_chosen_structures_have_the_labels_of_the_full_prediction(made: Path, tmp_path: Path) -> None:
    labels = read(made / "nnunet" / "case_0.nii.gz")
    present = [int(v) for v in np.unique(labels) if v][:2]
    chosen = [f"Structure {present[1]}", f"structure_{present[0]}"]  # any spelling, any order
    predict(made / "images", tmp_path / "out", made / "model", folds=["0"], structures=chosen,
            write=["masks"])  # fmt: skip
    expected = np.where(np.isin(labels, present), labels, 0)
    assert np.array_equal(read(tmp_path / "out" / "case_0.nii.gz"), expected)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"0": "background"} | {
        str(v): f"structure_{v}" for v in present
    }
    masks = sorted(path.name for path in (tmp_path / "out" / "case_0" / "segmentations").iterdir())
    assert masks == [f"structure_{v}.nii.gz" for v in present]
    with pytest.raises(LabelError, match=r"spline[\s\S]*structure_7"):
        predict(made / "images", tmp_path / "no", made / "model", structures=["structure_1", "spline"])
    assert not (tmp_path / "no").exists()


def test_finished_cases_are_kept(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(made / "images", out, made / "model", folds=["0"], part_id=0, n_parts=2)
    (out / "case_0.nii.gz").write_bytes(b"finished")
    listener = predict(made / "images", out, made / "model", folds=["0"], continue_prediction=True)
    assert listener.plan == (1, 1)
    assert (out / "case_0.nii.gz").read_bytes() == b"finished"
    assert np.array_equal(read(out / "case_1.nii.gz"), read(made / "nnunet" / "case_1.nii.gz"))
    listener = predict(made / "images", out, made / "model", folds=["0"])
    assert listener.plan == (2, 0)
    assert np.array_equal(read(out / "case_0.nii.gz"), read(made / "nnunet" / "case_0.nii.gz"))


def test_parts_share_the_cases(made: Path, tmp_path: Path) -> None:
    for part in (0, 1):
        predict(made / "images", tmp_path / str(part), made / "model", folds=["0"], part_id=part, n_parts=2)
        assert [path.name for path in (tmp_path / str(part)).glob("*.nii.gz")] == [f"case_{part}.nii.gz"]


def test_processes_give_the_same_and_one_failure_stops_no_other(made: Path, tmp_path: Path) -> None:
    images = shutil.copytree(made / "images", tmp_path / "images")
    whole = (images / "case_0_0000.nii.gz").read_bytes()
    (images / "broken_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    values = smooth_image((16, 16, 16)).astype(np.float32)
    values[3, 4, 5:7] = np.nan
    write_image(images / "nan_0000.nii.gz", values)
    listener = Recorder()
    with pytest.raises(CommandError, match=r"2 of 4 failed[\s\S]*broken[\s\S]*nan") as caught:
        predict_folder(load_model(made / "model", ["0"]), str(images), tmp_path / "out", **listener.listeners)
    assert "--continue" in str(caught.value)
    assert listener.finished_cases == ["case_0", "case_1"]
    assert "2 voxels are NaN" in listener.failures["nan"]
    assert "broken_0000.nii.gz" in listener.failures["broken"]
    assert not list((tmp_path / "out").glob(".*"))
    for case in ("case_0", "case_1"):
        assert np.array_equal(read(tmp_path / "out" / f"{case}.nii.gz"), read(made / "nnunet" / f"{case}.nii.gz"))


@pytest.mark.parametrize("kind", ["regions", "order", "probabilities"])
def test_what_cannot_be_streamed_goes_to_nnunets_predictor(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"num_classes": 4}
    if kind == "regions":
        options |= {"num_classes": 2, "labels": {"background": 0, "organs": [1, 2], "spleen": [2]}}
    if kind == "order":
        kwargs = {"is_seg": False, "order": 0, "order_z": 0, "force_separate_z": None}
        options["change"] = {"resampling_fn_probabilities_kwargs": kwargs}
    model = write_model(tmp_path / "model", **options)
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 20, 18)), SPACING)
    predict_with_nnunet(tmp_path / "images", tmp_path / "nnunet", model)
    listener = predict(tmp_path / "images", tmp_path / "ours", model, save_probabilities=kind == "probabilities",
                       write=["masks"])  # fmt: skip
    assert any("nnU-Net's own predictor" in note for note in listener.notes)
    labels = read(tmp_path / "nnunet" / "a.nii.gz")
    assert np.array_equal(read(tmp_path / "ours" / "a.nii.gz"), labels)
    assert (tmp_path / "ours" / "a.npz").is_file() == (kind == "probabilities")
    if kind == "regions":
        organs = read(tmp_path / "ours" / "a" / "segmentations" / "organs.nii.gz")
        assert np.array_equal(organs, np.isin(labels, (1, 2)))


def test_a_cascade_asks_for_its_first_stage(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_classes=3, change={"previous_stage": "3d_fullres"})
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 16, 16)))
    with pytest.raises(UsageError, match="-prev_stage_predictions"):
        predict(tmp_path / "images", tmp_path / "out", model)


def test_leftovers_of_killed_predictions_are_removed(made: Path, tmp_path: Path) -> None:
    import socket

    out = tmp_path / "out"
    dead, alive = (out / f".scratch.{socket.gethostname()}.{pid}.tmp" for pid in (2**22 + 1, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "half").touch()
    (out / dead.name.replace("scratch", "manifest.json")).touch()
    (out / alive.name.replace("scratch", "plans.json")).touch()
    predict(made / "images", out, made / "model", folds=["0"], part_id=0, n_parts=2)
    assert {path.name for path in out.glob(".*")} == {alive.name, alive.name.replace("scratch", "plans.json")}


def test_one_image_of_any_kind_from_python(made: Path) -> None:
    path, expected = made / "images" / "case_0_0000.nii.gz", read(made / "nnunet" / "case_0.nii.gz")
    image = sitk.ReadImage(str(path))
    model = load_model(made / "model" / "fold_0" / "checkpoint_final.pth")  # which describes itself
    assert np.array_equal(predict_one(model, sitk.GetArrayFromImage(image), spacing=SPACING), expected)
    for given in (path, image, [str(path)]):
        labels = predict_one(load_model(made / "model", ["0"]), given)
        assert np.array_equal(sitk.GetArrayFromImage(labels), expected)
        assert labels.GetOrigin() == image.GetOrigin()
    chosen = predict_one(model, image, structures=["structure_1", "Structure 2"])
    assert np.array_equal(sitk.GetArrayFromImage(chosen), np.where(expected < 3, expected, 0))
    with pytest.raises(UsageError, match="spacing"):
        predict_one(model, np.zeros((9, 9, 9)))


def test_regions_from_python(tmp_path: Path) -> None:
    labels = {"background": 0, "organs": [1, 2], "spleen": [2]}
    model = write_model(tmp_path / "model", num_classes=2, labels=labels)
    path = write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 20, 18)), SPACING)
    predict_with_nnunet(tmp_path / "images", tmp_path / "nnunet", model)
    found = sitk.GetArrayFromImage(predict_one(model, path))
    assert np.array_equal(found, read(tmp_path / "nnunet" / "a.nii.gz"))


def test_the_examples(made: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "Dataset009_Example"
    for name in ("imagesTr", "labelsTr"):
        shutil.copytree(made / ("images" if name == "imagesTr" else "nnunet"), dataset / name)
    content = json.loads((made / "model" / "dataset.json").read_text()) | {"numTraining": 2}
    (dataset / "dataset.json").write_text(json.dumps(content))
    names = {
        "model_folder": write_model(tmp_path / "model", num_classes=3),
        "prediction_folder": made / "nnunet",
        "dataset_folder": dataset,
    }
    for function in (load_model, predict_one, evaluate, parse_memory):
        globs = {"np": np, "torch": torch, function.__name__: function, **names}
        (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=globs)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example) == (0, len(example.examples))
        assert example.examples
