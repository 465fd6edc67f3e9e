"""Scores of segmentations on other labels: hand-computed numbers, naive oracles, geometry, left and right."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from stunet.errors import DatasetError
from stunet.evaluation import (
    CaseOrientation,
    EvaluationCase,
    Sides,
    collect_results,
    orientation_warnings,
    score_case,
    surface_scores,
)
from stunet.labels.labels import Labels
from stunet.labels.mappings import Comparison, relate_labels
from stunet.reports.figures import read_dice
from stunet.volumes import read_labels


def write(path: Path, labels: Any, *, spacing: Any = (1, 1, 1), origin: Any = (0, 0, 0), direction: Any = None) -> Path:
    image = sitk.GetImageFromArray(np.asarray(labels, np.uint8))
    image.SetSpacing([float(s) for s in spacing][: image.GetDimension()])
    image.SetOrigin([float(o) for o in origin][: image.GetDimension()])
    if direction is not None:
        image.SetDirection([float(d) for d in np.ravel(direction)])
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def make_case(reference: Path, prediction: Path, target: Any, source: Any, **more: Any) -> EvaluationCase:
    """A case whose comparisons are those of equal names, unless given."""
    comparisons = more.pop("comparisons", None) or relate_labels(source, target).comparisons
    values: dict[str, Any] = {
        "name": reference.name.partition(".")[0],
        "reference": reference,
        "prediction": prediction,
        "comparisons": comparisons,
        "observed": tuple(c.target_values for c in comparisons),
        "target_labels": Labels({"labels": target}).structures,
        "source_labels": Labels({"labels": source}).structures,
        "ignore": target.get("ignore"),
        "tolerance": 1.0,
    }
    return EvaluationCase(**{**values, **more})


def by_name(case: EvaluationCase) -> dict[str, Any]:
    return {c.name: s for c, s in zip(case.comparisons, score_case(case).scores, strict=True)}


def box(shape: tuple[int, ...], *sides: tuple[int, int]) -> Any:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


# Surface metrics ------------------------------------------------------------------------------------------------------


def naive_surface(mask: Any, spacing: tuple[float, ...]) -> list[tuple[np.ndarray, float]]:
    """Elements of a box's surface: their place in mm and their area (length), one for each cube of voxel centres."""
    padded = np.pad(mask, 1)
    elements = []
    for corner in itertools.product(*(range(n - 1) for n in padded.shape)):
        cube = padded[tuple(slice(c, c + 2) for c in corner)]
        inside = np.argwhere(cube)
        if len(inside) in (0, cube.size):
            continue
        # Cut through the middle of each edge that leaves the box: a face, an edge or a corner of it.
        crossed = [axis for axis in range(mask.ndim) if len(set(inside[:, axis])) == 1]
        halves = [spacing[axis] / 2 for axis in crossed]
        others = math.prod(spacing[axis] for axis in range(mask.ndim) if axis not in crossed)
        if len(crossed) == 3:  # the triangle over three half sides
            a, b, c = halves
            area = math.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2) / 2
        else:
            area = others * (math.hypot(*halves) if len(crossed) == 2 else 1.0)
        elements.append((np.array(corner) * spacing, area))
    return elements


def naive_scores(reference: Any, prediction: Any, spacing: Any, tolerance: float) -> tuple[float, float]:
    surfaces = [naive_surface(mask, spacing) for mask in (reference, prediction)]
    within = total = 0.0
    percentiles = []
    for mine, other in (surfaces, surfaces[::-1]):
        distances = [(min(float(np.linalg.norm(p - q)) for q, _ in other), area) for p, area in mine]
        area = sum(a for _, a in distances)
        within += sum(a for d, a in distances if d <= tolerance)
        total += area
        reached, covered = 0.0, 0.0
        for d, a in sorted(distances):
            reached, covered = d, covered + a
            if covered >= 0.95 * area:
                break
        percentiles.append(reached)
    return within / total, max(percentiles)


