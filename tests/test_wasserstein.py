"""W2 between Gaussians, against closed forms, matrix square roots and POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import scipy.linalg

from stunet.errors import TransferabilityError
from stunet.ranking import (
    factor_from_moments,
    gaussian_factor,
    pairwise_fidelity,
    pairwise_wasserstein2,
    wasserstein,
    wasserstein2,
)

RNG = np.random.default_rng(0)


def exact_sample(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """A sample of 2C points that has exactly these moments: mean +- sqrt(lambda (n - 1) / 2) v."""
    values, vectors = np.linalg.eigh(covariance)
    n = 2 * len(mean)
    steps = (np.sqrt(values * (n - 1) / 2) * vectors).T
    return np.concatenate([mean + steps, mean - steps])


def spd(width: int, rng: np.random.Generator, rank: int | None = None) -> np.ndarray:
    a = rng.standard_normal((width, rank or width))
    return a @ a.T / width


def by_square_roots(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    if min(len(x), len(y)) > x.shape[1]:
        root = scipy.linalg.sqrtm(a)
        fidelity = np.trace(np.real(scipy.linalg.sqrtm(root @ b @ root)))
    else:  # Schur's method fails at singular matrices
        values, vectors = np.linalg.eigh(a)
        root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        fidelity = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return math.sqrt(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * fidelity)


def test_commuting_diagonals() -> None:
    a, b, shift = np.diag([1.0, 4, 9]), np.diag([4.0, 1, 16]), np.array([1.0, 2, 2])
    # 9 of the means, 1 of each axis
    got = wasserstein2(factor_from_moments(np.zeros(3), a), factor_from_moments(shift, b))
    assert got == pytest.approx(3.4641016, abs=1e-7)
    sampled = wasserstein2(gaussian_factor(exact_sample(np.zeros(3), a)), gaussian_factor(exact_sample(shift, b)))
    assert sampled == pytest.approx(math.sqrt(12), rel=1e-12)


def test_two_dimensions() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a, b, mean = spd(2, rng), spd(2, rng), rng.standard_normal(2)
        fidelity = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
        expected = math.sqrt(mean @ mean + np.trace(a) + np.trace(b) - 2 * fidelity)
        one, other = factor_from_moments(np.zeros(2), a), factor_from_moments(mean, b)
        assert wasserstein2(one, other) == pytest.approx(expected, rel=1e-10)
        assert pairwise_fidelity([one, other])[0, 1] == pytest.approx(fidelity, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 40, 6), (12, 12, 30), (7, 25, 12), (13, 12, 12), (2, 3, 4)])
def test_samples_against_square_roots_of_covariances(n: int, m: int, width: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, width)) * np.arange(1, width + 1), 0.3 + rng.standard_normal((m, width))
    got = wasserstein2(gaussian_factor(x), gaussian_factor(y))
    # Square roots of eigenvalues that should be zero have half of the digits.
    assert got == pytest.approx(by_square_roots(x, y), rel=1e-6 if min(n, m) <= width else 1e-9)
    moments = [factor_from_moments(z.mean(0), np.cov(z.T)) for z in (x, y)]
    assert got == pytest.approx(wasserstein2(*moments), rel=1e-8)


@pytest.mark.parametrize("width", [2, 5, 20])
def test_pot_agrees(width: int) -> None:
    rng = np.random.default_rng(width)
    means, covariances = rng.standard_normal((2, width)), [spd(width, rng), spd(width, rng)]
    expected = float(ot.gaussian.bures_wasserstein_distance(*means, *covariances))
    got = wasserstein2(*map(factor_from_moments, means, covariances))
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "width"), [(10, 40), (60, 8)])
def test_it_is_a_distance_that_moves_with_the_axes(n: int, width: int) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, n, width)) * np.linspace(1, 3, width)
    a, b = gaussian_factor(x), gaussian_factor(y)
    assert wasserstein2(a, gaussian_factor(x.copy())) == pytest.approx(0, abs=1e-6 * math.sqrt(a.trace))
    assert wasserstein2(a, b) == pytest.approx(wasserstein2(b, a), rel=1e-12)
    rotation, _ = np.linalg.qr(rng.standard_normal((width, width)))
    moved = [gaussian_factor(z @ rotation + 5) for z in (x, y)]
    assert wasserstein2(*moved) == pytest.approx(wasserstein2(a, b), rel=1e-9)
    assert wasserstein2(gaussian_factor(3 * x), gaussian_factor(3 * y)) == pytest.approx(3 * wasserstein2(a, b))
    assert a.trace == pytest.approx(np.trace(np.cov(x.T)))
    assert a.factor.shape == (min(n - 1, width), width)


def test_pairs_are_what_single_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [RNG.standard_normal((n, 9)) + n / 10 for n in (4, 12, 7, 30, 10)]
    factors = [gaussian_factor(sample) for sample in samples]
    expected = [[0 if a is b else wasserstein2(a, b) for a in factors] for b in factors]
    np.testing.assert_allclose(pairwise_wasserstein2(factors), expected, rtol=1e-12)
    monkeypatch.setattr(wasserstein, "_BLOCK_BYTES", 8 * 9 * 9 * 2)  # two pairs at a time
    np.testing.assert_allclose(pairwise_wasserstein2(factors), expected, rtol=1e-12)
    np.testing.assert_allclose(np.diag(pairwise_fidelity(factors)), [np.trace(np.cov(x.T)) for x in samples])


def test_inputs_stay_as_they_are() -> None:
    x = RNG.standard_normal((5, 3)).astype(np.float32)
    before = x.copy()
    gaussian_factor(x)
    np.testing.assert_array_equal(x, before)


def test_what_has_no_covariance_is_refused() -> None:
    for bad in (np.zeros((1, 4)), np.zeros(4), np.array([[1.0, np.nan], [2, 3]]), np.zeros((0, 3))):
        with pytest.raises(TransferabilityError, match="at least 2 points"):
            gaussian_factor(bad)
    for mean, covariance in (
        (np.zeros(2), np.eye(3)),
        (np.zeros(2), np.array([[1.0, 0.5], [0, 1]])),
        (np.zeros(2), np.diag([1.0, -0.1])),
        (np.zeros(2), np.diag([1.0, np.inf])),
    ):
        with pytest.raises(TransferabilityError, match="positive semidefinite"):
            factor_from_moments(mean, covariance)
