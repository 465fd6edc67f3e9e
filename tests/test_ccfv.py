"""CC-FV against its formulas written out, its invariances, its treatment of sampling noise, and its bootstrap."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from case_features import make_case, make_cases, replaced, scaled
from scipy.spatial.distance import pdist

from stunet.errors import TransferabilityError
from stunet.ranking import (
    CaseFeatures,
    bootstrap_scores,
    ccfv,
    draw_cases,
    gaussian_factor,
    scores_of_draws,
    wasserstein2,
)

DEBIAS = ["none", "null", "project"]


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
    draws = draw_cases(4, 25, seed=3)
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
    draws = draw_cases(4, 2000, seed=1)
    assert (draws.sum(1) == 4).all()
    assert draws.mean(0) == pytest.approx(np.ones(4), abs=0.08)
    np.testing.assert_array_equal(draws, draw_cases(4, 2000, seed=1))
    assert not np.array_equal(draws, draw_cases(4, 2000, seed=2))
    scores = bootstrap_scores(result, n_resamples=2000, seed=1)
    np.testing.assert_array_equal(scores, scores_of_draws(result, draws))
    # No pair where one case is all that was drawn.
    np.testing.assert_array_equal(np.isnan(scores), (draws == 4).any(1))
    once_each = scores_of_draws(result, np.ones((1, 4), int))
    assert once_each[0] == pytest.approx(result.score, abs=1e-12)


def test_targets_without_a_pair_are_refused() -> None:
    rng = np.random.default_rng(0)
    one = make_case("only", rng)
    with pytest.raises(TransferabilityError, match=r"1 case: class 1 in only only, class 2 in only only"):
        ccfv([one])
    apart = [make_case("a", rng, classes=(0, 1)), make_case("b", rng, classes=(0, 2))]
    with pytest.raises(TransferabilityError, match=r"2 cases: class 1 in a only, class 2 in b only"):
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
    with pytest.raises(TransferabilityError, match=r"scale 1[\s\S]*1 of 600 values are NaN or infinite in case case0"):
        replaced(cases[0], scales=(cases[0].scales[0], bad))
    with pytest.raises(TransferabilityError, match="occurs twice"):
        ccfv([cases[0], cases[0]])
    with pytest.raises(TransferabilityError, match="no cases"):
        ccfv([])
    with pytest.raises(TransferabilityError, match=r"\[6, 10\] in case0; \[6, 11\] in case1"):
        ccfv([cases[0], make_cases(2, widths=(6, 11))[1]])
    constant = [replaced(c, scales=(np.ones_like(c.scales[0]), c.scales[1])) for c in cases]
    with pytest.raises(TransferabilityError, match="scale 0: no distance"):
        ccfv(constant)
    for options in ({"debias": "jackknife"}, {"normalise": "all"}, {"min_points": 3}):
        with pytest.raises(TransferabilityError, match=str(next(iter(options.values())))):
            ccfv(cases, **options)  # type: ignore[arg-type]


def test_case_features_check_themselves() -> None:
    case = make_cases(1)[0]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"labels": case.labels.astype(float)}, "labels that are no classes"),
        ({"labels": case.labels - 1}, "labels that are no classes"),
        ({"labels": case.labels[:-1]}, "features of a wrong shape: scale 0"),
        ({"scales": case.scales[:1]}, "scales that do not fit"),
        ({"scales": (), "variety": ()}, "scales that do not fit"),
        ({"variety": case.variety[::-1]}, "scale 0 of the whole volume"),
        ({"scales": tuple(s.astype(int) for s in case.scales)}, "features of a wrong shape"),
        ({"probabilities": case.probabilities * 2}, "rows that sum up to 2"),
        ({"probabilities": case.probabilities[:-1]}, "probabilities"),
    ]
    for change, message in changes:
        with pytest.raises(TransferabilityError, match=message):
            replaced(case, **change)