@pytest.mark.parametrize("seed", range(6))
def test_surface_scores_of_boxes_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_axes = 3 if seed < 4 else 2
    spacing = tuple(rng.uniform(0.5, 3.0, n_axes).tolist())
    shape = (7,) * n_axes
    masks = []
    for _ in range(2):
        sides = [sorted(rng.choice(8, 2, replace=False).tolist()) for _ in range(n_axes)]
        masks.append(box(shape, *((a, b) for a, b in sides)))
    copies = [mask.copy() for mask in masks]
    tolerance = float(rng.uniform(0.5, 4.0))
    found = surface_scores(*masks, spacing, tolerance=tolerance)
    assert found == pytest.approx(naive_scores(*masks, spacing, tolerance), rel=1e-9)
    assert all(np.array_equal(mask, copy) for mask, copy in zip(masks, copies, strict=True))


def test_surface_scores_by_hand() -> None:
    """A box of 4 x 4 x 4 voxels, moved by two voxels of 2 mm: its far faces are 4 mm apart, its other ones overlap."""
    one, other = box((8, 8, 10), (2, 6), (2, 6), (2, 6)), box((8, 8, 10), (2, 6), (2, 6), (4, 8))
    spacing = (1.0, 1.0, 2.0)
    assert surface_scores(one, one, spacing, tolerance=0.0) == (1.0, 0.0)
    assert surface_scores(one, other, spacing, tolerance=4.0) == (1.0, 4.0)
    nsd, hd95 = surface_scores(one, other, spacing, tolerance=0.0)
    assert hd95 == 4.0
    assert 0 < nsd < 1


# Whole cases ----------------------------------------------------------------------------------------------------------

MODEL = {"background": 0, "kidney_left": 1, "kidney_right": 2, "liver": 3, "heart": 4}
DATASET = {"background": 0, "Kidneys": 1, "Leber": 2, "tumour": 3, "prostate": 4, "ignore": 5}
COMPARISONS = (
    Comparison("Kidneys", ("Kidneys",), ("kidney_left", "kidney_right"), (1,), (1, 2)),
    Comparison("whole liver", ("Leber", "tumour"), ("liver",), (2, 3), (3,)),
)


def merged_case(folder: Path) -> EvaluationCase:
    """Kidneys merged by the dataset, the liver by the comparison; a plane to ignore."""
    reference, prediction = np.zeros((4, 6, 12), np.uint8), np.zeros((4, 6, 12), np.uint8)
    reference[:2, 0:2, 0:3] = 1  # 12 voxels
    reference[:2, 0:2, 6:9] = 1  # 12
    prediction[:2, 0:2, 0:3] = 1  # 12, all right
    prediction[:2, 0:2, 8:10] = 2  # 8, of which 4 right
    reference[:2, 3:5, 0:4] = 2  # 16
    reference[:2, 3:5, 4:6] = 3  # 8
    prediction[:2, 3:5, 2:8] = 3  # 24, of which 16 right
    reference[3] = 5
    prediction[3] = 3  # counts for nothing
    prediction[2, 5, 11] = 4  # nothing to compare it with
    return make_case(
        write(folder / "reference" / "a.nii.gz", reference, spacing=(2, 1, 3)),
        write(folder / "prediction" / "a.nii.gz", prediction, spacing=(2, 1, 3)),
        DATASET, MODEL, comparisons=COMPARISONS,
    )  # fmt: skip


