"""Reports of rankings: JSON, CSV and page, beside the ranking that they are of."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from stunet.reports.pages import write_page
from stunet.reports.ranking import RankingReport, write_ranking
from stunet.transferability import CandidateScores, CasePoints, Failure, Ranking, Target, TargetCases


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
        description={"network": "STU-Net <base>", "parameters": 58_262_669},
        scores={"ccfv": score, "leep": None},
        notes={"leep": "no head"},
        ccfv=details if score is not None else {},
        draws=tuple((score + spread).tolist()) if score is not None else (),
        seconds=1.5,
    )


def make_report(*names: str, failures: tuple[Failure, ...] = ()) -> RankingReport:
    """Three candidates, the first one 2 ahead of the others."""
    chosen = names or ("first & best", "second", "third")
    candidates = tuple(_candidate(name, 3.0 - 2 * min(i, 1) - 0.1 * i) for i, name in enumerate(chosen))
    points = tuple(
        CasePoints(
            case=case, shape=(4, 4, 4), balanced=np.zeros((2, 3), np.int64), labels=np.zeros(2, np.int64),
            whole=np.zeros((2, 3), np.int64), per_class=100, n_whole=50, voxels=voxels,
        )
        for case, voxels in (("a", {0: 900, 1: 500, 2: 40}), ("b", {0: 900, 1: 500, 2: 700}), ("c", {0: 900, 1: 99}))
    )  # fmt: skip
    target = TargetCases(
        load=lambda name: None,  # type: ignore[arg-type, return-value]
        points=points,
        structures={1: "liver", 2: "spleen"},
        target=Target(input_channels=1, patch_size=(4, 4, 4), strides=[[1, 1, 1]] * 6),
        annotated={case: frozenset((1, 2)) for case in "abc"},
        digest="d",
    )
    return RankingReport(
        ranking=Ranking(metric="ccfv", candidates=candidates, failures=failures),
        target=target,
        about={"dataset": "Dataset004_Test", "configuration": "3d_fullres", "plans": "nnUNetPlans"},
        metrics=("ccfv", "leep"),
        settings={"seed": 0},
        command="stunet finetune -d 4 --from '/models/first & best.pth'",
        date="2026-01-01 00:00 UTC",
    )


def test_json_and_csv(tmp_path: Path) -> None:
    report = make_report(failures=(Failure("bad", "/models/bad.pth", "weights that are not finite"),))
    paths = write_ranking(report, tmp_path)
    assert [path.name for path in paths] == ["ranking.json", "ranking.csv", "ranking.html"]
    content = json.loads(paths[0].read_text())
    first, second, third = content["candidates"]
    assert (first["name"], first["scores"]) == ("first & best", {"ccfv": 3.0, "leep": None})
    assert first["interval"] == pytest.approx([2.525, 3.475])
    assert (second["first_is_ahead"], third["first_is_ahead"]) == (1.0, 1.0)
    assert content["tied_with_the_first"] == []
    assert content["failures"][0]["error"] == "weights that are not finite"
    rows = list(csv.reader(paths[1].open()))
    assert rows[1][:4] == ["1", "first & best", "3.0", ""]
    assert len(rows) == 4


def test_page_says_it_and_escapes(tmp_path: Path) -> None:
    page = write_ranking(make_report(), tmp_path)[2].read_text()
    assert "first &amp; best comes first, ahead of every other candidate" in page
    assert "STU-Net &lt;base&gt;" in page
    assert "<td>0.150</td><td>0.400</td>" in page  # consistency of the first: means over its two scales
    assert "liver (3)</th><th>spleen (1)</th>" in page
    assert "0.050, 25 %" in page
    assert "spleen: 1 of 2 cases have fewer than 100 voxels of it, the fewest 40" in page
    assert "liver: 1 of 3 cases" in page


def test_ties_and_empty_rankings_are_said() -> None:
    report = make_report("first", "second")
    close = Ranking(metric="ccfv", candidates=(_candidate("a", 1.0), _candidate("b", 1.0)), failures=())
    tied = RankingReport(**{**report.__dict__, "ranking": close})
    assert "cannot tell it apart from b" in tied.verdict
    nothing = RankingReport(**{**report.__dict__, "ranking": Ranking(metric="ccfv", candidates=(), failures=())})
    assert "None of the candidates" in nothing.verdict


def test_equal_reports_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_ranking(make_report(), tmp_path / name)
    for ending in ("json", "csv", "html"):
        assert (tmp_path / "a" / f"ranking.{ending}").read_bytes() == (
            tmp_path / "b" / f"ranking.{ending}"
        ).read_bytes()


def test_half_a_page_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError):
        write_page("ranking.html", tmp_path / "page.html", title="nothing else")
    assert list(tmp_path.iterdir()) == []
