"""CC-FV against its formulas written out, its noise, its bootstrap; W2 and hyperspherical energy in closed form."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import ot
import pytest
import scipy.linalg
from case_features import make_case, make_cases, replaced, scaled
from scipy.spatial.distance import pdist
from scipy.special import gammaln

from stunet.errors import TransferabilityError
from stunet.ranking import CaseFeatures
from stunet.ranking.ccfv import (
    VARIANTS,
    GaussianFactor,
    bootstrap_scores,
    ccfv,
    ccfv_variants,
    gaussian_factor,
    hyperspherical_energy,
    pairwise_fidelity,
    pairwise_wasserstein2,
    scores_of_draws,
)

DEBIAS = ["none", "null", "project"]


def wasserstein2(a: GaussianFactor, b: GaussianFactor) -> float:
    return float(pairwise_wasserstein2([a, b])[0, 1])


def factor_from_moments(mean: np.ndarray, covariance: np.ndarray) -> GaussianFactor:
    values, vectors = np.linalg.eigh(covariance)
    return GaussianFactor(mean, np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T)


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def w2(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.real(scipy.linalg.sqrtm(a))
    fidelity = np.trace(np.real(scipy.linalg.sqrtm(root @ b @ root)))
    return math.sqrt(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * fidelity)


def with_gaps() -> list[CaseFeatures]:
    """Four cases: class 1 is in all, 2 in two, 5 in one."""
    rng = np.random.default_rng(7)
    classes = [(0, 1, 2), (0, 1), (0, 1, 2), (0, 1, 5)]
    return [make_case(f"case{i}", rng, classes=c) for i, c in enumerate(classes)]


@pytest.mark.parametrize("normalise", ["none", "variety", "both"])
def test_the_formula_written_out(normalise: str) -> None:
    cases = with_gaps()
    before = [case.scales[0].copy() for case in cases]
    result = ccfv(cases, normalise=normalise, debias="none")  # type: ignore[arg-type]
    total = 0.0
    for d in range(2):
        by_class = {}
        for label in (1, 2):
            having = [case.scales[d][case.labels == label].astype(float) for case in cases if label in case.labels]
            having = [unit(x) for x in having] if normalise == "both" else having
            by_class[label] = np.mean([w2(x, y) for x, y in combinations(having, 2)])
            assert result.class_consistency[d][label] == pytest.approx(by_class[label], rel=1e-6)
        volume = [case.variety[d].astype(float) for case in cases]
        volume = [unit(v) for v in volume] if normalise != "none" else volume
        variety = np.mean([1 / np.mean(1 / pdist(v)) for v in volume])
        consistency = np.mean(list(by_class.values()))
        assert result.variety[d] == pytest.approx(variety, rel=1e-9)
        assert result.consistency[d] == pytest.approx(consistency, rel=1e-6)
        assert result.per_scale[d] == pytest.approx(math.log(variety / consistency), abs=1e-6)
        total += math.log(variety / consistency) / 2
    assert result.score == pytest.approx(total, abs=1e-6)
    assert result.pairs == {1: 6, 2: 1, 5: 0}
    assert result.noise == (0, 0)
    for case, features in zip(cases, before, strict=True):
        np.testing.assert_array_equal(case.scales[0], features)
    content = json.loads(json.dumps(result.as_dict()))
    assert content["class_consistency"][1]["2"] == result.class_consistency[1][2]
    assert content["cases"] == ["case0", "case1", "case2", "case3"]


@pytest.mark.parametrize("debias", DEBIAS)
def test_scaling_a_layer(debias: Any) -> None:
    cases = make_cases(3, widths=(6, 40))
    grown = [scaled(case, 1, 8.0) for case in cases]
    options: dict[str, Any] = {"debias": debias}
    assert ccfv(grown, **options).score == pytest.approx(ccfv(cases, **options).score, abs=1e-6)
    assert ccfv(grown, normalise="none", **options).score == pytest.approx(
        ccfv(cases, normalise="none", **options).score, abs=1e-6
    )
    # Only the distances of one scale of two grow.
    change = ccfv(grown, normalise="variety", **options).score - ccfv(cases, normalise="variety", **options).score
    assert change == pytest.approx(-math.log(8) / 2, abs=1e-6)


@pytest.mark.parametrize("debias", DEBIAS)
def test_order_does_not_matter(debias: Any) -> None:
    cases = with_gaps()
    score = ccfv(cases, debias=debias).score
    assert ccfv(cases[::-1], debias=debias).score == pytest.approx(score, abs=1e-9)
    order = np.random.default_rng(1).permutation(len(cases[0].labels))
    shuffled = [replaced(c, variety=tuple(v[::-1] for v in c.variety)) for c in cases]
    if debias == "none":  # halves depend on the order of points
        labels, scales = cases[0].labels[order], tuple(s[order] for s in cases[0].scales)
        shuffled[0] = replaced(shuffled[0], labels=labels, scales=scales, probabilities=None)
    assert ccfv(shuffled, debias=debias).score == pytest.approx(score, abs=1e-9)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))
    turned = [
        replaced(c, scales=((c.scales[0] @ rotation).astype(np.float32), c.scales[1]),
                 variety=((c.variety[0] @ rotation).astype(np.float32), c.variety[1]))
        for c in cases
    ]  # fmt: skip
    assert ccfv(turned, debias=debias).score == pytest.approx(score, abs=1e-5)


def gaussians(width: int, distance: float, n_cases: int = 8, seed: int = 0, points: int = 100) -> list[CaseFeatures]:
    """Cases of one class with equal covariances, a 1/k spectrum of trace 1, and means at equal distances."""
    rng = np.random.default_rng([seed, width])
    axes, _ = np.linalg.qr(rng.standard_normal((width, n_cases)))
    spectrum = 1 / np.arange(1, width + 1)
    spectrum /= spectrum.sum()
    cases = []
    for i in range(n_cases):
        rows = rng.standard_normal((points, width)) * np.sqrt(spectrum) + distance / math.sqrt(2) * axes[:, i]
        rows32 = rows.astype(np.float32)
        cases.append(CaseFeatures(case=f"c{i}", labels=np.ones(points, int), scales=(rows32,), variety=(rows32,)))
    return cases


def test_equal_distances_look_equal_at_all_widths() -> None:
    def found(debias: Any, width: int) -> float:
        return ccfv(gaussians(width, 0.5), normalise="none", debias=debias).consistency[0]

    none, null, project = ([found(debias, width) for width in (64, 512)] for debias in DEBIAS)
    assert none[1] / none[0] > 1.3
    assert none[1] > 1.7 * 0.5
    assert null == pytest.approx([0.5, 0.5], rel=0.06)
    assert project[1] / project[0] == pytest.approx(1, abs=0.1)


def test_the_means_of_few_points_lose_their_noise() -> None:
    # Noise of the means would add 2/16 to the square.
    found = [ccfv(gaussians(64, 0.5, 12, seed, 16), normalise="none").consistency[0] ** 2 for seed in range(3)]
    assert np.mean(found) == pytest.approx(0.25, abs=0.06)


def test_noise_is_told_from_differences() -> None:
    same, near, far = (ccfv(gaussians(128, d), normalise="none") for d in (0.0, 0.5, 5.0))
    assert same.noise[0] > 0.93
    assert far.noise[0] < 0.05
    assert same.noise[0] > near.noise[0] > far.noise[0]
    assert far.unresolved == ((),)
    # The null itself knows nothing of the distance between cases: it is W2 of two samples of 50 points.
    samples = [np.split(case.scales[0], 2) for case in gaussians(128, 0.0, seed=3)]
    naive = np.sqrt(np.mean([wasserstein2(*map(gaussian_factor, halves)) ** 2 for halves in samples]))
    for result in (same, near, far):
        assert result.null[0] == pytest.approx(naive, rel=0.03)
    assert ccfv(gaussians(128, 0.5), normalise="none", debias="none").null == pytest.approx(near.null)


def test_what_is_all_noise_gets_a_floor() -> None:
    # Both halves of the other case are its points doubled, so more than everything is noise.
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 30)).astype(np.float32)
    cases = [
        CaseFeatures(case=name, labels=np.ones(40, int), scales=(rows,), variety=(rows,))
        for name, rows in (("a", points), ("b", points[::-1] + np.float32(1e-3)))
    ]
    result = ccfv(cases, normalise="none")
    raw = ccfv(cases, normalise="none", debias="none")
    assert result.unresolved == ((1,),)
    assert result.consistency[0] == pytest.approx(raw.consistency[0] / 10, rel=1e-6)
    assert result.noise == (1.0,)


def test_projection_leaves_narrow_features_alone() -> None:
    cases = make_cases(3, widths=(8, 32))
    assert ccfv(cases, debias="project").consistency == pytest.approx(ccfv(cases, debias="none").consistency)
    narrow = ccfv(cases, debias="project", project_to=16).consistency
    assert narrow[0] == ccfv(cases, debias="none").consistency[0]
    assert narrow[1] != pytest.approx(ccfv(cases, debias="none").consistency[1], rel=1e-3)


@pytest.mark.parametrize("debias", DEBIAS)
def test_bootstrap_against_a_loop(debias: Any) -> None:
    cases = with_gaps()
    result = ccfv(cases, debias=debias, normalise="none", project_to=4)
    draws = np.random.default_rng(3).multinomial(4, np.full(4, 1 / 4), size=25)
    got = scores_of_draws(result, draws)
    for draw, score in zip(draws, got, strict=True):
        drawn = [i for i, count in enumerate(draw) for _ in range(count)]
        logs = []
        for d in range(2):
            variety = np.mean([1 / np.mean(1 / pdist(cases[i].variety[d].astype(float))) for i in drawn])
            of_classes = []
            for pairs in result.distances[d].values():
                at = {case: row for row, case in enumerate(pairs.cases.tolist())}
                matrix = pairs.distances if pairs.squares is None else pairs.squares
                chosen = [(at[i], at[j]) for i in drawn for j in drawn if i != j and i in at and j in at]
                if chosen:
                    mean = np.mean([matrix[ij] for ij in chosen])
                    if pairs.squares is not None:
                        mean = math.sqrt(max(mean, 0.01 * np.mean([pairs.distances[ij] ** 2 for ij in chosen])))
                    of_classes.append(mean)
            logs.append(math.log(variety / np.mean(of_classes)) if of_classes else math.nan)
        assert score == pytest.approx(np.mean(logs), abs=1e-9, nan_ok=True)
    assert np.isfinite(got).sum() >= 20


def test_bootstrap_draws() -> None:
    result = ccfv(with_gaps())
    draws = np.random.default_rng(1).multinomial(4, np.full(4, 1 / 4), size=2000)
    assert not np.array_equal(bootstrap_scores(result, n_resamples=9, seed=2), bootstrap_scores(result, n_resamples=9))
    scores = bootstrap_scores(result, n_resamples=2000, seed=1)
    np.testing.assert_array_equal(scores, scores_of_draws(result, draws))
    # No pair where one case is all that was drawn.
    np.testing.assert_array_equal(np.isnan(scores), (draws == 4).any(1))
    once_each = scores_of_draws(result, np.ones((1, 4), int))
    assert once_each[0] == pytest.approx(result.score, abs=1e-12)


def test_targets_without_a_pair_are_refused() -> None:
    rng = np.random.default_rng(0)
    one = make_case("only", rng)
    with pytest.raises(TransferabilityError, match=r"1 cases .*class 1 in only only, class 2 in only only"):
        ccfv([one])
    apart = [make_case("a", rng, classes=(0, 1)), make_case("b", rng, classes=(0, 2))]
    with pytest.raises(TransferabilityError, match=r"2 cases .*class 1 in a only, class 2 in b only"):
        ccfv(apart)
    with pytest.raises(TransferabilityError, match="no foreground"):
        ccfv([make_case(name, rng, classes=(0,)) for name in "ab"])
    few = [make_case(name, rng, classes=(0, 1), points=7) for name in "ab"]
    with pytest.raises(TransferabilityError, match="8 points"):
        ccfv(few)
    assert math.isfinite(ccfv(few, min_points=7).score)


def test_features_and_options_that_allow_no_score_are_refused() -> None:
    cases = make_cases(2)
    bad = cases[0].scales[1].copy()
    bad[3, 2] = np.nan
    with pytest.raises(TransferabilityError, match=r"scale 1.*1 of 600 values are NaN or infinite in case case0"):
        replaced(cases[0], scales=(cases[0].scales[0], bad))
    constant = [replaced(c, scales=(np.ones_like(c.scales[0]), c.scales[1])) for c in cases]
    with pytest.raises(TransferabilityError, match="scale 0: no distance"):
        ccfv(constant)
    for options in ({"debias": "jackknife"}, {"normalise": "all"}):
        with pytest.raises(TransferabilityError, match=str(next(iter(options.values())))):
            ccfv(cases, **options)  # type: ignore[arg-type]


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


def test_pairs_are_what_single_ones_are() -> None:
    samples = [RNG.standard_normal((n, 9)) + n / 10 for n in (4, 12, 7, 30, 10)]
    factors = [gaussian_factor(sample) for sample in samples]
    expected = [[0 if a is b else wasserstein2(a, b) for a in factors] for b in factors]
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


@pytest.mark.parametrize("n", [2, 512, 1100])
def test_blocks_against_all_pairs_at_once(n: int) -> None:
    points = 3 + 2 * np.random.default_rng(1).standard_normal((n, 5))
    assert hyperspherical_energy(points, floor=1e-9) == pytest.approx(np.mean(1 / pdist(points)), rel=1e-9)


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
    got = ccfv(cases).variety
    for d, value in enumerate(got):
        inverses = []
        for case in cases:
            points = case.variety[d].astype(float)
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            inverses.append(1 / np.mean(1 / pdist(points)))
        assert value == pytest.approx(np.mean(inverses), rel=1e-9)
    assert ccfv(cases, normalise="none").variety[0] != pytest.approx(got[0], rel=1e-2)
    np.testing.assert_array_equal(cases[0].variety[0], before)


def test_what_has_no_energy_is_refused() -> None:
    for bad in (np.ones((1, 3)), np.zeros((4, 3)), np.ones(3), np.array([[1.0, np.nan], [0, 1]])):
        with pytest.raises(TransferabilityError, match="at least 2 points"):
            hyperspherical_energy(bad)
    dead = [replaced(c, variety=tuple(np.zeros_like(v) for v in c.variety)) for c in make_cases(2)]
    with pytest.raises(TransferabilityError, match="dead layer"):
        ccfv(dead)


def test_variants_are_parts_and_options_of_the_score() -> None:
    cases = make_cases(3, widths=(6, 10, 12), shift=0.3)
    got, whole = ccfv_variants(cases), ccfv(cases).as_dict()
    for normalise in ("none", "variety", "both"):
        for debias in DEBIAS:
            expected = ccfv(cases, normalise=normalise, debias=debias).score  # type: ignore[arg-type]
            assert got.pop(f"ccfv-{normalise}-{debias}") == expected
    logs = [math.log(v / c) for v, c in zip(whole["variety"], whole["consistency"], strict=True)]
    weights = [math.exp(-((d - 1) ** 2) / (2 * 0.8**2)) for d in range(3)]
    assert got == pytest.approx(
        {
            "ccfv-consistency": -sum(math.log(c) for c in whole["consistency"]) / 3,
            "ccfv-variety": sum(math.log(v) for v in whole["variety"]) / 3,
            "ccfv-coarse": (logs[1] + logs[2]) / 2,
            "ccfv-weighted": sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights),
            **{f"ccfv-scale-{d}": logs[d] for d in range(3)},
        },
        rel=1e-12,
    )
    assert got["ccfv-consistency"] + got["ccfv-variety"] == pytest.approx(whole["score"])
    (case, other) = make_cases(2, widths=(6,))
    assert "ccfv-coarse" not in ccfv_variants([case, other])
    assert {*ccfv_variants(cases)} == {*VARIANTS} - {"ccfv-scale-3", "ccfv-scale-4", "ccfv-scale-5"}
