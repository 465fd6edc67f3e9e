"""Reports of rankings: JSON, CSV and page, beside the ranking that they are of."""

from __future__ import annotations

import csv
import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from jinja2 import UndefinedError

from stunet.cli.rank import rank as command
from stunet.ranking import CandidateScores, Ranking, rank
from stunet.ranking.points import CasePoints
from stunet.ranking.ranking import MEASURED, Target
from stunet.reports.figures import short_names, write_page, write_ranking


def _candidate(name: str, score: float | None, *, sha: str = "0" * 64) -> CandidateScores:
    scales = [{"1": 0.1, "2": 0.3}, {"1": 0.2, "2": 0.5}]
    details = {
        "score": score, "per_scale": [score, score], "variety": [1.0, 1.0], "consistency": [0.2, 0.35],
        "class_consistency": scales, "pairs": {"1": 3, "2": 1, "3": 0}, "null": [0.05, 0.06], "noise": [0.25, 0.125],
        "unresolved": [[], []], "cases": ["a", "b", "c"], "normalise": "both", "debias": "null",
    }  # fmt: skip
    spread = np.linspace(-0.5, 0.5, 101)
    return CandidateScores(
        name=name,
        path=f"/models/{name}.pth",
        sha256=sha,
        description={"network": "STU-Net <base>", "parameters": 58_262_669, "size": {"depth": [1] * 6, "width": 32}},
        scores={"ccfv": score, "leep": None},
        notes={"leep": "no head"},
        ccfv=details if score is not None else {},
        draws=tuple((score + spread).tolist()) if score is not None else (),
        seconds=1.5,
    )


def make_ranking(*names: str, failures: tuple[CandidateScores, ...] = ()) -> Ranking:
    """Three candidates, the first one 2 ahead of the others."""
    chosen = names or ("first & best", "second", "third")
    candidates = tuple(_candidate(name, 3.0 - 2 * min(i, 1) - 0.1 * i) for i, name in enumerate(chosen))
    points = tuple(
        CasePoints(
            case=case, shape=(4, 4, 4), balanced=np.zeros((2, 3), np.int64), labels=np.zeros(2, np.int64),
            whole=np.zeros((2, 3), np.int64), whole_labels=np.zeros(2, np.int64), per_class=100, n_whole=50,
            voxels=voxels, annotated=frozenset((1, 2)),
        )
        for case, voxels in (("a", {0: 900, 1: 500, 2: 40}), ("b", {0: 900, 1: 500, 2: 700}), ("c", {0: 900, 1: 99}))
    )  # fmt: skip
    dataset: Any = SimpleNamespace(structures={1: "liver", 2: "spleen"}, cases=["a", "b", "c", "d"])
    return Ranking(
        rows=candidates,
        failures=failures,
        target=Target(dataset=dataset, points=points, digest="d"),
        about={"dataset": "Dataset004_Test", "configuration": "3d_fullres", "plans": "nnUNetPlans"},
        metrics=("ccfv", "leep"),
        settings={"seed": 0, "fold": "0", "features": "stages of the decoder"},
        date="2026-01-01 00:00 UTC",
    )


def test_json_and_csv(tmp_path: Path) -> None:
    bad = CandidateScores(name="bad", path="/models/bad.pth", error="weights that are not finite")
    paths = write_ranking(make_ranking(failures=(bad,)), tmp_path)
    assert [path.name for path in paths] == ["ranking.json", "ranking.csv", "ranking.html", "study.yaml"]
    content = json.loads(paths[0].read_text())
    first, second, third = content["candidates"]
    assert (first["name"], first["scores"]) == ("first & best", {"ccfv": 3.0, "leep": None})
    assert first["interval"] == pytest.approx([2.525, 3.475])
    assert (second["first_is_ahead"], third["first_is_ahead"]) == (1.0, 1.0)
    assert content["tied_with_the_first"] == []
    assert content["failures"][0]["error"] == "weights that are not finite"
    assert content["command"] == "stunet finetune -d 4 -c 3d_fullres -f 0 --from '/models/first & best.pth'"
    rows = list(csv.reader(paths[1].open()))
    assert rows[1][:4] == ["1", "first & best", "3.0", ""]
    assert len(rows) == 4


