"""Voxels drawn from cases: which, how many, and always the same ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chisquare

from stunet.errors import DatasetError, UsageError
from stunet.ranking import CasePoints, draw_points

IGNORE = 4


def segmentation() -> npt.NDArray[np.int16]:
    """Background, two large classes, one of three voxels, voxels outside the image, and the ignore label."""
    labels = np.random.default_rng(0).choice([-1, 0, 1, 2, IGNORE], p=[0.2, 0.4, 0.2, 0.1, 0.1], size=(14, 9, 11))
    labels = labels.astype(np.int16)
    labels[labels == 3] = 0
    labels[3, 4, 5] = labels[9, 0, 10] = labels[13, 8, 10] = 3
    return labels


def draw(labels: npt.NDArray[Any], case: str = "case_1", **more: Any) -> CasePoints:
    return draw_points(labels, case=case, **{"per_class": 20, "n_whole": 50, "ignore_label": IGNORE, **more})


def test_each_class_gets_as_many_points_as_asked_for_or_as_it_has() -> None:
    labels = segmentation()
    before = labels.copy()
    points = draw(labels)
    assert np.array_equal(labels, before)
    values, counts = np.unique(points.labels, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0: 20, 1: 20, 2: 20, 3: 3}
    assert np.array_equal(labels[tuple(points.balanced.T)], points.labels)
    assert {tuple(p) for p in points.balanced[points.labels == 3].tolist()} == {(3, 4, 5), (9, 0, 10), (13, 8, 10)}
    assert len({tuple(p) for p in points.balanced.tolist()}) == 63  # each voxel once
    assert points.voxels == {c: int((labels == c).sum()) for c in range(4)}
    assert points.fewer == {3: 3}
    assert json.loads(json.dumps(points.as_dict()))["fewer"] == {"3": 3}
    assert points.shape == labels.shape


def test_nothing_outside_the_image_and_nothing_ignored() -> None:
    labels = segmentation()
    points = draw(labels, per_class=10_000, n_whole=10_000)
    allowed = (labels >= 0) & (labels != IGNORE)
    for drawn in (points.balanced, points.whole):  # all that there is, and nothing else
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, np.argwhere(allowed).tolist()))
    assert IGNORE not in points.voxels
    assert points.as_dict()["whole"] == {"asked": 10_000, "drawn": int(allowed.sum())}
    without = draw(labels, per_class=10_000, n_whole=10_000, ignore_label=None)
    assert without.voxels[IGNORE] == int((labels == IGNORE).sum())
    assert sorted(map(tuple, without.whole.tolist())) == sorted(map(tuple, np.argwhere(labels >= 0).tolist()))


def test_absent_classes_are_passed_over() -> None:
    points = draw(np.where(segmentation() == 1, 0, segmentation()))
    assert set(points.labels.tolist()) == set(points.voxels) == {0, 2, 3}


def test_same_points_whatever_the_order_and_the_other_classes() -> None:
    labels = segmentation()
    first = draw(labels)
    other = draw(labels, case="case_2")
    again = draw(labels)
    for name in ("balanced", "labels", "whole"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.balanced, other.balanced)
    assert not np.array_equal(first.whole, other.whole)
    assert not np.array_equal(first.balanced, draw(labels, seed=1).balanced)
    fewer = draw(np.where(labels == 2, 0, labels))
    assert np.array_equal(first.balanced[first.labels == 1], fewer.balanced[fewer.labels == 1])
    assert np.array_equal(first.balanced, draw(labels.astype(np.int8)).balanced)
    assert np.array_equal(first.balanced, draw(np.asfortranarray(labels)).balanced)


def test_all_voxels_are_equally_likely() -> None:
    labels = np.zeros((4, 3, 5), np.int8)
    labels[1], labels[2, 0] = 1, -1
    hits = np.zeros((2, *labels.shape))
    for seed in range(400):
        points = draw(labels, per_class=5, n_whole=5, seed=seed)
        for kind, drawn in enumerate((points.balanced[points.labels == 0], points.whole)):
            np.add.at(hits[kind], tuple(drawn.T), 1)
    assert chisquare(hits[0][labels == 0]).pvalue > 1e-3
    assert chisquare(hits[1][labels >= 0]).pvalue > 1e-3
    assert hits[:, labels < 0].sum() == hits[0][labels == 1].sum() == 0


def test_cases_without_labels_and_impossible_numbers() -> None:
    labels = segmentation()
    with pytest.raises(DatasetError, match="no voxel to draw"):
        draw(np.full((3, 3, 3), -1))
    with pytest.raises(DatasetError, match="no voxel to draw"):
        draw(np.full((3, 3, 3), IGNORE))
    with pytest.raises(DatasetError, match="channel axis"):
        draw(labels[None])
    with pytest.raises(DatasetError, match="float64"):
        draw(labels.astype(float))
    for wrong in ({"per_class": 0}, {"n_whole": 0}, {"seed": -1}, {"per_class": 2.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            draw(labels, **wrong)
