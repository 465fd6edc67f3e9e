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

from stunet.evaluation import CaseOrientation, CaseScores, EvaluationCase, collect_results, volume_scores
from stunet.labels import Comparison
from stunet.reports import draw_scores, read_dice, side_by_side


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
    cases = [
        ("a", image, {"truth": truth, "prediction": np.zeros_like(truth)}),
        ("b", image, {"truth": truth, "prediction": truth}),
    ]
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


def test_the_figure_of_scores_has_a_row_for_each_structure(tmp_path: Path) -> None:
    """Dots where the scores are: structures with higher Dice have them further to the right."""
    names = ["low", "high", "none"]
    comparisons = [Comparison(name, (name,), (name,), (i,), (i,)) for i, name in enumerate(names, start=1)]
    cases = {}
    for case in "abc":
        scores = [volume_scores(tp, 10, 10 if tp else 0, 1000) for tp in (1, 9)]
        cases[case] = CaseScores((*scores, volume_scores(0, 0, 0, 1000)), CaseOrientation())
    jobs = [
        EvaluationCase(c, tmp_path, tmp_path, tuple(comparisons), ((1,), (2,), (3,)), {}, {}, None, 1.0) for c in cases
    ]
    draw_scores(collect_results(cases, jobs), tmp_path / "f.png", title="model on dataset")
    pixels = imread(tmp_path / "f.png")[..., :3]
    reddish = (pixels[..., 0] - pixels[..., 2]) > 0.4  # the bars at the means, of the first panel alone
    third = reddish[:, : pixels.shape[1] // 3]
    rows = np.flatnonzero(third.any(axis=1))
    upper, lower = np.array_split(rows, 2)
    assert len(rows) > 0
    columns = [np.flatnonzero(third[part].any(axis=0)).mean() for part in (upper, lower)]
    assert columns[0] < columns[1]