def test_page_says_it_and_escapes(tmp_path: Path) -> None:
    page = write_ranking(make_ranking(), tmp_path)[2].read_text()
    assert "first &amp; best comes first by ccfv." in page
    assert "By ccfv first &amp; best is ahead of every other candidate in at least 95 %" in page
    assert "resamples of these 3 cases" in page
    assert "it does not show which checkpoint is better" in page
    assert "Only 3 cases: scores and intervals of fewer than 5 say little" in page
    assert "STU-Net &lt;base&gt;" in page
    # Pairs of cases, and the consistency of three equal candidates: means over two scales.
    for name, pairs, mean in (("liver", 3, "0.150"), ("spleen", 1, "0.400")):
        assert f'<td class="text name">{name}</td><td>{pairs}</td>{f"<td>{mean}</td>" * 3}</tr>' in page
    assert "0.050, 25 %" in page
    assert "spleen: 1 of 2 cases have fewer than 100 voxels of it, the fewest 40" in page
    assert "liver: 1 of 3 cases" in page


def test_the_command_takes_the_scores_that_the_function_takes() -> None:
    ours, theirs = (inspect.signature(each).parameters["metrics"].default for each in (command, rank))
    assert ours.split(",") == [*theirs]


def test_a_study_of_the_first_three(tmp_path: Path) -> None:
    ranking = make_ranking("a", "b", "c", "d")
    others = [replace(row, description={**row.description, "network": "PlainConvUNet"}) for row in ranking.rows]
    rows = (others[0], *ranking.rows[1:], replace(ranking.rows[0], name="e"))
    study = yaml.safe_load(write_ranking(replace(ranking, rows=rows), tmp_path)[3].read_text())
    assert [candidate["name"] for candidate in study["candidates"]] == ["b", "c", "d", "scratch"]
    assert study["candidates"][-1] == {"name": "scratch", "depth": [1] * 6, "width": 32}  # as the first one has it
    target = {"dataset": "Dataset004_Test", "configuration": "3d_fullres", "plans": "nnUNetPlans"}
    assert study["targets"] == [{**target, "cases": [3], "test": 1}]
    # One STU-Net is no choice, and a study of another ranking must not stay.
    assert len(write_ranking(replace(ranking, rows=(ranking.rows[0], others[1])), tmp_path)) == 3
    assert not (tmp_path / "study.yaml").exists()


def test_the_page_says_what_scores_were_worth_in_the_study_of_the_documentation(tmp_path: Path) -> None:
    studied = json.loads((Path(__file__).parents[1] / "docs" / "studies" / "encoders.json").read_text())
    found = {ranker["metric"]: ranker for ranker in (*studied["rankers"], studied["repeats"])}
    for name, measured in MEASURED.items():
        tau, regret = (found[name]["estimates"][of] for of in ("weighted_kendall", "regret"))
        expected = (tau["mean"], tau["low"], tau["high"], regret["mean"], found[name]["by chance"][0])
        assert measured == pytest.approx(expected, abs=0.006), name
    page = write_ranking(make_ranking(), tmp_path)[2].read_text()
    for name in ("ccfv", studied["repeats"]["metric"]):
        tau, low, high, regret, by_chance = MEASURED[name]
        row = f"<td>{tau:.2f}</td><td>{low:.2f} to {high:.2f}</td><td>{regret:.3f}</td><td>{by_chance:.3f}</td>"
        assert f'<td class="text">{name}</td>{row}' in page
    assert '<td class="text">dropout</td>' not in page  # which this ranking has not


