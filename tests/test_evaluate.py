"""``stunet evaluate`` without a prediction: labels, cases, outputs and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from stunet.cli.main import main

MODEL = {"background": 0, "kidney_left": 1, "kidney_right": 2, "liver": 3}
LABELS = {"background": 0, "Kidneys": 1, "Liver": 2, "prostate": 3}
NAME = "Dataset007_Target"


def write(path: Path, labels: Any, **grid: Any) -> None:
    image = sitk.GetImageFromArray(np.asarray(labels, np.uint8))
    image.SetOrigin(grid.get("origin", (0.0, 0.0, 0.0)))
    path.parent.mkdir(exist_ok=True, parents=True)
    sitk.WriteImage(image, str(path))


def volume(*values: int) -> Any:
    return np.array([[values, values], [values, values]])


def dataset_json(labels: dict[str, Any], **more: Any) -> str:
    return json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **more})


class Folders:
    """A dataset of two training cases and a test case, a model folder without weights, and segmentations."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dataset = root / "nnUNet_raw" / NAME
        self.model = root / "model"
        self.predictions = root / "segmentations"
        for case, part, reference, prediction in (
            ("a", "Tr", (1, 1, 2, 2, 3, 0), (1, 2, 3, 3, 3, 0)),  # kidneys 1, liver 4/5
            ("b", "Tr", (1, 1, 0, 0, 2, 2), (1, 0, 0, 0, 3, 3)),  # kidneys 2/3, liver 1
            ("t", "Ts", (0, 0, 0, 0, 2, 2), (0, 0, 0, 0, 0, 3)),  # liver 2/3
        ):
            write(self.dataset / f"images{part}" / f"{case}_0000.nii.gz", volume(*reference))
            write(self.dataset / f"labels{part}" / f"{case}.nii.gz", volume(*reference))
            write(self.predictions / f"{case}.nii.gz", volume(*prediction))
        (self.dataset / "dataset.json").write_text(dataset_json(LABELS, numTraining=2))
        self.model.mkdir()
        (self.model / "dataset.json").write_text(dataset_json(MODEL))
        (root / "map.yaml").write_text("Kidneys: [kidney_left, kidney_right]\n")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Folders(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_here(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stunet", "evaluate", "-np", "1", *line.split()])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run_here


SCORE = "-m model --predictions segmentations --label-map map.yaml"


def test_existing_predictions_are_scored(folders: Folders, run: Any) -> None:
    status, out, err = run(f"{SCORE} -d 7 -o out --tolerance 0.5")
    assert status == 0, err
    assert "2 structures are compared on 2 cases of Dataset007_Target" in out
    assert "Kidneys: kidney_left + kidney_right" in out
    assert "Not compared, the model has nothing of this name: prostate" in out
    assert sorted(path.name for path in (folders.root / "out").iterdir()) == [
        "scores.csv",
        "scores.png",
        "summary.json",
    ]
    summary = json.loads((folders.root / "out" / "summary.json").read_text())
    assert summary["mean"]["1"]["Dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["mean"]["2"]["Dice"] == pytest.approx((4 / 5 + 1) / 2)
    assert summary["foreground_mean"]["Dice"] == pytest.approx((5 / 6 + 9 / 10) / 2)
    assert (summary["tolerance_mm"], summary["dataset"], summary["failed"]) == (0.5, NAME, {})
    assert "0.833" in out
    assert "0.867" in out


def test_json_alone_goes_to_standard_output(folders: Folders, run: Any) -> None:
    status, out, err = run(f"{SCORE} -d {NAME} --json")
    content = json.loads(out)
    assert status == 0
    assert content["output"] == f"evaluation_{NAME}"
    assert content["cases"] == 2
    assert content["mean"]["2"]["Dice"] == pytest.approx(0.9)
    assert content["left_out"] == {"prostate": "the model has nothing of this name"}
    assert "Not compared" in err


@pytest.mark.parametrize("dataset", ["7", NAME, "path"])
def test_test_cases_by_id_name_or_path(folders: Folders, run: Any, dataset: str) -> None:
    chosen = str(folders.dataset) if dataset == "path" else dataset
    status, out, err = run(f"{SCORE} -d {chosen} --split test --json")
    assert status == 0, err
    content = json.loads(out)
    assert content["cases"] == 1
    assert content["structures"]["1"]["absent"] == 1
    assert content["mean"]["1"]["Dice"] is None
    assert content["mean"]["2"]["Dice"] == pytest.approx(2 / 3)


def test_validation_cases_of_a_fold(folders: Folders, run: Any) -> None:
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (folders.dataset / "splits_final.json").write_text(json.dumps(splits))
    assert json.loads(run(f"{SCORE} -d 7 --fold 1 --json -o one")[1])["mean"]["2"]["Dice"] == pytest.approx(0.8)
    # The folds that nnU-Net trained with go first.
    beside = folders.root / "nnUNet_preprocessed" / NAME
    beside.mkdir()
    (beside / "splits_final.json").write_text(json.dumps(splits[::-1]))
    assert json.loads(run(f"{SCORE} -d 7 --fold 1 --json -o two")[1])["mean"]["2"]["Dice"] == pytest.approx(1.0)
    for content, expected in ((splits, "fold 2"), ([{"val": ["a"]}] * 3, "case z"), ({"a": 1}, "splits_final.json")):
        text = json.dumps(content).replace('"a"', '"z"') if expected == "case z" else json.dumps(content)
        (beside / "splits_final.json").write_text(text)
        status, _, err = run(f"{SCORE} -d 7 --fold 2 -o three")
        assert status == 2
        assert expected in err


def test_what_cases_do_not_annotate_is_not_scored(folders: Folders, run: Any) -> None:
    manifest = {"version": 1, "cases": {"a": ["Kidneys", "prostate"]}, "default": ["Kidneys", "Liver", "prostate"]}
    (folders.dataset / "annotated_labels.json").write_text(json.dumps(manifest))
    status, out, _ = run(f"{SCORE} -d 7 --json")
    content = json.loads(out)
    assert status == 0
    assert content["mean"]["2"]["Dice"] == pytest.approx(1.0)  # of b alone
    assert (content["structures"]["2"]["scored"], content["structures"]["2"]["not_annotated"]) == (1, 1)
    del manifest["default"]
    (folders.dataset / "annotated_labels.json").write_text(json.dumps(manifest))
    status, _, err = run(f"{SCORE} -d 7 -o other")
    assert status == 2
    assert "nothing about case b" in err


def test_names_come_with_predictions_too(folders: Folders, run: Any) -> None:
    (folders.predictions / "dataset.json").write_text((folders.model / "dataset.json").read_text())
    line = "--predictions segmentations --label-map map.yaml -d 7 --json"
    first = json.loads(run(f"{line} -o one")[1])
    second = json.loads(run(f"{line} -o two -m model/dataset.json")[1])
    assert first["mean"] == second["mean"]


def test_a_suggested_map_can_be_given_back(folders: Folders, run: Any) -> None:
    status, out, _ = run("-m model -d 7 --suggest-map")
    assert status == 0
    assert "Kidneys: [kidney_left, kidney_right]\nLiver: liver\nprostate: null" in out
    assert run("-m model -d 7 --suggest-map -o suggested.yaml")[0] == 0
    assert (folders.root / "suggested.yaml").read_text() == out
    assert run("-m model -d 7 --suggest-map -o suggested.yaml")[0] == 2  # nothing is overwritten
    first = run(f"{SCORE} -d 7 --json -o one")[1]
    second = run(f"{SCORE.replace('map.yaml', 'suggested.yaml')} -d 7 --json -o two")[1]
    assert json.loads(first)["mean"] == json.loads(second)["mean"]


def test_a_published_system_by_name(folders: Folders, run: Any) -> None:
    labels = {"background": 0, "Liver": 1, "x2": 2, "x3": 3, "kidneys": 4}
    (folders.dataset / "dataset.json").write_text(dataset_json(labels, numTraining=2))
    status, out, err = run("-m model --predictions segmentations -d 7 --label-map ct_org")
    assert status == 0, err
    assert "Not compared, the model has no urinary_bladder: x2" in out
    assert "Not compared, the dataset does not have it: brain" in out


def test_cases_that_fail_are_told_and_the_others_scored(folders: Folders, run: Any) -> None:
    write(folders.predictions / "b.nii.gz", volume(1, 0, 0, 0, 3, 3), origin=(0.0, 3.0, 0.0))
    status, out, err = run(f"{SCORE} -d 7 -o out --json")
    assert status == 2
    assert "case b:" in err
    assert "3 mm elsewhere" in err
    assert "1 cases could not be scored; the results are without them" in err
    assert json.loads(out)["mean"]["2"]["Dice"] == pytest.approx(0.8)
    assert list(json.loads((folders.root / "out" / "summary.json").read_text())["failed"]) == ["b"]


def test_left_and_right_are_warned_of(folders: Folders, run: Any) -> None:
    (folders.dataset / "dataset.json").write_text(
        dataset_json({"background": 0, "left kidney": 1, "right kidney": 2, "x": 3}, numTraining=2)
    )
    for case, prediction in (("a", (0, 2, 2, 1, 1, 0)), ("b", (0, 2, 0, 0, 1, 1))):
        write(folders.dataset / "labelsTr" / f"{case}.nii.gz", volume(0, 1, 1, 2, 2, 0))
        write(folders.predictions / f"{case}.nii.gz", volume(*prediction))
    status, _, err = run("-m model --predictions segmentations -d 7 -o out")
    assert status == 0
    assert "warning: left and right are swapped in the label maps of 2 of 2 cases" in err
    assert "with left and right of the predictions swapped" in err
    warnings = json.loads((folders.root / "out" / "summary.json").read_text())["warnings"]
    assert len(warnings) == 2  # the predictions lie as the image's axes have it


def test_the_models_own_dataset_is_warned_of(folders: Folders, run: Any) -> None:
    plans = {"dataset_name": NAME, "configurations": {"3d_fullres": {"spacing": [3.0, 1.5, 1.5]}}}
    (folders.model / "plans.json").write_text(json.dumps(plans))
    _, out, err = run(f"{SCORE} -d 7")
    assert "warning: the model was trained on this dataset" in err
    assert "The model works at 3 x 1.5 x 1.5 mm" in out
    splits = folders.root / "nnUNet_preprocessed" / NAME / "splits_final.json"
    splits.parent.mkdir()
    splits.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    _, out, err = run(f"{SCORE} -d 7 --fold 0 -o of_a_fold")
    assert "1 structures" not in err
    assert "on 1 cases" in out
    assert "trained on" not in err
    _, _, err = run("-d 7 -m model --label-map map.yaml --fold 0 --folds 0 --device cpu -o mine")  # no weights
    assert "trained on" not in err
    _, _, err = run("-d 7 -m model --label-map map.yaml --fold 0 --folds 0 1 --device cpu -o others")
    assert "warning: fold 1 of the model was trained on these cases; give --folds 0" in err


@pytest.mark.parametrize("more", ["--chill", "--cases b", "--cases=b, --chill"])
def test_some_of_the_cases_are_scored_when_asked(folders: Folders, run: Any, more: str) -> None:
    (folders.predictions / "a.nii.gz").unlink()
    status, _, err = run(f"{SCORE} -d 7 -o all")
    assert status == 2
    assert "1 of 2" in err
    status, out, _ = run(f"{SCORE} -d 7 -o out {more}")
    assert status == 0
    assert "on 1 cases" in out
    summary = json.loads((folders.root / "out" / "summary.json").read_text())
    assert [case["case"] for case in summary["metric_per_case"]] == ["b"]
    assert summary["metric_per_case"][0]["metrics"]["2"]["Dice"] == pytest.approx(2 * 2 / (2 + 2))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-d 7", "neither -m nor --predictions"),
        ("-d 8 -m model", "unknown dataset"),
        ("-d 7 -m nowhere", "nowhere does not exist: correct -m"),
        ("-d 7 --predictions nope", "nope does not exist: correct --predictions"),
        ("-d 7 --predictions segmentations", "segmentations/dataset.json"),
        ("-d 7 -m model --predictions nowhere", "no such folder"),
        ("-d 7 -m model --predictions model", "/model/a.nii.gz"),
        ("-d 7 -m model --predictions model --chill", "no segmentation of any case"),
        ("-d 7 -m model --predictions segmentations --cases a,t", "cases of"),
        ("-d 7 -m model --label-map nowhere.yaml", "No such file"),
        ("-d 7 -m model --label-map kits", "one of abdomenct_1k"),
        ("-d 7 -m model --predictions segmentations --tolerance -1", "-1 mm"),
        ("-d 7 -m model --split test --fold 0", "--split test --fold 0"),
        ("-d 7 -m model --fold 0", "missing folds"),
        ("-d 7 -m model --predictions segmentations -o model", "model"),
        ("-d 7 -m model --device cpu -o out", "no plans.json"),
    ],
)
def test_refusals(folders: Folders, run: Any, line: str, expected: str) -> None:
    status, _, err = run(line)
    assert status == 2
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "2 (T1, T2), as model has"),
        ({"file_ending": ".nrrd"}, ".nrrd, as model has"),
    ],
)
def test_a_model_of_other_images(folders: Folders, run: Any, more: dict[str, Any], expected: str) -> None:
    (folders.model / "dataset.json").write_text(dataset_json(MODEL, **more))
    status, _, err = run("-d 7 -m model -o out")
    assert status == 2
    assert expected in err
    assert not (folders.root / "out").exists()


def test_test_cases_without_images_or_labels(folders: Folders, run: Any) -> None:
    (folders.dataset / "imagesTs" / "t_0000.nii.gz").unlink()
    assert "t_0000.nii.gz is missing" in run(f"{SCORE} -d 7 --split test")[2]
    (folders.dataset / "labelsTs" / "t.nii.gz").unlink()
    assert "no cases in" in run(f"{SCORE} -d 7 --split test")[2]
