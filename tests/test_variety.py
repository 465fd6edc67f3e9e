"""Hyperspherical energy against its closed forms, and feature variety."""

from __future__ import annotations

import math

import numpy as np
import pytest
from case_features import make_cases, replaced
from scipy.spatial.distance import pdist
from scipy.special import gammaln

from stunet.errors import TransferabilityError
from stunet.ranking import feature_variety, hyperspherical_energy


def on_sphere(n: int, width: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((n, width))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_simplex(n: int) -> None:
    points = np.eye(n) - 1 / n
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    assert hyperspherical_energy(points) == pytest.approx(math.sqrt((n - 1) / (2 * n)), rel=1e-12)


def test_orthonormal_points_and_cross_polytope() -> None:
    assert hyperspherical_energy(np.eye(6)) == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert hyperspherical_energy(np.concatenate([np.eye(5), -np.eye(5)])) == pytest.approx(0.684095, abs=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(3, 1.0), (64, 0.71140)])
def test_uniform_on_the_sphere(width: int, expected: float) -> None:
    logs = (width - 3) * math.log(2) + gammaln(width / 2) + gammaln((width - 2) / 2) - gammaln(width - 1.5)
    assert math.exp(logs) / math.sqrt(math.pi) == pytest.approx(expected, abs=1e-5)
    got = hyperspherical_energy(on_sphere(3000, width), floor=1e-6)
    assert got == pytest.approx(expected, abs=5e-3 if width == 3 else 5e-4)
    # The floor costs little where points are near by chance.
    assert hyperspherical_energy(on_sphere(3000, width)) == pytest.approx(got, rel=5e-3)


@pytest.mark.parametrize("s", [0, 0.5, 1, 2])
@pytest.mark.parametrize("n", [2, 512, 1100])
def test_blocks_against_all_pairs_at_once(s: float, n: int) -> None:
    points = 3 + 2 * np.random.default_rng(1).standard_normal((n, 5))
    distances = pdist(points)
    expected = -np.log(distances).mean() if s == 0 else (distances**-s).mean()
    assert hyperspherical_energy(points, s=s, floor=1e-9) == pytest.approx(expected, rel=1e-9)


def test_coincident_points_are_bounded_and_scale_does_not_matter_to_that() -> None:
    points = on_sphere(50, 16)
    assert hyperspherical_energy(np.tile(points[:1], (50, 1))) == pytest.approx(100)
    twice = np.concatenate([points, points[:1]])
    pairs = 51 * 50 / 2
    expected = (np.sum(1 / pdist(points)) + np.sum(1 / np.linalg.norm(points[1:] - points[0], axis=1)) + 100) / pairs
    assert hyperspherical_energy(twice) == pytest.approx(expected, rel=1e-9)
    assert hyperspherical_energy(1e-3 * twice) == pytest.approx(1e3 * expected, rel=1e-9)


def test_variety_is_the_mean_over_cases() -> None:
    cases = make_cases(3)
    before = cases[0].variety[0].copy()
    got = feature_variety(cases)
    for d, value in enumerate(got):
        inverses = []
        for case in cases:
            points = case.variety[d].astype(float)
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            inverses.append(1 / np.mean(1 / pdist(points)))
        assert value == pytest.approx(np.mean(inverses), rel=1e-9)
    assert feature_variety(cases, normalise=False)[0] != pytest.approx(got[0], rel=1e-2)
    np.testing.assert_array_equal(cases[0].variety[0], before)


def test_what_has_no_energy_is_refused() -> None:
    for bad in (np.ones((1, 3)), np.zeros((4, 3)), np.ones(3), np.array([[1.0, np.nan], [0, 1]])):
        with pytest.raises(TransferabilityError, match="at least 2 points"):
            hyperspherical_energy(bad)
    for options in ({"s": -1.0}, {"floor": 0.0}):
        with pytest.raises(TransferabilityError, match="power"):
            hyperspherical_energy(np.eye(3), **options)
    with pytest.raises(TransferabilityError, match="power above 0"):
        feature_variety(make_cases(2), s=0)
    dead = [replaced(c, variety=tuple(np.zeros_like(v) for v in c.variety)) for c in make_cases(2)]
    with pytest.raises(TransferabilityError, match="dead layer"):
        feature_variety(dead)