def test_renamed_and_merged_labels_by_hand(tmp_path: Path) -> None:
    scores = by_name(merged_case(tmp_path))
    kidneys, liver = scores["Kidneys"].metrics, scores["whole liver"].metrics
    n = 3 * 6 * 12  # without the ignored plane
    expected = {"TP": 16, "FP": 4, "FN": 8, "TN": n - 28, "n_pred": 20, "n_ref": 24, "Dice": 32 / 44, "IoU": 16 / 28}
    assert {key: kidneys[key] for key in expected} == expected
    expected = {"TP": 16, "FP": 8, "FN": 8, "TN": n - 32, "n_pred": 24, "n_ref": 24, "Dice": 2 / 3, "IoU": 0.5}
    assert {key: liver[key] for key in expected} == expected
    reference, prediction = box((3, 6, 12), (0, 2), (3, 5), (0, 6)), box((3, 6, 12), (0, 2), (3, 5), (2, 8))
    by_brute_force = naive_scores(reference, prediction, (3.0, 1.0, 2.0), 1.0)
    assert (liver["NSD"], liver["HD95"]) == pytest.approx(by_brute_force)
    assert liver["HD95"] == 4.0  # two voxels of 2 mm


def test_plain_labels_score_as_in_nnunets_evaluation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference, prediction = rng.integers(0, 5, (5, 6, 7)), rng.integers(0, 4, (5, 6, 7))
    reference[reference == 3] = 0  # so that 3 is spurious
    labels = {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}
    source = {"background": 0, "a": 1, "b": 2, "c": 3}
    paths = write(tmp_path / "r.nii.gz", reference), write(tmp_path / "p.nii.gz", prediction)
    theirs = compute_metrics(*map(str, paths), SimpleITKIO(), [1, 2, 3], 4)["metrics"]
    mine = by_name(make_case(*paths, labels, source))
    for value, name in ((1, "a"), (2, "b"), (3, "c")):
        for metric, expected in theirs[value].items():
            assert mine[name].metrics[metric] == expected, (name, metric)


def test_absent_missed_spurious_and_not_annotated(tmp_path: Path) -> None:
    labels = {"background": 0, "both": 1, "missed": 2, "spurious": 3, "absent": 4, "unknown": 5}
    reference, prediction = np.zeros((3, 4, 5)), np.zeros((3, 4, 5))
    reference[0, 0, :2], prediction[0, 0, :2] = 1, 1
    reference[1, 0, :2], prediction[2, 0, :2], prediction[0, 3, :2] = 2, 3, 5
    case = make_case(
        write(tmp_path / "r.nii.gz", reference), write(tmp_path / "p.nii.gz", prediction), labels, labels,
        observed=((1,), (2,), (3,), (4,), None),
    )  # fmt: skip
    scores = by_name(case)
    found = {name: (s.status, *(s.metrics[m] for m in ("Dice", "NSD", "HD95"))) for name, s in scores.items()}
    assert found == {
        "both": ("scored", 1.0, 1.0, 0.0),
        "missed": ("missed", 0.0, 0.0, None),
        "spurious": ("spurious", 0.0, 0.0, None),
        "absent": ("absent", None, None, None),
        "unknown": ("not annotated", None, None, None),
    }
    assert scores["unknown"].metrics["n_pred"] is None
    assert scores["absent"].metrics["n_pred"] == 0


def test_a_superclass_has_the_voxels_of_its_members(tmp_path: Path) -> None:
    labels = {"background": 0, "kidney": 3}
    paths = write(tmp_path / "r.nii.gz", [[[1, 2, 3, 0]]]), write(tmp_path / "p.nii.gz", [[[3, 3, 0, 3]]])
    target = {"background": 0, "left": 1, "right": 2, "kidney": 3}
    comparison = Comparison("kidney", ("kidney",), ("kidney",), (3,), (3,))
    case = make_case(*paths, target, labels, comparisons=(comparison,), observed=((1, 2, 3),))
    assert by_name(case)["kidney"].metrics["Dice"] == 4 / 6


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".png"])
def test_flat_images_have_contours(tmp_path: Path, ending: str) -> None:
    """A plane is scored in its plane, whatever format it has; not as a slab with a top and a bottom."""
    shape = (9, 9)
    one, other = box(shape, (2, 6), (2, 6)), box(shape, (2, 6), (4, 8))
    arrays = [np.uint8(mask if ending == ".png" else mask[None]) for mask in (one, other)]
    paths = [write(tmp_path / f"{name}{ending}", array) for name, array in zip("rp", arrays, strict=True)]
    metrics = by_name(make_case(*paths, {"a": 1}, {"a": 1}))["a"].metrics
    assert metrics["Dice"] == 0.5
    assert (metrics["NSD"], metrics["HD95"]) == pytest.approx(naive_scores(one, other, (1.0, 1.0), 1.0))


