"""Scores beside Dice: statistics by hand and by scipy, intervals by a loop, and the command as it is typed."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from stunet.cli.main import main
from stunet.errors import TransferabilityError
from stunet.ranking import agreement, leave_one_target_out, mean_agreement, read_dice, read_scores, read_summaries
from stunet.ranking.agreement import pairwise_kendall, top_regret, weighted_kendall

SCORES = {"base": 1.0, "large": 3.0, "small": 0.5, "huge": 2.0, "other": -1.0, "last": 0.7}
DICE = {"base": 0.80, "large": 0.86, "small": 0.79, "huge": 0.88, "other": 0.81, "last": 0.70}


def test_weighted_kendall_counts_the_top() -> None:
    dice = np.array([0.9, 0.8, 0.7, 0.6])
    assert weighted_kendall(np.array([4.0, 3, 2, 1]), dice) == pytest.approx(1)
    assert weighted_kendall(np.array([3.0, 4, 2, 1]), dice) == pytest.approx(0.52)
    assert weighted_kendall(np.array([4.0, 3, 1, 2]), dice) == pytest.approx(0.8133, abs=1e-4)


def pairs_by_rank(scores: np.ndarray, dice: np.ndarray) -> float:
    """Concordance of all pairs, each with one over the product of its ranks by Dice."""
    ranks = [1 + sum(other > own for other in dice) + sum(other == own for other in dice) / 2 - 0.5 for own in dice]
    agreeing = of_scores = of_dice = 0.0
    for i in range(len(dice)):
        for j in range(i):
            weight, x, y = 1 / (ranks[i] * ranks[j]), np.sign(scores[i] - scores[j]), np.sign(dice[i] - dice[j])
            agreeing += weight * x * y
            of_scores, of_dice = of_scores + weight * abs(x), of_dice + weight * abs(y)
    return float(agreeing / math.sqrt(of_scores * of_dice))


def test_pairwise_kendall_counts_pairs_of_the_top() -> None:
    dice = np.array([0.9, 0.8, 0.7, 0.6])
    whole = 1 / 2 + 1 / 3 + 1 / 4 + 1 / 6 + 1 / 8 + 1 / 12  # of the pairs of ranks 1 to 4
    assert pairwise_kendall(np.array([4.0, 3, 2, 1]), dice) == pytest.approx(1)
    assert pairwise_kendall(np.array([3.0, 4, 2, 1]), dice) == pytest.approx(1 - 2 * (1 / 2) / whole)
    assert pairwise_kendall(np.array([4.0, 3, 1, 2]), dice) == pytest.approx(1 - 2 * (1 / 12) / whole)
    for seed in range(5):
        x, y = np.random.default_rng(seed).integers(0, 5, (2, 8)).astype(float)  # with ties
        assert pairwise_kendall(x, y) == pytest.approx(pairs_by_rank(x, y))
    x, y = np.random.default_rng(9).standard_normal((2, 8))
    # scipy weighs pairs by any function of two ranks that adds up or multiplies, of ranks from 0.
    same = stats.weightedtau(x, y, rank=(-y).argsort().argsort(), weigher=lambda r: 1 / (r + 1), additive=False)
    assert pairwise_kendall(x, y) == pytest.approx(same.statistic)
    assert pairwise_kendall(x, y) != pytest.approx(weighted_kendall(x, y), abs=1e-3)


def test_regret_by_hand() -> None:
    dice = np.array([0.9, 0.8, 0.7])
    assert top_regret(np.array([3.0, 2, 1]), dice) == 0
    assert top_regret(np.array([1.0, 2, 3]), dice) == pytest.approx(0.2)
    assert top_regret(np.array([1.0, 3, 3]), dice) == pytest.approx(0.15)  # either of two


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_regret_of_the_first_few_is_the_mean_over_all_orders_of_equal_ones(first: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores, dice = rng.integers(0, 3, 5).astype(float), rng.random(5)
        orders = [order for order in itertools.permutations(range(5)) if (np.diff(scores[[*order]]) <= 0).all()]
        expected = dice.max() - np.mean([dice[[*order[:first]]].max() for order in orders])
        assert top_regret(scores, dice, first) == pytest.approx(expected)


def test_values_against_scipy() -> None:
    result = agreement(SCORES, DICE, n_resamples=10)
    x, y = list(SCORES.values()), list(DICE.values())
    got = {name: estimate.value for name, estimate in result.estimates.items()}
    assert got == pytest.approx(
        {
            "weighted_kendall": stats.weightedtau(x, y).statistic,
            "pairwise_kendall": pairs_by_rank(np.array(x), np.array(y)),
            "pearson": np.corrcoef(x, y)[0, 1],
            "spearman": stats.spearmanr(x, y).statistic,
            "regret": 0.02,
        }
    )
    assert (result.top, result.best, result.n_checkpoints) == ("large", "huge", 6)
    # Names pair the values, not their order.
    shuffled = agreement(dict(reversed(SCORES.items())), DICE, n_resamples=10)
    assert shuffled.as_dict() == result.as_dict()


def test_intervals_against_a_loop() -> None:
    names = sorted(SCORES)[:3]
    scores, dice = {n: SCORES[n] for n in names}, {n: DICE[n] for n in names}
    result = agreement(scores, dice, n_resamples=150, confidence=0.8, seed=4)
    x, y = np.array(list(scores.values())), np.array(list(dice.values()))
    rng = np.random.default_rng(4)
    values: dict[str, list[float]] = {name: [] for name in result.estimates}
    for draw in rng.integers(0, 3, size=(150, 3)):
        values["regret"].append(y[draw].max() - y[draw][x[draw] == x[draw].max()].mean())
        if len(set(draw.tolist())) > 1:
            values["weighted_kendall"].append(stats.weightedtau(x[draw], y[draw]).statistic)
            values["pairwise_kendall"].append(pairs_by_rank(x[draw], y[draw]))
            values["pearson"].append(np.corrcoef(x[draw], y[draw])[0, 1])
            values["spearman"].append(stats.spearmanr(x[draw], y[draw]).statistic)
    for name, estimate in result.estimates.items():
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(values[name], [0.1, 0.9])))
        assert estimate.degenerate == 150 - len(values[name])
    assert result.estimates["pearson"].degenerate > 5  # one checkpoint thrice: 3 of 27
    assert result.estimates["regret"].degenerate == 0
    again = agreement(scores, dice, n_resamples=150, confidence=0.8, seed=4)
    assert again == result
    assert agreement(scores, dice, n_resamples=150, confidence=0.8, seed=5) != result


def test_intervals_without_any_value() -> None:
    result = agreement({"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}, n_resamples=1, seed=6)
    estimate = result.estimates["pearson"]
    assert estimate.degenerate == 1  # seed 6 draws no other score than 1
    assert math.isnan(estimate.low)
    content = json.loads(json.dumps(result.as_dict()))
    assert content["estimates"]["pearson"]["low"] is None
    assert content["estimates"]["pearson"]["value"] == pytest.approx(math.sqrt(3) / 2)


def test_nan_and_constants_and_names_are_refused() -> None:
    nan = {**SCORES, "base": math.nan}
    with pytest.raises(TransferabilityError, match=r"scores are not finite.*base: nan"):
        agreement(nan, DICE)
    with pytest.raises(TransferabilityError, match="not finite"):  # before names are compared
        agreement({**nan, "new": 1}, DICE)
    with pytest.raises(TransferabilityError, match=r"Dice are not finite.*huge: inf"):
        agreement(SCORES, {**DICE, "huge": math.inf})
    with pytest.raises(TransferabilityError, match="only in the scores: new; only in the Dice: base"):
        agreement({**{k: v for k, v in SCORES.items() if k != "base"}, "new": 1}, DICE)
    with pytest.raises(TransferabilityError, match="scores of 6 checkpoints are all equal"):
        agreement(dict.fromkeys(DICE, 1.0), DICE)
    with pytest.raises(TransferabilityError, match="Dice of 6 checkpoints are all equal"):
        agreement(SCORES, dict.fromkeys(DICE, 0.9))
    with pytest.raises(TransferabilityError, match="at least 3"):
        agreement({"a": 1, "b": 2}, {"a": 1, "b": 2})


# Dice of four checkpoints on three targets, and metrics that order all, all but one target, and nothing.
TARGETS: dict[str, dict[str, float]] = {
    "liver": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6},
    "heart": {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.75},
    "brain": {"a": 0.6, "b": 0.9, "c": 0.8, "d": 0.7},
}
SIZE = {target: {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0} for target in TARGETS}
MIXED = {"liver": SIZE["liver"], "heart": TARGETS["heart"], "brain": SIZE["brain"]}
FLAT = {**TARGETS, "brain": dict.fromkeys("abcd", 1.0)}


def test_mean_over_targets_by_hand() -> None:
    got = {name: each.value for name, each in mean_agreement(SIZE, TARGETS, n_resamples=5).items()}
    brain = stats.weightedtau([4, 3, 2, 1], list(TARGETS["brain"].values())).statistic
    heart = stats.weightedtau([4, 3, 2, 1], list(TARGETS["heart"].values())).statistic
    assert got["weighted_kendall"] == pytest.approx((1 + heart + brain) / 3)
    assert heart == pytest.approx(-1)
    assert got["spearman"] == pytest.approx((1 - 1 - 0.2) / 3)
    assert got["regret"] == pytest.approx((0 + 0.25 + 0.3) / 3)
    flat = {name: each.value for name, each in mean_agreement(FLAT, TARGETS, n_resamples=5).items()}
    assert flat["pairwise_kendall"] == pytest.approx(2 / 3)  # what orders nothing counts 0
    assert flat["regret"] == pytest.approx((0.9 - 0.75) / 3)
    for scores, message in (
        ({"liver": SIZE["liver"]}, "give both for each target"),
        ({**SIZE, "heart": {**SIZE["heart"], "a": math.nan}}, "not finite"),
    ):
        with pytest.raises(TransferabilityError, match=message):
            mean_agreement(scores, TARGETS)


def test_a_checkpoint_is_drawn_on_all_targets_together() -> None:
    rng = np.random.default_rng(0)
    dice = {name: float(rng.random()) for name in "abcdefgh"}
    scores = {name: value + 0.4 * rng.random() for name, value in dice.items()}
    renamed = [{f"other {name}": value for name, value in values.items()} for values in (scores, dice)]
    # Half of the resamples of two targets are of one of them, twice.
    found = partial(mean_agreement, confidence=0.5)
    one = found({"x": scores}, {"x": dice})["pearson"]
    same = found({"x": scores, "y": scores}, {"x": dice, "y": dice})["pearson"]
    other = found({"x": scores, "y": renamed[0]}, {"x": dice, "y": renamed[1]})["pearson"]
    assert (same.low, same.high) == (one.low, one.high)  # the second target tells nothing new
    assert same.value == other.value
    assert other.high - other.low < 0.95 * (same.high - same.low)


@pytest.mark.parametrize("against", [None, FLAT])
def test_intervals_of_the_mean_against_a_loop(against: dict[str, dict[str, float]] | None) -> None:
    n = 60
    result = mean_agreement(SIZE, TARGETS, against=against, n_resamples=n, confidence=0.9, seed=3)
    numbers = np.random.default_rng(3).random((n, 4, 4), np.float32)
    checkpoints = np.array([[min(range(4), key=place.__getitem__) for place in resample] for resample in numbers])
    targets = np.random.default_rng([3, 3]).integers(0, 3, (n, 3))

    def rho(scores: dict[str, dict[str, float]], target: str, draw: np.ndarray) -> float:
        x, y = (np.array([values[target][name] for name in "abcd"])[draw] for values in (scores, TARGETS))
        return 0.0 if len(set(x)) == 1 or len(set(y)) == 1 else float(stats.spearmanr(x, y).statistic)

    means = []
    for b in range(n):
        drawn = [sorted(TARGETS)[t] for t in targets[b]]
        values = [rho(SIZE, t, checkpoints[b]) - (rho(against, t, checkpoints[b]) if against else 0) for t in drawn]
        means.append(np.mean(values))
    found = result["spearman"]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))
    assert found.low < found.value < found.high
    if against == FLAT:
        plain = (mean_agreement(each, TARGETS, n_resamples=1)["spearman"].value for each in (SIZE, FLAT))
        assert found.value == pytest.approx(next(plain) - next(plain))


def test_leaving_one_target_out_by_hand() -> None:
    """FLAT is right wherever it says something; MIXED is wrong on the brain alone, where FLAT is silent."""
    table = {"size": SIZE, "mixed": MIXED, "flat": FLAT}
    got = leave_one_target_out(table, TARGETS)
    brain = stats.weightedtau([4, 3, 2, 1], list(TARGETS["brain"].values())).statistic
    assert -0.1 < brain < 0  # so without liver, or heart, size has -1 or 1 and this, mixed 1 and this, flat 1 and 0
    assert [got[target].metric for target in ("liver", "heart", "brain")] == ["flat", "flat", "mixed"]
    assert got["brain"].agreement["weighted_kendall"] == pytest.approx(brain)
    assert got["brain"].agreement["regret"] == pytest.approx(0.3)
    assert got["liver"].agreement["weighted_kendall"] == pytest.approx(1)
    # By regret: without brain size loses 0 and 0.25, and the least is best.
    by_regret = leave_one_target_out({"size": SIZE, "mixed": MIXED}, TARGETS, by="regret")
    assert [by_regret[target].metric for target in ("liver", "heart", "brain")] == ["mixed", "size", "mixed"]
    for targets, by in ((["liver"], "pearson"), (["liver", "heart"], "tea leaves")):
        dice = {target: TARGETS[target] for target in targets}
        with pytest.raises(TransferabilityError, match=f"{len(targets)} targets, chosen by {by}"):
            leave_one_target_out({"size": dice}, dice, by=by)


def write(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def write_summary(path: Path, dice: float) -> str:
    return write(path, {"foreground_mean": {"Dice": dice, "IoU": 0.1}, "mean": {}, "metric_per_case": []})


def ranking(**changes: object) -> dict[str, object]:
    candidates = [{"name": name, "scores": {"ccfv": s, "logme": s**2}, "file": "x"} for name, s in SCORES.items()]
    return {"format": 1, "candidates": candidates, "target": "Dataset004", **changes}


def test_files(tmp_path: Path) -> None:
    ranked = read_scores(write(tmp_path / "ranking.json", ranking()))
    assert ranked == {"ccfv": SCORES, "logme": {name: s**2 for name, s in SCORES.items()}}
    assert read_scores(write(tmp_path / "plain.json", SCORES)) == {"score": SCORES}
    partial = ranking(candidates=[{"name": "a", "scores": {"ccfv": None}}, {"name": "b", "scores": {"leep": -1}}])
    got = read_scores(write(tmp_path / "partial.json", partial))
    assert list(got) == ["ccfv", "leep"]
    assert math.isnan(got["ccfv"]["a"])
    assert math.isnan(got["ccfv"]["b"])
    assert got["leep"]["b"] == -1
    assert read_dice(write(tmp_path / "dice.json", DICE)) == DICE
    write_summary(tmp_path / "results/base/fold_0/validation/summary.json", 0.5)
    write_summary(tmp_path / "results/large/summary.json", 0.6)
    (tmp_path / "results/notes").mkdir()
    assert read_dice(tmp_path / "results") == {"base": 0.5, "large": 0.6}
    assert read_summaries({"x": tmp_path / "results/base"}) == {"x": 0.5}


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    for content, message in (
        ("{", "bad.json"),
        ([1], "got `array`"),
        ({"a": "high"}, "got `str`"),
        ({"a": True}, "got `bool`"),
        (ranking(format=2), "format 2"),
        (ranking(candidates=[{"name": "a"}]), "KeyError: 'scores'"),
        (ranking(candidates=[{"name": "a", "scores": {"m": 1}}] * 2), "candidates a, a"),
        (ranking(candidates=[]), "0 metrics"),
    ):
        path = write(tmp_path / "bad.json", content)
        with pytest.raises(TransferabilityError, match=re.escape(message)):
            read_scores(path)
    with pytest.raises(TransferabilityError, match="No such file"):
        read_scores(tmp_path / "missing.json")
    with pytest.raises(TransferabilityError, match="foreground_mean"):
        read_summaries({"a": write(tmp_path / "summary.json", {"mean": {}})})
    write_summary(tmp_path / "folds/a/fold_0/summary.json", 0.5)
    write_summary(tmp_path / "folds/a/fold_1/summary.json", 0.5)
    with pytest.raises(TransferabilityError, match=r"2 summary\.json .*fold_0/summary\.json, fold_1/summary\.json"):
        read_dice(tmp_path / "folds")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TransferabilityError, match=r"no summary\.json"):
        read_dice(tmp_path / "empty")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["stunet", "rank-eval", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scores, dice = write(tmp_path / "ranking.json", ranking()), write(tmp_path / "dice.json", DICE)
    status, out, _ = run(capsys, monkeypatch, scores, dice, "--json", "--resamples", 50, "--seed", 2)
    assert status == 0
    metrics = json.loads(out)["metrics"]
    assert metrics["ccfv"] == agreement(SCORES, DICE, n_resamples=50, seed=2).as_dict()
    assert list(metrics) == ["ccfv", "logme"]
    status, out, _ = run(capsys, monkeypatch, scores, dice, "--resamples", 50, "--metric", "logme")
    assert status == 0
    tau = stats.weightedtau([s**2 for s in SCORES.values()], list(DICE.values())).statistic
    assert f"{tau:.3f}" in out
    assert "ccfv" not in out
    assert "large" in out
    assert "huge" in out


def test_the_command_reads_summaries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = write(tmp_path / "scores.json", SCORES)
    summaries = [f"{name}={write_summary(tmp_path / name / 'summary.json', d)}" for name, d in DICE.items()]
    options = [word for summary in summaries for word in ("--summary", summary)]
    status, out, _ = run(capsys, monkeypatch, scores, *options, "--json", "--resamples", 20)
    assert status == 0
    assert json.loads(out)["metrics"]["score"] == agreement(SCORES, DICE, n_resamples=20).as_dict()
    part = write(tmp_path / "dice.json", {k: v for k, v in DICE.items() if k != "base"})
    status, out, _ = run(capsys, monkeypatch, scores, part, *options[:2], "--json", "--resamples", 20)
    assert json.loads(out)["metrics"]["score"]["n_checkpoints"] == 6
    full = write(tmp_path / "full.json", DICE)
    gaps = ranking()
    gaps["candidates"][1]["scores"]["leep"] = None  # type: ignore[index]
    partial = write(tmp_path / "partial.json", gaps)
    status, out, err = run(capsys, monkeypatch, partial, full, "--resamples", 20, "--json")
    assert status == 0
    assert list(json.loads(out)["metrics"]) == ["ccfv", "logme"]
    assert "leep is left out: no score for base" in err
    for candidate in gaps["candidates"]:
        candidate["scores"]["logme"] = 1.0  # type: ignore[index]
    status, out, err = run(capsys, monkeypatch, write(tmp_path / "alike.json", gaps), full, "--resamples", 20, "--json")
    assert list(json.loads(out)["metrics"]) == ["ccfv"]
    assert "logme is left out: the same score for all" in err
    for args, message in (
        ((scores, full, *options[:2]), "two values of one Dice"),
        ((scores,), "neither DICE nor --summary"),
        ((scores, "--summary", "summary.json"), "NAME=PATH"),
        ((scores, full, "--metric", "ccfv"), "unknown metric"),
        ((scores, part), "only in the scores: base"),
        ((partial, full, "--metric", "leep"), "leep: no score for base, large, small, huge, other, last"),
    ):
        status, _, err = run(capsys, monkeypatch, *args)
        assert status == 2
        assert message in err
        assert "Traceback" not in err
