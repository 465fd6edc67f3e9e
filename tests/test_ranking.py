"""Ranking: scores beside their definitions, results that are kept, candidates that fail, ties."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from weights import STRIDES, TINY, tiny_weights

from stunet.errors import TransferabilityError, UsageError
from stunet.network import build_stunet
from stunet.ranking import (
    CandidateScores,
    PointPredictions,
    Ranking,
    ResultCache,
    Target,
    TargetCases,
    ZooEntry,
    build_candidate,
    ccfv,
    extract_case,
    logme,
    mean_over_scales,
    prepare_target,
    rank_candidates,
    zero_shot_at_points,
)

SHAPE = (20, 24, 16)
STRUCTURES = {1: "liver", 2: "spleen"}


@dataclass(frozen=True)
class _Case:
    image: np.ndarray
    segmentation: np.ndarray


def _case(name: str) -> _Case:
    rng = np.random.default_rng(list(name.encode()))
    segmentation = np.zeros(SHAPE, np.int16)
    segmentation[2:9, 3:12, 2:9] = 1
    segmentation[12:18, 12:20, 5:14] = 2
    segmentation[0] = -1
    image = rng.normal(size=(1, *SHAPE)).astype(np.float32) + 2 * np.maximum(segmentation, 0)
    return _Case(image.astype(np.float32), segmentation)


def _target(names: str = "abcd", **more: Any) -> TargetCases:
    target = Target(input_channels=1, patch_size=(32, 32, 32), strides=STRIDES)
    options: dict[str, Any] = {"structures": STRUCTURES, "target": target, "per_class": 40, "n_whole": 60, **more}
    return prepare_target(_case, list(names), **options)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[ZooEntry]:
    """Three with weights of different seeds, one that is no checkpoint, one with a weight that is no number."""
    entries = []
    for name in ("x", "y", "z"):
        weights = tiny_weights()
        torch.manual_seed(ord(name))
        weights = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in weights.items()}
        entries.append(ZooEntry(name=name, path=tmp_path / f"{name}.pth"))
        torch.save({"network_weights": weights}, entries[-1].path)
    weights["encoder.stages.2.0.conv1.weight"] = torch.full_like(weights["encoder.stages.2.0.conv1.weight"], np.nan)
    torch.save({"network_weights": weights}, tmp_path / "nan.pth")
    (tmp_path / "text.pth").write_text("no weights")
    return [
        *entries,
        ZooEntry(name="nan", path=tmp_path / "nan.pth"),
        ZooEntry(name="text", path=tmp_path / "text.pth"),
    ]


def test_scores_are_those_of_the_features(checkpoints: list[ZooEntry]) -> None:
    target = _target()
    ranking = rank_candidates(checkpoints[:1], target, metrics=("logme", "ccfv"))
    candidate = build_candidate(checkpoints[0].path, target.target)
    cases = [
        extract_case(candidate.network, _case(p.case).image, p, patch_size=(32, 32, 32), head=candidate.head)
        for p in target.points
    ]
    assert ranking.candidates[0].scores["ccfv"] == pytest.approx(ccfv(cases).score, rel=1e-6)
    assert ranking.candidates[0].scores["logme"] == pytest.approx(mean_over_scales(cases, logme), rel=1e-6)
    low, high = ranking.candidates[0].interval or (0, 0)
    assert low < high


def test_progress_moves_within_a_case(checkpoints: list[ZooEntry]) -> None:
    seen: list[tuple[str, str, float]] = []
    target = replace(
        _target(), target=Target(input_channels=1, patch_size=(16, 16, 16), strides=STRIDES[:4] + [[1] * 3] * 2)
    )
    rank_candidates(checkpoints[:1], target, metrics=("ccfv", "logme"), on_progress=lambda *told: seen.append(told))
    shares = [share for _, doing, share in seen if doing.startswith("case")]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(set(shares)) > 2 * 4  # more than once a case
    assert [doing for _, doing, _ in seen if "comp" in doing] == ["computing ccfv", "computing logme"]


def test_failing_candidates_are_reported_and_the_others_ranked(checkpoints: list[ZooEntry]) -> None:
    seen = []
    ranking = rank_candidates(
        [checkpoints[3], *checkpoints[:3], checkpoints[4]], _target(), metrics=("ccfv", "leep", "zero-shot"),
        on_candidate=lambda outcome: seen.append(outcome.name),
    )  # fmt: skip
    scores = [candidate.scores["ccfv"] for candidate in ranking.candidates]
    assert sorted(scores, reverse=True) == scores
    assert {candidate.name for candidate in ranking.candidates} == set("xyz")
    assert [failure.name for failure in ranking.failures] == ["nan", "text"]
    assert "encoder.stages.2.0.conv1.weight" in ranking.failures[0].error
    assert seen == ["nan", "x", "y", "z", "text"]
    # Nothing in these files says what the outputs are.
    assert all(candidate.scores["zero-shot"] is None for candidate in ranking.candidates)


def test_results_are_kept_by_content(checkpoints: list[ZooEntry], tmp_path: Path) -> None:
    scored: list[str] = []

    def rank(entries: list[ZooEntry], target: TargetCases, **options: Any) -> Ranking:
        scored.clear()
        return rank_candidates(
            entries,
            target,
            cache=ResultCache(tmp_path / "kept"),
            on_progress=lambda name, doing, share: scored.append(name) if share == 1 and "case 4" in doing else None,
            **options,
        )

    first = rank(checkpoints[:2], _target())
    again = rank(checkpoints[:3], _target())
    assert set(scored) == {"z"}
    kept = {c.name: replace(c, seconds=0.0) for c in again.candidates}
    assert [kept[c.name] for c in first.candidates] == [replace(c, seconds=0.0) for c in first.candidates]

    renamed = checkpoints[0].path.rename(tmp_path / "moved.pth")
    moved = rank([ZooEntry(name="other", path=renamed)], _target())
    assert not scored
    assert (moved.candidates[0].name, moved.candidates[0].path) == ("other", str(renamed))

    rank(checkpoints[1:2], _target("abce"))  # other cases
    assert set(scored) == {"y"}
    rank(checkpoints[1:2], _target(seed=1))  # other points
    assert set(scored) == {"y"}
    rank(checkpoints[1:2], _target(), metrics=("ccfv", "logme"))  # other metrics
    assert set(scored) == {"y"}


@pytest.mark.parametrize("damage", ["cut", "version", "other key"])
def test_kept_results_that_cannot_be_used(checkpoints: list[ZooEntry], tmp_path: Path, damage: str) -> None:
    cache = ResultCache(tmp_path / "kept")
    before = rank_candidates(checkpoints[:1], _target(), cache=cache)
    (file,) = (tmp_path / "kept").iterdir()
    content = json.loads(file.read_text())
    content["result"]["scores"]["ccfv"] = 99.0
    if damage == "version":
        content["format"] = 0
    if damage == "other key":
        content["key"]["checkpoint"] = "0" * 64
    file.write_text(json.dumps(content)[: 200 if damage == "cut" else None])
    after = rank_candidates(checkpoints[:1], _target(), cache=cache)
    assert after.candidates[0].scores == before.candidates[0].scores
    assert cache.outdated == ([file] if damage == "version" else [])
    assert ResultCache(tmp_path / "kept").get(json.loads(file.read_text())["key"]) is not None


def _scored(name: str, score: float, draws: list[float | None]) -> CandidateScores:
    return CandidateScores(
        name=name, path="", sha256="", description={}, scores={"ccfv": score}, draws=tuple(draws), seconds=1.0
    )


def test_ties_are_by_paired_resamples() -> None:
    first = _scored("first", 2.0, [2.0] * 95 + [1.0] * 5 + [None])
    close = _scored("close", 1.5, [1.5] * 101)  # ahead of the first in 5 of 100
    tied = _scored("tied", 1.4, [2.5] * 6 + [0.0] * 95)
    ranking = Ranking(metric="ccfv", candidates=(first, close, tied), failures=())
    assert ranking.ahead(first, close) == pytest.approx(0.95)
    assert [candidate.name for candidate in ranking.tied] == ["tied"]


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
    case = PointPredictions(labels=labels, outputs=called, voxels={0: 100, 1: 40}, annotated=frozenset((1, 2)))
    liver_everywhere = PointPredictions(
        labels=np.array([0, 2]), outputs=np.array([0, 0]), voxels={0: 10, 2: 5}, annotated=frozenset((2,))
    )
    found = zero_shot_at_points([case, liver_everywhere], STRUCTURES, outputs)
    assert found == pytest.approx(expected)


def test_cases_that_lack_annotations_have_no_background(checkpoints: list[ZooEntry]) -> None:
    """Where the spleen is not annotated, a voxel that is 0 may be spleen: features there say nothing."""
    known = {"a": frozenset((1,))}
    complete, partial = _target(), _target(annotated=lambda name: known.get(name, frozenset((1, 2))))
    assert complete.digest != partial.digest
    scores = [
        rank_candidates(checkpoints[:1], target, metrics=("ccfv", "logme")).candidates[0].scores
        for target in (complete, partial)
    ]
    assert scores[0]["ccfv"] == pytest.approx(scores[1]["ccfv"])  # of foreground alone
    assert scores[0]["logme"] != pytest.approx(scores[1]["logme"], abs=1e-9)


def test_targets_without_pairs_are_refused() -> None:
    with pytest.raises(TransferabilityError, match="liver in a; spleen in a"):
        _target("a")


def test_flat_configurations_rank_too(tmp_path: Path) -> None:
    """2D: each point's features come from its slice alone."""
    flat = [stride[1:] for stride in STRIDES]
    torch.manual_seed(1)
    path = tmp_path / "flat.pth"
    torch.save({"network_weights": build_stunet(TINY, 1, 3, flat, conv_op=nn.Conv2d).state_dict()}, path)
    target = _target(target=Target(input_channels=1, patch_size=(32, 32), strides=flat))
    ranking = rank_candidates([ZooEntry(name="flat", path=path)], target, metrics=("ccfv", "logme"))
    assert ranking.failures == ()
    assert np.isfinite(list(ranking.candidates[0].scores.values())).all()
    refused = rank_candidates([ZooEntry(name="flat", path=path)], _target())
    assert "2D weights for 3D patches" in refused.failures[0].error


@pytest.mark.parametrize("metrics", [(), ("ccfv", "ccfv"), ("ccfv", "tea leaves")])
def test_unknown_metrics(metrics: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="zero-shot"):
        rank_candidates([], _target(), metrics=metrics)
