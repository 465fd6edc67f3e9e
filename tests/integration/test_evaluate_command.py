"""Direct evaluation: a tiny random network of other labels, predicted and scored."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from integration.commands import Shell, read_array
from nnunetv2.evaluation.evaluate_predictions import load_summary_json
from prediction_models import write_image
from weights import tiny_weights, v1_plans, v1_stage, write_v1

from stunet.labels.labels import Vocabulary
from stunet.planning.model_folder import write_model_folder
from stunet.weights.convert import open_weights

NAME = "Dataset003_Target"
STRUCTURES = ("background", "kidney_left", "kidney_right", "liver", "spleen")
LABELS = {"background": 0, "kidneys": 1, "Leber": 2, "Spleen": 3, "prostate": 4, "ignore": 5}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A model folder with random weights, and two noisy images with random label maps."""
    shell = Shell.make(tmp_path_factory.mktemp("evaluate"))
    stage = v1_stage(patch_size=np.array([16, 32, 32]), current_spacing=np.array([2.0, 1.0, 1.0]))
    weights = tiny_weights(len(STRUCTURES))
    for key, tensor in weights.items():
        if "seg_layers" in key and tensor.shape[1:2] == (2,):  # each output is the largest for some pair of features
            angles = torch.linspace(0, torch.pi / 2, len(STRUCTURES))
            weights[key] = torch.stack([angles.cos(), angles.sin()], dim=1).reshape(tensor.shape)
            weights[key.replace("weight", "bias")] = torch.zeros(len(STRUCTURES))
    path = write_v1(shell.root, weights, v1_plans(len(STRUCTURES), plans_per_stage={0: stage}))
    source = open_weights([path])
    write_model_folder(source, Vocabulary("test", STRUCTURES, "test"), shell.root / "model")

    dataset = shell.raw / NAME
    rng = np.random.default_rng(0)
    for case in ("one", "two"):
        image, labels = rng.normal(size=(14, 18, 30)).astype(np.float32), np.zeros((14, 18, 30), np.uint8)
        for value in range(1, 6):
            labels[2:9, 3:15, 4 * value : 4 * value + 3] = value
        for file, array in ((f"imagesTr/{case}_0000.nii.gz", image), (f"labelsTr/{case}.nii.gz", labels)):
            write_image(dataset / file, array, (2.0, 1.0, 1.0), (-7.0, 12.5, 3.0))
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps(content))
    return shell


def test_from_images_to_scores(shell: Shell) -> None:
    shell.run("stunet evaluate -m model -d 3 --suggest-map -o map.yaml")
    text = (shell.root / "map.yaml").read_text().replace("Leber: null", "Leber: liver")
    (shell.root / "map.yaml").write_text(text)
    output = shell.run(
        "stunet evaluate -m model -d 3 --label-map map.yaml -o out --folds 0 --device cpu --disable-tta -np 1"
    )
    out = shell.root / "out"
    assert "The model works at 2 x 1 x 1 mm" in output
    assert "kidneys: kidney_left + kidney_right" in output
    assert "Wrote out: summary.json, scores.csv, scores.png" in output
    assert (out / "scores.png").stat().st_size > 1000

    summary = load_summary_json(str(out / "summary.json"))
    assert [case["case"] for case in summary["metric_per_case"]] == ["one", "two"]
    for case in summary["metric_per_case"]:
        reference, prediction = (read_array(Path(case[key])) for key in ("reference_file", "prediction_file"))
        assert set(np.unique(prediction)) == {0, 1, 2, 3, 4}, "the network predicts too little for this test"
        for value, predicted in ((1, (1, 2)), (2, (3,)), (3, (4,))):
            mine, theirs = reference == value, np.isin(prediction, predicted) & (reference != 5)
            assert case["metrics"][value]["n_pred"] == theirs.sum()
            assert case["metrics"][value]["Dice"] == 2 * (mine & theirs).sum() / (mine.sum() + theirs.sum())
    with (out / "scores.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 3

    scored = "stunet evaluate --predictions out/predictions -d 3 --label-map map.yaml -o again --json -np 1"
    again = shell.run(scored, only_stdout=True)
    assert json.loads(again)["mean"]["1"]["Dice"] == summary["mean"][1]["Dice"]


def test_errors_are_shown_without_a_traceback(shell: Shell) -> None:
    shell.refuse("stunet evaluate -m model -d 3 --label-map btvc -o other", "btvc", "btcv")
    assert not (shell.root / "other").exists()


def test_a_checkpoint_runs_no_code(shell: Shell, tmp_path: Path) -> None:
    """A model folder's checkpoint is read as plain values, as all checkpoints are."""
    marker = tmp_path / "ran"
    folder = shell.root / "evil"
    (folder / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(shell.root / "model" / name, folder)

    class Evil:
        def __reduce__(self) -> object:
            return Path.touch, (marker,)

    torch.save({"network_weights": {}, "current_epoch": 0, "x": Evil()}, folder / "fold_0" / "checkpoint_final.pth")
    shell.refuse("stunet evaluate -m evil -d 3 -o other --device cpu")
    assert not marker.exists()