def test_ties_and_empty_rankings_are_said() -> None:
    ranking = make_ranking("first", "second")
    tied = replace(ranking, rows=(_candidate("a", 1.0), _candidate("b", 1.0)))
    assert "ccfv cannot tell a from b: it is ahead in fewer than 95 % of the resamples of these 3" in tied.verdict
    assert "None of the candidates" in replace(ranking, rows=()).verdict


def _disagreeing() -> Ranking:
    """Alike to what was once called ahead "of every other candidate": one metric for it, three against."""
    scores = {
        "checkpoint A": {"ccfv": 3.0, "logme": 0.1, "gbc": -3.0, "leep": -0.5, "zero-shot": None},
        "checkpoint B": {"ccfv": 1.0, "logme": 0.5, "gbc": -1.0, "leep": -0.2, "zero-shot": 0.8},
        "checkpoint C": {"ccfv": 0.5, "logme": 0.2, "gbc": -1.0, "leep": -0.4, "zero-shot": 0.3},
    }
    candidates = tuple(replace(_candidate(n, float(s["ccfv"] or 0)), scores=s) for n, s in scores.items())
    return replace(make_ranking(), rows=candidates, metrics=tuple(scores["checkpoint A"]))


def test_metrics_that_disagree(tmp_path: Path) -> None:
    """Ranks by hand, over the four scores that all have: A 1 3 3 3, B 2 1 1.5 1, C 3 2 1.5 2."""
    ranking = _disagreeing()
    assert ranking.mean_ranks == pytest.approx((10 / 4, 5.5 / 4, 8.5 / 4))
    assert ranking.verdict.startswith(
        "The metrics disagree: ccfv prefers checkpoint A; logme, gbc, leep and zero-shot prefer checkpoint B. "
        "The lowest mean rank has checkpoint B: 1.4, checkpoint A has 2.5."
    )
    paths = write_ranking(ranking, tmp_path)
    content = json.loads(paths[0].read_text())
    assert content["consensus"] == "checkpoint B"
    assert content["preferred"]["ccfv"] == "checkpoint A"
    assert [c["mean_rank"] for c in content["candidates"]] == pytest.approx([2.5, 1.375, 2.125])
    assert content["warnings"][0].startswith("Only 3 cases")
    assert [float(row["mean_rank"]) for row in csv.DictReader(paths[1].open())] == [2.5, 1.375, 2.125]
    page = paths[2].read_text()
    assert page.count('<td class="top">') == 6  # one for each score, and one for the mean rank


def test_metrics_that_agree_or_are_alone() -> None:
    ranking = _disagreeing()
    first, *others = ranking.rows
    agreeing = replace(ranking, rows=(replace(first, scores=dict.fromkeys(first.scores, 9.0)), *others))
    assert agreeing.verdict.startswith("checkpoint A comes first by ccfv, logme, gbc, leep and zero-shot.")
    rows = tuple(replace(row, scores={"ccfv": row.scores["ccfv"]}) for row in ranking.rows)
    alone = replace(ranking, rows=rows)
    assert alone.mean_ranks == ()
    assert alone.verdict.startswith("checkpoint A comes first by ccfv.")


def test_short_names_differ() -> None:
    long = [f"{place}/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all" for place in "ab"]
    for names in (long, ["short", *long], [name[::-1] for name in long], ["x" * 50 + "/checkpoint_final"]):
        for most in (12, 20, 40):
            short = short_names(names, most)
            assert len(set(short)) == len(names)
            assert max(map(len, short)) <= most
    assert short_names(["fold_0/checkpoint_best", "b"], 15) == ["fold_0/best", "b"]


def test_equal_reports_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_ranking(make_ranking(), tmp_path / name)
    for ending in ("json", "csv", "html"):
        assert (tmp_path / "a" / f"ranking.{ending}").read_bytes() == (
            tmp_path / "b" / f"ranking.{ending}"
        ).read_bytes()


def test_half_a_page_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError):
        write_page("ranking.html", tmp_path / "page.html", title="nothing else")
    assert list(tmp_path.iterdir()) == []
