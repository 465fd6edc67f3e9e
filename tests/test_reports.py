from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from stunet.reports import read_dice, side_by_side


def test_dice_by_hand(tmp_path: Path) -> None:
    summary = {
        "metric_per_case": [
            {"metrics": {"1": {"Dice": 0.5}, "2": {"Dice": None}}},
            {"metrics": {"1": {"Dice": 0.75}, "2": {"Dice": math.nan}}},
        ]
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    labels = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    liver, spleen = read_dice(tmp_path / "summary.json", labels)
    assert (liver.name, liver.mean, liver.lowest, liver.highest, liver.n_cases) == ("liver", 0.625, 0.5, 0.75, 2)
    assert spleen.n_cases == 0
    assert math.isnan(spleen.mean)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "other": 4}, [1, 2, 3, 4]),
        ({"background": 0, "a": [1], "b": [2]}, None),
    ],
)
def test_structures_are_found_under_nnunets_own_keys(tmp_path: Path, labels: Any, order: Any) -> None:
    manager = LabelManager(labels, order)
    structures = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    metrics = {label_or_region_to_key(s): {"Dice": 0.1 * i} for i, s in enumerate(structures)}
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [{"metrics": metrics}]}))
    rows = read_dice(tmp_path / "summary.json", labels)
    assert [row.mean for row in rows] == [0.1 * i for i in range(len(structures))]


def test_the_figure_shows_each_case_in_three_panels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(3, 20, 30))
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[1, 5:15, 5:15] = 1
    cases = [("a", image, truth, np.zeros_like(truth)), ("b", image, truth, truth)]
    side_by_side(cases, {"background": 0, "liver": 1}, tmp_path / "f.png", spacing=(3.0, 1.0, 1.0))
    pixels = imread(tmp_path / "f.png")[..., :3]
    height, width = pixels.shape[:2]
    coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 0.2
    halves = coloured[: height // 2 - 10], coloured[height // 2 - 10 : int(height * 0.93)]
    thirds = [[half[:, i * width // 3 : (i + 1) * width // 3].mean() for i in range(3)] for half in halves]
    assert thirds[0][0] == 0  # image: grey
    assert thirds[0][1] > 0.02  # truth: liver
    assert thirds[0][2] == 0  # empty prediction
    assert thirds[1][1] > 0.02
    assert thirds[1][2] > 0.02