# What cannot be scored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spacing": (1, 1, 1.1)}, r"p.nii.gz .*0.3 mm .* 1.1, .*r.nii.gz"),
        ({"origin": (0, 0.5, 0)}, r"p.nii.gz .*0.5 mm .* -0.5\], .*r.nii.gz"),
        ({"direction": np.diag([-1, -1, 1])}, r"p.nii.gz .*12.8 mm .*\[\[1.0, .*r.nii.gz by \[\[-1.0, "),
        ({"labels": np.zeros((4, 5, 7))}, r"p.nii.gz has another shape, \(7, 5, 4\), than .*r.nii.gz, \(6, 5, 4\)"),
    ],
)
def test_a_prediction_on_another_grid(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    labels = change.pop("labels", np.zeros((4, 5, 6)))
    reference = write(tmp_path / "r.nii.gz", np.zeros((4, 5, 6)))
    prediction = write(tmp_path / "p.nii.gz", labels, **change)
    with pytest.raises(DatasetError, match=expected):
        score_case(make_case(reference, prediction, {"a": 1}, {"a": 1}))


def test_rounding_is_no_other_grid(tmp_path: Path) -> None:
    angle = np.deg2rad(10)
    direction = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    grid = {"spacing": (0.7, 0.7, 3), "origin": (-100.3, 51.7, 8), "direction": direction}
    reference = write(tmp_path / "r.nii.gz", np.zeros((4, 5, 6)), **grid)
    prediction = write(tmp_path / "p.nrrd", np.zeros((4, 5, 6)), **{**grid, "origin": (-100.3, 51.7001, 8)})
    score_case(make_case(reference, prediction, {"a": 1}, {"a": 1}))
    # The two formats' axes are told by SimpleITK and by nibabel's header alike; its x and y run the other way.
    for path in (reference, prediction):
        corner = np.array(sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint((5, 4, 3))) * (-1, -1, 1)
        assert (read_labels(path).affine @ [5, 4, 3, 1])[:3] == pytest.approx(corner, abs=1e-3)


def test_values_that_nothing_lists(tmp_path: Path) -> None:
    empty, seven = (
        write(tmp_path / "e.nii.gz", np.zeros((2, 2, 2))),
        write(tmp_path / "s.nii.gz", np.full((2, 2, 2), 7)),
    )
    with pytest.raises(DatasetError, match=r"s.nii.gz .* list: 7"):
        score_case(make_case(empty, seven, {"a": 1}, {"a": 1}))
    with pytest.raises(DatasetError, match=r"s.nii.gz .* list: 7"):
        score_case(make_case(seven, empty, {"a": 1, "ignore": 6}, {"a": 1}))


def test_files_that_are_no_label_maps(tmp_path: Path) -> None:
    empty = write(tmp_path / "e.nii.gz", np.zeros((2, 2, 2)))
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8bnothing")
    (tmp_path / "broken.mha").write_bytes(b"nothing")
    (tmp_path / "a.npz").write_bytes(b"")
    colour = sitk.GetImageFromArray(np.zeros((3, 3, 3), np.uint8), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "colour.png"))
    for name, expected in {
        "broken.nii.gz": "unreadable image file .*broken.nii",
        "broken.mha": "unreadable image file .*broken.mha",
        "gone.mha": "missing",
        "gone.nii.gz": "missing",
        "a.npz": r"cannot be scored[\s\S]*\.nii\.gz",
        "colour.png": "3 values in each voxel",
    }.items():
        with pytest.raises(DatasetError, match=expected):
            score_case(make_case(empty, tmp_path / name, {"a": 1}, {"a": 1}))


