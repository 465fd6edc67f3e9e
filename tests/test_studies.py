"""What a study says, against closed forms; splits by groups; a study of 10,000 cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stunet.reports.study import write_study
from stunet.study.definition import Study, split_cases
from stunet.study.results import Bootstrap, compare_rankers, epochs_to_reach, read_study


def test_groups_stay_together_and_subsets_are_nested() -> None:
    groups = [[f"{g}a", f"{g}b"] if g % 3 == 0 else [f"{g}"] for g in range(12)]
    of = {case: i for i, group in enumerate(groups) for case in group}
    test, orders = split_cases(groups, 5, 3)
    assert len(test) == 5
    for order in orders:
        assert sorted([*test, *order]) == sorted(of)
        assert not {of[case] for case in order} & {of[case] for case in test}
    assert len(set(orders)) == 3
    assert split_cases(groups, 5, 1) == (test, orders[:1])
    # Of one group alone, too, each seed draws others.
    test, orders = split_cases([["t"], [f"c{i}" for i in range(20)]], 1, 2)
    assert test == ("t",)
    assert set(orders[0][:8]) != set(orders[1][:8])


def test_intervals_are_those_of_a_literal_bootstrap() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0.7, 0.1, (3, 20)) + rng.normal(0, 0.05, (3, 1))
    values[0, 3] = np.nan
    found = Bootstrap(3, 20, 20000).interval(values)
    draws = []
    for _ in range(4000):
        seeds, cases = rng.integers(0, 3, 3), rng.integers(0, 20, 20)
        draws.append(np.nanmean(values[np.ix_(seeds, cases)]))
    assert found.mean == pytest.approx(np.nanmean(values))
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.004)


def test_a_constant_gain_has_no_spread() -> None:
    found = Bootstrap(2, 5, 100).interval(np.full((2, 5), 0.03))
    assert (found.low, found.mean, found.high) == pytest.approx((0.03, 0.03, 0.03))


@pytest.mark.parametrize(("curve", "expected"), [([0.1, 0.5, 0.9], 3), ([0.9, 0.1, 0.1], 1), ([0.0, 0.1, 0.2], None)])
def test_epochs_to_reach_a_curve(curve: list[float], expected: int | None) -> None:
    assert epochs_to_reach(np.array(curve), np.array([0.0, 0.1, 0.8])) == expected


def make_study(
    folder: Path, *, n_targets: int, n_candidates: int, numbers: list[int], seeds: int, n_test: int
) -> Study:
    """A study that is done: a candidate's Dice is its number's share, and one metric knows that."""
    names = [f"c{i}" for i in range(n_candidates)]
    size = {"name": "custom", "depth": [1] * 6, "width": 8}
    candidates = [
        {"name": name, "path": None if i == 0 else f"/{name}.pth", "strategies": ["full"], "size": size,
         "facts": {"number": i}, "settings": {}, "not_on": []}
        for i, name in enumerate(names)
    ]  # fmt: skip
    test = [f"t{i}" for i in range(n_test)]
    targets = [
        {"dataset": f"Dataset{i:03d}_T", "configuration": "3d_fullres", "plans": "nnUNetPlans", "n_cases": numbers,
         "test": test, "orders": [[f"x{i}" for i in range(max(numbers))]] * seeds, "settings": {}}
        for i in range(n_targets)
    ]  # fmt: skip
    content = {"format": 1, "targets": targets, "candidates": candidates, "seeds": seeds, "settings": {}}
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(
        json.dumps({**content, "metrics": ["known", "wrong"], "keep_checkpoints": False})
    )
    study, rng = Study(folder), np.random.default_rng(0)
    for cell in study.cells:
        path = study.result(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        if cell.candidate is None:
            noise = rng.permutation(n_candidates).tolist()
            rows = {n: {"scores": {"known": float(i), "wrong": float(noise[i])}} for i, n in enumerate(names) if i}
            result: dict[str, Any] = {"candidates": rows}
        else:
            worth = 0.5 + 0.4 * names.index(cell.candidate.name) / n_candidates
            dice = {"organ": {"Dice": worth, "NSD": worth / 2}, "none": {"Dice": None, "NSD": None}}
            result = {"cases": dict.fromkeys(test, dice), "curve": [worth * k / 10 for k in range(1, 11)]}
        path.write_text(json.dumps({"status": "done", "seconds": 60.0, **result}))
    return study


def test_figures_of_many_candidates_hold_the_best(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=1, n_candidates=30, numbers=[4, 8], seeds=1, n_test=2)
    page = write_study(study, n_resamples=20).read_text()
    assert page.count("mean over seeds: of the best 20") == 2
    assert "Dice by number of labelled cases, of the best 20 with 8: Dataset000_T" in page
    for figure in page.split("<svg")[1:]:  # a legend's names, which matplotlib writes as comments beside their outlines
        assert [f"<!-- c{i} -->" in figure for i in range(30)] == [i >= 10 for i in range(30)]


def test_seeds_are_compared_with_each_other(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=2, n_candidates=6, numbers=[4], seeds=3, n_test=2)
    rng, dice = np.random.default_rng(3), {}
    for cell in study.trainings:
        value = dice[cell.target.dataset, cell.candidate and cell.candidate.name, cell.seed] = rng.random()
        content = json.loads(study.result(cell).read_text())
        content["cases"] = {case: {"organ": {"Dice": value, "NSD": value}} for case in cell.target.test}
        study.result(cell).write_text(json.dumps(content))
    repeats = read_study(study, n_resamples=20).repeats
    assert repeats is not None
    taus = []
    for target in study.targets:
        of = {seed: np.array([dice[target.dataset, f"c{i}", seed] for i in range(1, 6)]) for seed in range(3)}
        taus.append(stats.weightedtau(of[1], (of[0] + of[2]) / 2)[0])
    assert repeats["estimates"]["weighted_kendall"]["mean"] == pytest.approx(np.mean(taus))
    one = make_study(tmp_path / "one", n_targets=2, n_candidates=6, numbers=[4], seeds=1, n_test=2)
    assert read_study(one, n_resamples=20).repeats is None


def test_a_study_whose_truth_is_known(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=3, n_candidates=6, numbers=[4, 8], seeds=2, n_test=4)
    results = read_study(study, n_resamples=50)
    assert len(results.rows) == 3 * 6 * 2
    assert results.progress["done"] == 3 * 6 * 2 * 2
    settings = [study.settings_of(study.targets[0], candidate) for candidate in study.candidates[:2]]
    assert settings == [{"head": "fresh"}, {}]  # from scratch heads begin as those of new structures do in fine-tuning
    best = results.summary[0]
    assert (best["candidate"], best["wins"], best["n"]) == ("c5", 6, 6)
    assert best["mean"] == pytest.approx(0.4 * 5 / 6)
    assert best["above"] == pytest.approx(0.4 * 2 / 6)  # of 1 to 5, whose mean is 3
    row = next(row for row in results.rows if row.candidate == "c3")
    assert row.mean["gain in Dice"].low == pytest.approx(0.2)
    assert row.mean["surface Dice"].mean == pytest.approx((0.5 + 0.2) / 2)
    rankers = {each["metric"]: each for each in compare_rankers(study, results.rows, n_resamples=50)}
    for exact in ("known", "number", "pseudo Dice of the fine-tuning after 10 %", "the best on the other targets"):
        assert rankers[exact]["estimates"]["weighted_kendall"]["mean"] == pytest.approx(1)
        assert rankers[exact]["estimates"]["regret"]["mean"] == pytest.approx(0)
        assert rankers[exact]["choices"]["Dataset000_T"]["first"] == "c5"
    # One score by hand: its mean over folds, then over targets.
    taus = []
    for target in study.targets:
        found = [study.result(cell) for cell in study.rankings if cell.target is target]
        of_folds = [json.loads(path.read_text())["candidates"] for path in found]
        means = [np.mean([fold[f"c{i}"]["scores"]["wrong"] for fold in of_folds]) for i in range(1, 6)]
        taus.append(stats.weightedtau(means, range(1, 6))[0])
    assert rankers["wrong"]["estimates"]["weighted_kendall"]["mean"] == pytest.approx(np.mean(taus))
    page = write_study(study, n_resamples=50).read_text()
    assert "c5 (full) came out best: its Dice is +0.333" in page
    assert "The Dice with other seeds comes to weighted tau 1.00 (1.00 to 1.00), regret 0.000." in page


def test_what_some_candidates_lack_comes_last_and_ties_share_their_regret(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=2, n_candidates=6, numbers=[4], seeds=1, n_test=2)
    for cell in study.rankings:
        content = json.loads(study.result(cell).read_text())
        for name, row in content["candidates"].items():
            number = int(name[1])
            row["scores"] |= {"of few": number if number > 2 else None, "tied": float(number > 3)}
            row["scores"]["known"] = -number
        study.result(cell).write_text(json.dumps(content))
    failed = study.rankings[1]
    study.result(failed).write_text(json.dumps({"status": "failed", "error": "OSError: no space left"}))
    study = Study(study.folder)
    results = read_study(study, n_resamples=20)
    assert results.failed == {failed.name: "OSError: no space left"}
    assert results.progress["ranked"] == 1

    study.result(failed).write_text(study.result(study.rankings[0]).read_text())
    rankers = compare_rankers(study, results.rows, n_resamples=20)
    assert (rankers[-1]["metric"], rankers[-1]["complete"], rankers[-1]["candidates"]) == ("of few", False, [3, 3])
    assert rankers[-1]["estimates"]["weighted_kendall"]["mean"] == pytest.approx(1)
    by_name = {each["metric"]: each for each in rankers}
    assert by_name["tied"]["choices"]["Dataset000_T"] == {
        "first": "c4 or c5", "regret": pytest.approx(0.2 / 6), "regret of three": pytest.approx(0),
    }  # fmt: skip
    assert by_name["known"]["regret of three"] == pytest.approx(0.8 / 6)  # it prefers 1, 2 and 3 of 5
    # Of 1 to 5 the mean is 3, and the best of three is on average 4.5; of 3 to 5, 4 and 5.
    assert by_name["known"]["by chance"] == pytest.approx([2 * 0.4 / 6, 0.5 * 0.4 / 6])
    assert by_name["of few"]["by chance"] == pytest.approx([0.4 / 6, 0])
    # Neither of them is known before the fine-tuning.
    assert {*by_name["the best on the other targets"]["chosen"].values()} == {"number"}


def test_scores_are_compared_on_folds_that_all_are_done_with(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=2, n_candidates=5, numbers=[4, 16], seeds=2, n_test=2)
    for cell in study.trainings:  # with more cases all are better
        content = json.loads(study.result(cell).read_text())
        for scores in content["cases"].values():
            scores["organ"]["Dice"] += 0.1 * (cell.n_cases == 16)
        study.result(cell).write_text(json.dumps(content))
    assert read_study(study, n_resamples=20).progress["compared"] == 8
    best = [cell for cell in study.trainings if cell.candidate and cell.candidate.name == "c4" and cell.n_cases == 16]
    study.result(best[0]).unlink()
    results = read_study(study, n_resamples=20)
    assert (results.progress["compared"], results.progress["folds"]) == (7, 8)
    by_name = {each["metric"]: each["estimates"] for each in results.rankers}
    assert by_name["known"]["weighted_kendall"]["mean"] == pytest.approx(1)
    assert by_name["known"]["regret"]["mean"] == pytest.approx(0)
    assert results.repeats is not None
    assert results.repeats["estimates"]["weighted_kendall"]["mean"] == pytest.approx(1)
    assert "7 of 8 folds, on which all candidates are done" in write_study(study, n_resamples=20).read_text()


def test_targets_without_an_order_and_odd_names_cost_no_page(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=3, n_candidates=5, numbers=[4], seeds=2, n_test=2)
    content = json.loads((study.folder / "study.json").read_text())
    content["candidates"][1]["name"] = r"A $\frac$ B"
    (study.folder / "study.json").write_text(json.dumps(content))
    for old, new in zip(study.trainings, (study := Study(study.folder)).trainings, strict=True):
        if old.name != new.name:
            study.result(new).parent.mkdir(exist_ok=True)
            Study(study.folder).result(old).rename(study.result(new))
    for cell in study.trainings:
        result = json.loads(study.result(cell).read_text())
        if cell.target is study.targets[0]:  # nothing was learned
            result["cases"] = {case: {"organ": {"Dice": 0.0, "NSD": 0.0}} for case in cell.target.test}
        elif cell.target is study.targets[1]:  # nothing is there
            result["cases"] = {case: {"organ": {"Dice": None, "NSD": None}} for case in cell.target.test}
        study.result(cell).write_text(json.dumps(result))
    results = read_study(study, n_resamples=20)
    assert {name.split("/")[0] for name in results.failed} == {"Dataset001_T"}
    assert {each["metric"]: each["candidates"] for each in results.rankers}["known"] == [
        3
    ]  # on the target that has an order
    page = write_study(study, n_resamples=20).read_text()
    assert r"A $\frac$ B" in page
    assert "could be scored: correct their labels" in page


def test_failed_cells_are_named_and_the_others_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s", n_targets=1, n_candidates=4, numbers=[4], seeds=1, n_test=2)
    broken = study.trainings[2]
    study.result(broken).write_text(json.dumps({"status": "failed", "error": "OSError: no space left"}))
    results = read_study(study, n_resamples=20)
    assert results.failed == {broken.name: "OSError: no space left"}
    assert len(results.rows) == 3
    assert "no space left" in write_study(study, n_resamples=20).read_text()
