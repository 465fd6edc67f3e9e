from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.image import imread
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.spatial.transform import Rotation

from stunet.datasets.raw import plane_names, read_image
from stunet.evaluation import CaseOrientation, CaseScores, EvaluationCase, collect_results, volume_scores
from stunet.inference.outputs import draw_preview
from stunet.labels.mappings import Comparison
from stunet.reports.figures import draw_scores, read_dice, side_by_side


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


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("code", ["LPS", "RAI", "PSR", "SLA", "IAL", "ASL"])
def test_planes_are_named_by_the_images_directions(code: str, reader: Any, tmp_path: Path) -> None:
    """ITK's own code says where each axis (x, y, z) leads; a little obliqueness changes nothing."""
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.float32))
    image.SetDirection(Rotation.from_euler("xyz", [8, -5, 6], degrees=True).as_matrix().ravel())
    oriented = sitk.DICOMOrient(image, code)
    sitk.WriteImage(oriented, str(tmp_path / "a.nii.gz"))
    across = {"L": "sagittal", "R": "sagittal", "P": "coronal", "A": "coronal", "S": "axial", "I": "axial"}
    letters = "RAS" if reader is NibabelIOWithReorient else code
    volume, properties = reader().read_images([str(tmp_path / "a.nii.gz")])
    assert plane_names(properties) == tuple(across[letter] for letter in letters[::-1])
    assert volume.shape[1:][plane_names(properties).index("axial")] == 4


def test_pictures_name_their_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    image = sitk.DICOMOrient(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), "PSR")
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    volume, properties = read_image(tmp_path / "a.nii.gz")
    spacing, planes = properties["spacing"], plane_names(properties)
    labels = np.zeros(volume.shape, np.uint8)
    labels[1, 2, 3] = 1
    draw_preview(volume, labels, {"liver": (1,)}, spacing, tmp_path / "p.png", title="a", planes=planes)
    assert titles == ["sagittal, plane 1", "axial, plane 2", "coronal, plane 3"]
    titles.clear()
    side_by_side(
        [("a", volume, {"truth": labels, "prediction": labels})], {"liver": 1}, tmp_path / "f.png", plane_name=planes[0]
    )
    assert titles == ["a: image, sagittal", "a: truth, sagittal", "a: prediction, sagittal"]


def test_an_image_without_directions_has_axes() -> None:
    assert plane_names({"spacing": (999, 1, 1)}) == ("first axis", "second axis", "third axis")


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