# Left and right -------------------------------------------------------------------------------------------------------

SIDED = {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3}
LPS, RAS = np.eye(3), np.diag([-1.0, -1.0, 1.0])


def body(*, left_at_high_x: bool) -> Any:
    labels = np.zeros((4, 6, 10), np.uint8)
    labels[1, 1:3, 1:3], labels[1, 1:3, 7:9] = (3, 2) if left_at_high_x else (2, 3)
    labels[3, 4, 4:6] = 1
    return labels


def orientation_of(folder: Path, reference: Any, prediction: Any, direction: Any, **more: Any) -> CaseOrientation:
    paths = [
        write(folder / name, labels, direction=direction)
        for name, labels in (("r.nii.gz", reference), ("p.nii.gz", prediction))
    ]
    return score_case(make_case(*paths, SIDED, SIDED, **more)).orientation


@pytest.mark.parametrize("high", [True, False])
@pytest.mark.parametrize("direction", [LPS, RAS])
def test_sides_by_the_images_own_axes(tmp_path: Path, high: bool, direction: Any) -> None:
    """x grows to the patient's left where the direction says LPS, to the right where it says RAS."""
    labels = body(left_at_high_x=high)
    found = orientation_of(tmp_path, labels, labels, direction)
    wrong = high != (direction is LPS)
    assert found == CaseOrientation(Sides(1, int(wrong)), Sides(1, int(wrong)), dice=1.0, swapped_dice=0.0)
    warnings = orientation_warnings({"case_7": found})
    assert len(warnings) == (2 if wrong else 0)
    if wrong:
        assert "label maps of 1 of 1 cases" in warnings[0]
        assert "predictions of 1 of 1 cases" in warnings[1]
        assert all("case_7" in warning for warning in warnings)


def test_mirrored_predictions_would_score_better_swapped(tmp_path: Path) -> None:
    found = orientation_of(tmp_path, body(left_at_high_x=True), body(left_at_high_x=False), LPS)
    assert found == CaseOrientation(Sides(1, 0), Sides(1, 1), dice=0.0, swapped_dice=1.0)
    prediction, swapped = orientation_warnings({"a": found, "b": found, "c": CaseOrientation()})
    assert "predictions of 2 of 2 cases" in prediction
    assert "a Dice of 1.000 instead of 0.000; 2 of 2 cases" in swapped
    assert "(a, b)" in swapped


def test_few_bad_predictions_are_no_sign_but_any_label_map_is() -> None:
    good = CaseOrientation(Sides(2, 0), Sides(2, 0), 0.9, 0.0)
    bad = CaseOrientation(Sides(2, 0), Sides(2, 2), 0.1, 0.8)
    assert orientation_warnings({"a": good, "b": good, "c": bad}) == []
    assert len(orientation_warnings({"a": good, "b": bad, "c": bad})) == 2
    swapped = CaseOrientation(Sides(2, 2), Sides(2, 0), 0.9, 0.0)
    (warning,) = orientation_warnings({"a": good, "b": good, "c": swapped})
    assert "label maps of 1 of 3 cases" in warning
    assert "(c)" in warning
    # a little better, or one pair of two, is no sign either
    doubtful = CaseOrientation(Sides(2, 1), Sides(2, 1), 0.5, 0.6)
    assert orientation_warnings({"a": doubtful}) == []


def test_what_is_not_annotated_says_nothing_about_sides(tmp_path: Path) -> None:
    found = orientation_of(
        tmp_path, body(left_at_high_x=True), body(left_at_high_x=False), LPS, observed=((1,), (2,), None)
    )
    assert (found.dice, found.swapped_dice) == (None, None)


# All cases together ---------------------------------------------------------------------------------------------------


