"""The rivals of CC-FV against closed forms and definitions written out; all metrics by name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from case_features import make_case, make_cases, replaced, scaled
from scipy.spatial.distance import cdist, pdist
from scipy.stats import entropy, multivariate_normal

from stunet.errors import TransferabilityError
from stunet.ranking import CaseFeatures, ccfv, linear_probe
from stunet.ranking.ccfv import scale_weights
from stunet.ranking.points import SourceHead, draw_points
from stunet.ranking.rivals import (
    RIVALS,
    PointPredictions,
    boundary_anchors,
    boundary_consistency,
    coding_rate,
    decompose,
    dropout_consistency,
    evidence,
    fuse_topote,
    gbc,
    leep,
    logme,
    mean_over_scales,
    topology_divergence,
    topote_global,
    topote_local,
    transrate,
    zero_shot_at_points,
)

METRICS = {"ccfv": lambda cases: ccfv(cases).score, **RIVALS}


def features_and_labels(n: int, width: int, seed: int = 0, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    return rng.standard_normal((n, width)) + 0.8 * labels[:, None] * np.linspace(0, 1, width), labels


def evidence_of(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    variances, axes = decompose(x)
    return evidence(axes.T @ y, variances, y, x.shape[1])


def normal_log_evidence(x: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    covariance = x @ x.T / alpha + np.eye(len(y)) / beta
    return float(multivariate_normal.logpdf(y, np.zeros(len(y)), covariance))


@pytest.mark.parametrize(("n", "width", "rank"), [(40, 6, 6), (20, 50, 50), (30, 12, 5), (15, 40, 8)])
def test_evidence_is_the_normal_density_at_its_maximum(n: int, width: int, rank: int) -> None:
    x, labels = features_and_labels(n, rank)
    if rank < width:
        x = x @ np.random.default_rng(1).standard_normal((rank, width))
    y = (labels == 1).astype(float) + 0.1 * np.random.default_rng(2).standard_normal(n)
    alpha, beta, found = evidence_of(x, y)
    assert found == pytest.approx(normal_log_evidence(x, y, alpha, beta), rel=1e-6)
    if n > rank:  # with as many weights as points, beta has no finite best value
        for factor in (0.7, 1.4):
            assert normal_log_evidence(x, y, alpha * factor, beta) < found
            assert normal_log_evidence(x, y, alpha, beta * factor) < found


@pytest.mark.parametrize(("n", "width"), [(60, 8), (24, 40)])
def test_logme_is_the_mean_over_one_hot_targets(n: int, width: int) -> None:
    x, labels = features_and_labels(n, width)
    found = [evidence_of(x, (labels == k).astype(float)) for k in range(3)]
    exact = [normal_log_evidence(x, (labels == k).astype(float), e[0], e[1]) for k, e in enumerate(found)]
    assert logme(x, labels) == pytest.approx(np.mean(exact) / n, rel=1e-5)
    assert logme(100 * x, labels) == pytest.approx(logme(x, labels), rel=1e-5)
    assert logme(x, labels * 5 + 2) == logme(x, labels)  # names of classes do not matter
    noise = np.random.default_rng(9).standard_normal((n, 4))
    assert logme(noise + 2 * np.eye(3, 4)[labels], labels) > logme(noise, labels)


def test_leep_closed_forms() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    shares = np.array([10, 20, 30]) / 60
    assert leep(np.full((60, 4), 0.25), labels) == pytest.approx(-entropy(shares), rel=1e-12)
    assert leep(np.eye(3)[labels], labels) == pytest.approx(0, abs=1e-12)
    # One-hot outputs that join classes 1 and 2, with an output that never fires: -H(Y | Z).
    outputs = np.eye(3)[np.array([0, 1, 1])[labels]]
    assert leep(outputs, labels) == pytest.approx(-50 / 60 * entropy([0.4, 0.6]), rel=1e-12)


def test_leep_by_definition() -> None:
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(5), 40), rng.integers(0, 3, 40)
    joint = np.zeros((3, 5))
    for row, y in zip(theta, labels, strict=True):
        joint[y] += row / 40
    logs = [
        math.log(sum(joint[y, z] / joint[:, z].sum() * row[z] for z in range(5)))
        for row, y in zip(theta, labels, strict=True)
    ]
    assert leep(theta, labels) == pytest.approx(np.mean(logs), rel=1e-12)
    for bad in (theta * 2, theta - 0.5):
        with pytest.raises(TransferabilityError, match="softmax"):
            leep(bad, labels)


@pytest.mark.parametrize(("n", "width"), [(60, 7), (24, 50)])
def test_transrate_by_definition(n: int, width: int) -> None:
    x, labels = features_and_labels(n, width)
    labels[labels == 2] = np.arange((labels == 2).sum()) % 4 // 2 * 2  # classes of different sizes
    z = x - x.mean(0)

    def rate(rows: np.ndarray) -> float:
        eigenvalues = np.linalg.svd(rows, compute_uv=False) ** 2 / (len(rows) * 1e-2)
        return float(0.5 * np.log1p(eigenvalues).sum())

    expected = rate(z) - sum((labels == k).mean() * rate(z[labels == k]) for k in range(3))
    assert transrate(x, labels, eps=1e-2) == pytest.approx(expected, rel=1e-9)
    assert coding_rate(z, eps=1e-2) == pytest.approx(rate(z), rel=1e-9)
    assert transrate(x + 7, labels) == pytest.approx(transrate(x, labels), rel=1e-9)


def test_transrate_of_equal_classes_is_zero_and_never_less() -> None:
    x = np.random.default_rng(0).standard_normal((15, 6))
    assert transrate(np.concatenate([x, x]), np.repeat([0, 1], 15)) == pytest.approx(0, abs=1e-9)
    for seed in range(5):
        noise = np.random.default_rng(seed).standard_normal((30, 4))
        assert transrate(noise, np.random.default_rng(seed + 10).integers(0, 4, 30)) >= 0


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_gbc_of_equal_and_of_separate_classes(covariance: str) -> None:
    x = np.random.default_rng(0).standard_normal((12, 5))
    labels = np.repeat([0, 1, 2], 12)
    same = gbc(np.concatenate([x, x, x]), labels, covariance=covariance)  # type: ignore[arg-type]
    assert same == pytest.approx(-6, abs=1e-9)
    apart = gbc(np.concatenate([x, x + 50, x - 50]), labels, covariance=covariance)  # type: ignore[arg-type]
    assert apart == pytest.approx(0, abs=1e-12)


def test_gbc_by_definition() -> None:
    x, labels = features_and_labels(80, 4, k=2)
    a, b = x[labels == 0], x[labels == 1]
    shift = a.mean(0) - b.mean(0)

    def coefficient(s: np.ndarray, t: np.ndarray) -> float:
        middle = (s + t) / 2
        log_det = math.log(np.linalg.det(middle) / math.sqrt(np.linalg.det(s) * np.linalg.det(t)))
        return math.exp(-shift @ np.linalg.inv(middle) @ shift / 8 - log_det / 2)

    s, t = np.cov(a.T), np.cov(b.T)
    assert gbc(x, labels, covariance="full") == pytest.approx(-2 * coefficient(s, t), rel=1e-9)
    diagonals = [np.diag(np.diag(m)) for m in (s, t)]
    assert gbc(x, labels) == pytest.approx(-2 * coefficient(*diagonals), rel=1e-9)
    assert gbc(x, labels, floor=100.0) == pytest.approx(-2 * math.exp(-shift @ shift / 800), rel=1e-9)
    assert gbc(x, labels, covariance="full", floor=100.0) == pytest.approx(gbc(x, labels, floor=100.0), rel=1e-9)


def test_gbc_of_principal_components() -> None:
    x, labels = features_and_labels(60, 3, k=2)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((9, 9)))
    wide = np.concatenate([x * [1, 2, 3], np.zeros((60, 6))], axis=1) @ rotation
    expected = gbc(x * [1, 2, 3], labels, covariance="full")
    assert gbc(wide, labels, covariance="full", components=3) == pytest.approx(expected, rel=1e-8)
    axes = np.linalg.svd(wide - wide.mean(0), full_matrices=False)[2][:2]
    assert gbc(wide, labels, components=2) == pytest.approx(gbc(wide @ axes.T, labels), rel=1e-8)
    assert gbc(x, labels, components=3) == gbc(x, labels)


@pytest.mark.parametrize("metric", [logme, transrate, gbc, leep])
def test_pooled_metrics_refuse_what_does_not_fit(metric: object) -> None:
    x = np.full((6, 3), 1 / 3)
    for labels, message in ((np.zeros(6, int), "6 points are of class 0"), (np.array([0, 1]), "do not fit")):
        with pytest.raises(TransferabilityError, match=message):
            metric(x, labels)  # type: ignore[operator]
    with pytest.raises(TransferabilityError, match="covariance=spherical is not known"):
        gbc(np.eye(4), np.array([0, 0, 1, 1]), covariance="spherical")  # type: ignore[arg-type]
    with pytest.raises(TransferabilityError, match="not all finite"):
        metric(np.where(np.eye(6, 3) > 0, np.nan, x), np.arange(6) % 2)  # type: ignore[operator]


def test_names_and_means_over_scales() -> None:
    cases = make_cases(3)
    before = [array.copy() for case in cases for array in (*case.scales, *case.variety)]
    got = {name: metric(cases) for name, metric in METRICS.items()}
    labels = np.concatenate([case.labels for case in cases])

    def pooled(scale: int) -> np.ndarray:
        return np.concatenate([case.scales[scale] for case in cases]).astype(float)

    assert list(got)[:6] == ["ccfv", "logme", "transrate", "leep", "gbc", "gbc-full"]
    assert list(got)[6:] == ["linear-probe", "topote-global", "topote-local", "dropout"]
    assert got["linear-probe"] == pytest.approx(np.mean(list(linear_probe(cases).values())))
    assert got["ccfv"] == ccfv(cases).score
    assert got["logme"] == pytest.approx(np.mean([logme(pooled(d), labels) for d in range(2)]))
    assert got["leep"] == leep(np.concatenate([case.probabilities for case in cases]).astype(float), labels)
    rates, overlaps = [], []
    for d in range(2):
        x = pooled(d)
        x = x / math.sqrt(x.var(0).sum())
        rates.append(transrate(x, labels))
        overlaps.append(gbc(x, labels, covariance="full"))
    assert got["transrate"] == pytest.approx(np.mean(rates), rel=1e-9)
    assert got["gbc-full"] == pytest.approx(np.mean(overlaps), rel=1e-9)
    assert mean_over_scales(cases, logme) == got["logme"]
    after = [array for case in cases for array in (*case.scales, *case.variety)]
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def test_options_reach_the_score() -> None:
    cases = make_cases(3, points=40)
    for options in ({"debias": "none"}, {"normalise": "none"}, {"debias": "project", "project_to": 4}):
        assert ccfv(cases, **options).score != pytest.approx(ccfv(cases).score, rel=1e-3)  # type: ignore[arg-type]
    with pytest.raises(TransferabilityError, match="no foreground"):
        ccfv(cases, min_points=41)


@pytest.mark.parametrize("name", list(METRICS))
def test_scaled_layers_and_order_of_cases_change_nothing(name: str) -> None:
    cases, metric = make_cases(3), METRICS[name]
    score = metric(cases)
    assert metric([scaled(case, 0, 50.0) for case in cases]) == pytest.approx(score, rel=1e-4)
    assert metric(cases[::-1]) == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "dropout"])
def test_features_that_tell_classes_apart_rank_higher(name: str) -> None:
    def candidate(signal: float) -> list[CaseFeatures]:
        rng, cases = np.random.default_rng(0), []
        for case in make_cases(4):
            means = signal * np.eye(3, 6)[case.labels]
            scale = (means + 0.3 * rng.standard_normal(means.shape)).astype(np.float32)
            logits = means[:, :4] + 0.1 * rng.standard_normal((len(means), 4))
            theta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            cases.append(
                replaced(case, scales=(scale,), variety=case.variety[:1], probabilities=theta.astype(np.float32))
            )
        return cases

    assert METRICS[name](candidate(3.0)) > METRICS[name](candidate(0.3))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (("background", "spleen", "liver"), {"liver": 2 * 30 / (30 + 10 + 40), "spleen": 0.0}),
        (("background", "Spleen", "heart"), {"liver": None, "spleen": 0.0}),
        (None, {"liver": None, "spleen": None}),
    ],
)
def test_zero_shot_dice_by_hand(outputs: tuple[str, ...] | None, expected: dict[str, float | None]) -> None:
    """40 voxels of liver of which 3 of 4 points are called liver; of 100 background voxels a tenth is."""
    labels = np.array([1] * 4 + [0] * 10)
    called = np.array([2, 2, 2, 0] + [2] + [0] * 9)
    case = PointPredictions(labels, called, voxels={0: 100, 1: 40}, annotated=frozenset((1, 2)))
    liver_everywhere = PointPredictions(
        labels=np.array([0, 2]), outputs=np.array([0, 0]), voxels={0: 10, 2: 5}, annotated=frozenset((2,))
    )
    found = zero_shot_at_points([case, liver_everywhere], {1: "liver", 2: "spleen"}, outputs)
    assert found == pytest.approx(expected)


def with_partial_labels() -> list[CaseFeatures]:
    """Five cases: one lacks structure 2, one does not annotate it, in one structure 1 is alone."""
    rng = np.random.default_rng(5)
    cases = [make_case(f"c{i}", rng, classes=(0, 1) if i == 3 else (0, 1, 2), shift=0.2) for i in range(5)]
    for i, annotated in ((3, {1, 2}), (4, {1})):
        assert cases[i].points is not None
        cases[i] = replaced(cases[i], points=replace(cases[i].points, annotated=frozenset(annotated)))
    return cases


def test_linear_probe_written_out() -> None:
    """Ridge by least squares on the stacked points of all cases but one, and Dice by counting voxels."""
    penalties, thresholds, cases = (0.03, 3.0), (0.2, 0.35, 0.5), with_partial_labels()

    def read(case: CaseFeatures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert case.points is not None
        x = np.concatenate([np.hstack(case.scales), np.hstack(case.variety)]).astype(float)
        labels = np.concatenate([case.labels, case.points.whole_labels])
        whole = sum(case.points.voxels.values())
        return x, labels, np.array([math.sqrt(case.points.voxels[v] / whole) / (labels == v).sum() for v in labels])

    expected = {}
    for label in (1, 2):
        known = [case for case in cases if case.points and label in case.points.annotated]
        dice = np.full((len(known), len(penalties), len(thresholds)), np.nan)
        for i, left_out in enumerate(known):
            x, labels, w = (np.concatenate(a) for a in zip(*(read(c) for c in known if c is not left_out), strict=True))
            y, w = (labels == label).astype(float), w / w.sum()
            mean, middle = w @ x, w @ y
            deviation = np.sqrt(w @ (x - mean) ** 2)
            z, root = (x - mean) / deviation, np.sqrt(w)[:, None]
            test, truth, _ = read(left_out)
            for j, penalty in enumerate(penalties):
                stacked = np.vstack([root * z, math.sqrt(penalty) * np.eye(z.shape[1])])
                target = np.concatenate([root[:, 0] * (y - middle), np.zeros(z.shape[1])])
                fitted = (test - mean) / deviation @ np.linalg.lstsq(stacked, target, rcond=None)[0] + middle
                for k, threshold in enumerate(thresholds):
                    called = {v: n * np.mean(fitted[truth == v] > threshold) for v, n in left_out.points.voxels.items()}
                    total = sum(called.values()) + left_out.points.voxels.get(label, 0)
                    dice[i, j, k] = 2 * called.get(label, 0) / total if total else np.nan
        values = []
        for i in range(len(known)):
            others = np.nanmean(np.delete(dice, i, axis=0), axis=0)
            values.append(dice[i][np.unravel_index(others.argmax(), others.shape)])
        expected[label] = np.nanmean(values)
    got = linear_probe(cases, penalties=penalties, thresholds=thresholds)
    assert got == pytest.approx(expected, rel=1e-9)
    assert 0.1 < got[2] < got[1] + 1
    with pytest.raises(TransferabilityError, match="without the points"):
        linear_probe([replaced(case, points=None) for case in cases])


def test_linear_probe_of_labels_and_of_noise_and_of_a_dead_channel() -> None:
    """With all voxels among the points, features that are the labels reach 1, and noise the Dice of calling all."""
    rng, cases = np.random.default_rng(0), {"labels": [], "noise": []}
    for name in "abc":
        segmentation = (rng.random((8, 8, 8)) < 0.2).astype(int)
        points = draw_points(segmentation, case=name, per_class=512, n_whole=512)
        for kind, rows in cases.items():
            labels = np.concatenate([points.labels, points.whole_labels])
            x = rng.standard_normal((len(labels), 3)) + 20 * (labels * (kind == "labels"))[:, None]
            x = np.hstack([x, np.full((len(x), 1), 7.0)]).astype(np.float32)
            n = len(points.labels)
            rows.append(CaseFeatures(case=name, labels=points.labels, scales=(x[:n],), variety=(x[n:],), points=points))
    assert linear_probe(cases["labels"])[1] == pytest.approx(1)
    assert linear_probe(cases["noise"])[1] == pytest.approx(2 * 0.2 / 1.2, abs=0.06)


def four_classes(separation: float) -> tuple[np.ndarray, np.ndarray]:
    """128 points of each, around corners of a simplex in 32 dimensions."""
    labels = np.repeat([1, 2, 3, 4], 128)
    rng = np.random.default_rng(0)
    return rng.standard_normal((512, 32)) + separation * np.eye(4, 32)[labels - 1], labels


def test_topote_rises_as_classes_come_apart() -> None:
    """The published global term falls, -0.13 to -0.98 at these separations: its negative is what ranks rightly."""
    apart, anchors = (0, 1, 2, 4, 8), np.arange(0, 512, 16)
    divergence = [topology_divergence(*four_classes(s)) for s in apart]
    consistency = [boundary_consistency(*four_classes(s), anchors) for s in apart]
    assert divergence == pytest.approx([0.13, 0.19, 0.38, 0.86, 0.98], abs=0.06)
    assert sorted(consistency) == consistency
    assert consistency[0] == pytest.approx(0.25, abs=0.1)  # by chance a quarter of the edges stays within a class
    assert consistency[-1] > 0.99


def prim(x: np.ndarray) -> list[tuple[int, int, float]]:
    """Edges of the minimum spanning tree, grown from the first point."""
    distances, inside, edges = cdist(x, x), [0], list[tuple[int, int, float]]()
    while len(inside) < len(x):
        outside = [k for k in range(len(x)) if k not in inside]
        length, i, j = min((distances[i, j], i, j) for i in inside for j in outside)
        inside.append(j)
        edges.append((i, j, length))
    return edges


def test_topote_terms_written_out() -> None:
    (case,) = make_cases(1, points=12)
    assert case.points is not None
    points, labels = case.points, case.labels
    distances = cdist(points.balanced, points.balanced)
    gaps = [min(distances[i, labels != labels[i]]) for i in range(len(labels))]
    anchors = boundary_anchors(points, 10)
    assert sorted(gaps)[:10] == pytest.approx([gaps[i] for i in anchors])
    terms = []
    for rows in case.scales:
        x, y = rows[labels > 0].astype(float), labels[labels > 0]
        edges, middle, shares = prim(x), np.median(pdist(x)), []
        for label in (1, 2):
            touching = [(y[i] != y[j], length) for i, j, length in edges if label in (y[i], y[j])]
            crossing = sum(min(length, middle) for cross, length in touching if cross)
            shares.append(1 - crossing / sum(length for _, length in touching))
        mixed = []
        for anchor in boundary_anchors(points):
            nearest = np.argsort(np.linalg.norm(rows.astype(float) - rows[anchor], axis=1), kind="stable")[:17]
            mixed.append(np.mean([labels[nearest[i]] != labels[nearest[j]] for i, j, _ in prim(rows[nearest])]))
        terms.append((np.mean(shares), 1 - np.mean(mixed)))
    weights = np.exp(-((np.arange(2) - 1) ** 2) / 2 / 0.8**2)
    expected = weights @ np.array(terms) / weights.sum()
    assert [topote_global([case]), topote_local([case])] == pytest.approx(expected, rel=1e-6)
    few = np.flatnonzero(labels)[np.linspace(0, 23, 5).astype(int)]
    thinned = [topology_divergence(rows[few], labels[few]) for rows in case.scales]
    assert topote_global([case], most=5) == pytest.approx(weights @ thinned / weights.sum())


def test_topote_of_coincident_points_and_fusion() -> None:
    far = np.array([[0.0], [1], [2], [3], [100]])  # the median distance is 2.5, the edge between the classes 97
    by_hand = np.mean([1 - 2.5 / 100, 1 - 2.5 / 97])
    assert topology_divergence(far, np.array([1, 1, 1, 1, 2])) == pytest.approx(by_hand)
    labels = np.array([1, 2] * 10)
    assert topology_divergence(np.ones((20, 3)), labels) < 0.7  # a dead layer tells nothing apart
    assert boundary_consistency(np.ones((20, 3)), labels, np.arange(5)) < 0.7
    assert topology_divergence(np.ones((20, 3)), np.ones(20, int)) == 1
    assert scale_weights(5) == pytest.approx([0.022, 0.229, 0.499, 0.229, 0.022], abs=5e-4)
    a, b = np.array([0.5, 0.7, 0.6]), np.array([0.2, 0.1, 0.2])
    assert fuse_topote(a, b, 2) == pytest.approx([2 / 3, 1 / 3, 1 / 6 + 2 / 3])
    assert fuse_topote(a, b, 1) == pytest.approx([1, 0, 1])


def test_consistency_under_dropped_channels() -> None:
    (case,) = make_cases(1)

    def found(weight: list[list[float]], bias: list[float], x: np.ndarray, n_draws: int = 800) -> float:
        rows = np.tile(x.astype(np.float32), (4, 1))
        head = SourceHead(torch.tensor(weight).float(), torch.tensor(bias).float())
        made = replaced(case, labels=np.ones(4, int), scales=(rows,), variety=(rows,), probabilities=None, head=head)
        return dropout_consistency([made], share=0.3, n_draws=n_draws)

    # Output 1 needs its only channel, and falls back to background without it.
    assert found([[0, 0], [1, 0]], [0.5, 0], np.ones(2)) == pytest.approx(0.7, abs=0.06)
    # It needs one of two, or both of two; those that are left are scaled up.
    assert found([[0, 0], [1, 1]], [0.5, 0], np.ones(2)) == pytest.approx(1 - 0.3**2, abs=0.06)
    assert found([[0, 0], [1, 1]], [1.9, 0], np.ones(2)) == pytest.approx(0.7**2, abs=0.06)
    assert found([[0, 0], [1, 1]], [1.4, 0], np.ones(2)) == pytest.approx(1 - 0.3**2, abs=0.06)
    assert found([[0, 0], [0, 0]], [0, 1], np.ones(2), 3) == 1
    assert found([[0, 0], [0, 0]], [1, 0], np.ones(2), 3) == 0  # nothing is ever foreground