def results_of(folder: Path) -> Any:
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    jobs, scores = [], {}
    for name, reference, prediction, observed in (
        ("z", [1, 1, 0, 0, 2, 2], [1, 0, 0, 0, 2, 2], ((1,), (2,), (3,))),
        ("y", [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 2, 0], ((1,), (2,), (3,))),
        ("x", [0, 0, 0, 0, 2, 2], [1, 0, 0, 0, 0, 0], (None, (2,), (3,))),
    ):
        paths = (write(folder / f"{which}_{name}.nii.gz", [[values] * 2] * 2) for which, values in
                 (("r", reference), ("p", prediction)))  # fmt: skip
        job = make_case(*paths, labels, labels, name=name, observed=observed)
        jobs.append(job)
        scores[name] = score_case(job)
    failed = make_case(folder / "gone.nii.gz", folder / "gone.nii.gz", labels, labels, name="w")
    return collect_results(scores, [*jobs, failed])


def test_means_leave_out_what_has_no_score(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    assert list(results.cases) == ["x", "y", "z"]
    a, b, c = results.structures
    assert a.mean["Dice"] == pytest.approx((2 / 3 + 1) / 2)
    assert (*a.counts.values(), a.infinite) == (2, 0, 0, 0, 1, 0)
    assert b.mean["Dice"] == pytest.approx((1 + 0 + 0) / 3)
    assert b.mean["NSD"] == pytest.approx(1 / 3)
    assert b.mean["HD95"] == 0.0  # of the one case where it is finite
    assert (*b.counts.values(), b.infinite) == (1, 1, 1, 0, 0, 2)
    assert {c.mean[m] for m in ("Dice", "IoU", "NSD", "HD95")} == {None}
    assert c.counts["absent"] == 3
    assert results.mean["Dice"] == pytest.approx((5 / 6 + 1 / 3) / 2)
    assert results.values("Dice") == {"a": [1.0, pytest.approx(2 / 3)], "b": [0.0, 0.0, 1.0], "c": []}


def test_the_summary_is_nnunets(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(results.summary(dataset="D"), allow_nan=False))
    theirs = load_summary_json(str(path))
    assert theirs["mean"][1]["Dice"] == pytest.approx(5 / 6)
    assert [case["metrics"][2]["Dice"] for case in theirs["metric_per_case"]] == [0.0, 0.0, 1.0]
    assert theirs["foreground_mean"]["Dice"] == pytest.approx((5 / 6 + 1 / 3) / 2)
    assert theirs["metric_per_case"][2]["reference_file"] == str(tmp_path / "r_z.nii.gz")
    assert theirs["metric_per_case"][0]["status"] == {"1": "not annotated", "2": "missed", "3": "absent"}
    assert theirs["dataset"] == "D"
    assert theirs["structures"]["2"]["HD95_infinite"] == 2
    assert theirs["structures"]["2"]["source"] == ["b"]
    rows = read_dice(path, {"background": 0, "a": 1, "b": 2, "c": 3})
    assert [(row.name, row.n_cases) for row in rows] == [("a", 2), ("b", 3), ("c", 0)]


def test_merged_labels_have_nnunets_keys(tmp_path: Path) -> None:
    case = merged_case(tmp_path)
    summary = collect_results({"a": score_case(case)}, [case]).summary()
    assert list(summary["mean"]) == ["1", "(2, 3)"]
    assert summary["structures"]["(2, 3)"]["name"] == "whole liver"


def test_the_csv_has_a_row_for_each_case_and_structure(tmp_path: Path) -> None:
    results_of(tmp_path).write_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"]) for row in rows] == list(itertools.product("xyz", "abc"))
    assert [row["status"] for row in rows] == [
        "not annotated", "missed", "absent", "scored", "spurious", "absent", "scored", "scored", "absent",
    ]  # fmt: skip
    assert (rows[6]["Dice"], rows[6]["HD95_mm"], rows[6]["TP"]) == (str(2 / 3), "1.0", "4")
    assert (rows[0]["Dice"], rows[0]["n_pred"], rows[1]["HD95_mm"], rows[1]["Dice"]) == ("", "", "", "0.0")
