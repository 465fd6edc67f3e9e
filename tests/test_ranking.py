"""Ranking: scores beside their definitions, results that are kept, candidates that fail, ties; the example."""

from __future__ import annotations

import doctest
import inspect
import json
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import nn
from weights import STRIDES, TINY, tiny_weights

import stunet
from plans import DATASET_JSON, make_plans
from stunet.cli.main import main
from stunet.errors import TransferabilityError, UsageError
from stunet.network import build_stunet
from stunet.planning.preprocessed import PreprocessedCase, PreprocessedDataset
from stunet.ranking import (
    CandidateScores,
    Ranking,
    build_candidate,
    ccfv,
    extract_case,
    linear_probe,
    logme,
    prepare_target,
    rank,
)
from stunet.ranking.rivals import dropout_consistency, fuse_topote, mean_over_scales

SHAPE = (20, 24, 16)
OPTIONS: dict[str, Any] = {"per_class": 40, "n_whole": 60, "batch_size": 1, "device": "cpu"}


def _case(name: str) -> PreprocessedCase:
    rng = np.random.default_rng(list(name.encode()))
    segmentation = np.zeros(SHAPE, np.int16)
    segmentation[2:9, 3:12, 2:9] = 1
    segmentation[12:18, 12:20, 5:14] = 2
    segmentation[0] = -1
    image = rng.normal(size=(1, *SHAPE)).astype(np.float32) + 2 * np.maximum(segmentation, 0)
    return PreprocessedCase(name, image.astype(np.float32), segmentation)


class Made(PreprocessedDataset):
    """Cases that are made when they are read."""

    def __init__(self, names: str = "abcd", patch: Any = (32, 32, 32), strides: Any = STRIDES, **known: Any) -> None:
        self.name, self.cases, self.ignore_label, self.known = "Dataset004_Made", list(names), None, known
        self.plans, self.configuration_name = {"plans_name": "nnUNetPlans"}, "3d_fullres"
        self.configuration = {"patch_size": patch, "architecture": {"arch_kwargs": {"strides": strides}}}
        self.dataset_json = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}

    def load(self, case: str) -> PreprocessedCase:
        return _case(case)

    def annotated(self, case: str) -> frozenset[int]:
        return frozenset(self.known.get(case, (1, 2)))


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, Path]:
    """Three with weights of different seeds, one that is no checkpoint, one with a weight that is no number."""
    paths = {name: tmp_path / f"{name}.pth" for name in ("x", "y", "z", "nan", "text")}
    for name in ("x", "y", "z"):
        weights = tiny_weights()
        torch.manual_seed(ord(name))
        weights = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in weights.items()}
        torch.save({"network_weights": weights}, paths[name])
    weights["encoder.stages.2.0.conv1.weight"] = torch.full_like(weights["encoder.stages.2.0.conv1.weight"], np.nan)
    torch.save({"network_weights": weights}, paths["nan"])
    paths["text"].write_text("no weights")
    return paths


def _only(paths: dict[str, Path], names: str) -> dict[str, Path]:
    return {name: paths[name] for name in names}


def test_scores_are_those_of_the_features(checkpoints: dict[str, Path]) -> None:
    ranking = rank(_only(checkpoints, "x"), Made(), metrics=("logme", "ccfv"), **OPTIONS)
    candidate = build_candidate(checkpoints["x"], input_channels=1, patch_size=(32, 32, 32), strides=STRIDES)
    cases = [
        extract_case(candidate.network, _case(p.case).image, p, patch_size=(32, 32, 32), head=candidate.head)
        for p in ranking.target.points
    ]
    assert ranking.best is not None
    assert ranking.best.scores["ccfv"] == pytest.approx(ccfv(cases).score, rel=1e-6)
    assert ranking.best.scores["logme"] == pytest.approx(mean_over_scales(cases, logme), rel=1e-6)
    low, high = ranking.best.interval or (0, 0)
    assert low < high


def test_predictions_come_from_the_decoder_where_encoders_are_compared(checkpoints: dict[str, Path]) -> None:
    content = torch.load(checkpoints["y"])
    pretext = {"name": "simclr", "settings": {}, "trains": ["encoder"], "labels": False}
    torch.save({**content, "pretext": pretext}, checkpoints["y"])
    metrics = ("logme", "leep", "dropout", "zero-shot")
    both = {row.name: row for row in rank(_only(checkpoints, "xy"), Made(), metrics=metrics, **OPTIONS).rows}
    alone = rank(_only(checkpoints, "x"), Made(), metrics=metrics, **OPTIONS).rows[0]
    candidate = build_candidate(checkpoints["x"], input_channels=1, patch_size=(32, 32, 32), strides=STRIDES)
    points = prepare_target(Made(), "abcd", per_class=40, n_whole=60).points
    encoder = partial(extract_case, candidate.network, patch_size=(32, 32, 32), part="encoder")
    cases = [encoder(_case(p.case).image, p) for p in points]
    assert both["x"].scores["logme"] == pytest.approx(mean_over_scales(cases, logme), rel=1e-6)
    assert both["x"].scores["logme"] != alone.scores["logme"]
    for metric in ("leep", "dropout", "zero-shot"):
        assert both["x"].scores[metric] == alone.scores[metric]
        assert both["y"].scores[metric] is None
    assert alone.scores["leep"] is not None


def test_progress_moves_within_a_case(checkpoints: dict[str, Path]) -> None:
    seen: list[tuple[str, float]] = []
    dataset = Made(patch=(16, 16, 16), strides=STRIDES[:4] + [[1] * 3] * 2)
    rank(
        _only(checkpoints, "x"),
        dataset,
        metrics=("ccfv", "logme"),
        on_progress=lambda *told: seen.append(told),
        **OPTIONS,
    )
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len({share for doing, share in seen if doing.startswith("case")}) > 2 * 4  # more than once a case
    assert [doing for doing, _ in seen if "comp" in doing] == ["computing ccfv: x", "computing logme: x"]


def test_failing_candidates_are_reported_and_the_others_ranked(checkpoints: dict[str, Path]) -> None:
    seen: list[str] = []
    order = {name: checkpoints[name] for name in ("nan", "x", "y", "z", "text")}
    metrics = ("ccfv", "leep", "zero-shot")
    ranking = rank(order, Made(), metrics=metrics, on_candidate=lambda row: seen.append(row.name), **OPTIONS)
    scores = [row.scores["ccfv"] for row in ranking.rows]
    assert sorted(scores, reverse=True) == scores  # type: ignore[type-var]
    assert {row.name for row in ranking.rows} == set("xyz")
    assert ranking.best is ranking.rows[0]
    assert [row.name for row in ranking.failures] == ["nan", "text"]
    assert "encoder.stages.2.0.conv1.weight" in ranking.failures[0].error
    assert seen == list(order)
    # Nothing in these files says what the outputs are.
    assert all(row.scores["zero-shot"] is None for row in ranking.rows)


def test_results_are_kept_by_content(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    scored: list[str] = []

    def run(names: str | dict[str, Path], dataset: Made | None = None, **options: Any) -> Ranking:
        scored.clear()

        def told(doing: str, share: float) -> None:
            scored.extend([doing.rpartition(": ")[2]] * doing.startswith("computing ccfv"))

        paths = _only(checkpoints, names) if isinstance(names, str) else names
        options = {**OPTIONS, "metrics": ("ccfv",), **options}
        return rank(paths, dataset or Made(), keep_in=tmp_path / "kept", on_progress=told, **options)

    first = run("xy")
    again = run("xyz")
    assert scored == ["z"]
    kept = {row.name: replace(row, seconds=0.0) for row in again.rows}
    assert [kept[row.name] for row in first.rows] == [replace(row, seconds=0.0) for row in first.rows]

    renamed = checkpoints["x"].rename(tmp_path / "moved.pth")
    (moved,) = run({"other": renamed}).rows
    assert not scored
    assert (moved.name, moved.path, moved.description["path"]) == ("other", str(renamed), str(renamed))

    run("y", Made("abce"))  # other cases
    assert scored == ["y"]
    run("y", seed=1)  # other points
    assert scored == ["y"]
    run("y", metrics=("ccfv", "logme"))  # other metrics
    assert scored == ["y"]
    run("y", metrics=("logme", "ccfv"))  # in another order
    assert not scored


@pytest.mark.parametrize("damage", ["cut", "other content", "of something else", "of another checkpoint"])
def test_kept_results_that_cannot_be_used(checkpoints: dict[str, Path], tmp_path: Path, damage: str) -> None:
    def run() -> CandidateScores:
        (row,) = rank(_only(checkpoints, "x"), Made(), metrics=("ccfv",), keep_in=tmp_path / "kept", **OPTIONS).rows
        return row

    before = run()
    (file,) = (tmp_path / "kept").iterdir()
    kept = json.loads(file.read_text())
    other = {"name": "x", "path": "y", "scores": {"ccfv": 9.0}}
    content = {"other content": {"scores": {"ccfv": "high"}}, "of something else": other}
    content["of another checkpoint"] = {**kept, **other, "identity": kept["identity"][::-1]}
    file.write_text(file.read_text()[:200] if damage == "cut" else json.dumps(content[damage]))
    assert run().scores == before.scores
    assert run().seconds == 0


def test_published_names_have_names_of_the_users(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stunet.ranking.ranking.load_registry", lambda: {"small_ep4k": "its entry"})
    monkeypatch.setattr("stunet.ranking.ranking.cached_weights", {"small_ep4k": checkpoints["x"]}.__getitem__)
    (row,) = rank({"small": "small_ep4k"}, Made(), metrics=("logme",), **OPTIONS).rows
    assert (row.name, row.path) == ("small", str(checkpoints["x"]))
    with pytest.raises(UsageError, match="nothing at smal_ep4k: Did you mean small_ep4k"):
        rank({"small": "smal_ep4k"}, Made(), metrics=("logme",), **OPTIONS)


def _scored(name: str, score: float, draws: list[float | None]) -> CandidateScores:
    return CandidateScores(name=name, path="", scores={"ccfv": score}, draws=tuple(draws), seconds=1.0)


def test_ties_are_by_paired_resamples() -> None:
    first = _scored("first", 2.0, [2.0] * 95 + [1.0] * 5 + [None])
    close = _scored("close", 1.5, [1.5] * 101)  # ahead of the first in 5 of 100
    tied = _scored("tied", 1.4, [2.5] * 6 + [0.0] * 95)
    target = prepare_target(Made(), "ab", per_class=8, n_whole=8)
    rows = (first, close, tied)
    ranking = Ranking(rows=rows, metrics=("ccfv",), target=target, about={}, settings={}, date="")
    assert ranking.ahead(first, close) == pytest.approx(0.95)
    assert [candidate.name for candidate in ranking.tied] == ["tied"]


def test_more_metrics_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    metrics = ("linear-probe", "topote", "dropout", "ccfv-scale-4", "ccfv-scale-5", "ccfv-none-none")
    dataset = Made("abc", a=(1,))  # in one case nothing says where background is
    twice = [rank(_only(checkpoints, "xy"), dataset, metrics=metrics, keep_in=tmp_path, **OPTIONS) for _ in "12"]
    first, again = ({row.name: row.scores for row in ranking.rows} for ranking in twice)
    assert again == first
    assert {row.seconds for row in twice[1].rows} == {0}
    for scores in first.values():
        assert scores["ccfv-scale-5"] is None  # of a decoder of five stages
        assert scores["ccfv-scale-4"] is not None
        assert all(0 < (scores[name] or 0) <= 1 for name in ("linear-probe", "topote-global", "topote-local"))
    terms = [np.array([row[f"topote-{term}"] for row in first.values()]) for term in ("global", "local")]
    assert [row["topote"] for row in first.values()] == pytest.approx(fuse_topote(*terms, n_classes=2).tolist())
    read = build_candidate(checkpoints["x"], input_channels=1, patch_size=(32, 32, 32), strides=STRIDES)
    points = twice[0].target.points
    assert [sorted(p.annotated) for p in points] == [[1], [1, 2], [1, 2]]
    cases = [
        extract_case(read.network, _case(p.case).image, p, patch_size=(32, 32, 32), head=read.head) for p in points
    ]
    kept = points[0].labels != 0
    shown = replace(points[0], balanced=points[0].balanced[kept], labels=points[0].labels[kept])
    scales = tuple(scale[kept] for scale in cases[0].scales)
    cases[0] = replace(cases[0], labels=shown.labels, scales=scales, probabilities=None, points=shown)
    assert first["x"]["linear-probe"] == pytest.approx(np.mean(list(linear_probe(cases).values())), rel=1e-6)
    assert first["x"]["dropout"] == pytest.approx(dropout_consistency(cases), rel=1e-6)


def test_cases_that_lack_annotations_have_no_background(checkpoints: dict[str, Path]) -> None:
    """Where the spleen is not annotated, a voxel that is 0 may be spleen: features there say nothing."""
    complete, partial = (
        rank(_only(checkpoints, "x"), dataset, metrics=("ccfv", "logme"), **OPTIONS)
        for dataset in (Made(), Made(a=(1,)))
    )
    assert complete.target.digest != partial.target.digest
    scores = [ranking.rows[0].scores for ranking in (complete, partial)]
    assert scores[0]["ccfv"] == pytest.approx(scores[1]["ccfv"])  # of foreground alone
    assert scores[0]["logme"] != pytest.approx(scores[1]["logme"], abs=1e-9)


def test_targets_without_pairs_are_refused() -> None:
    with pytest.raises(TransferabilityError, match="liver in a; spleen in a"):
        rank({}, Made("a"), **OPTIONS)


def test_flat_configurations_rank_too(tmp_path: Path) -> None:
    """2D: each point's features come from its slice alone."""
    flat = [stride[1:] for stride in STRIDES]
    torch.manual_seed(1)
    path = tmp_path / "flat.pth"
    torch.save({"network_weights": build_stunet(TINY, 1, 3, flat, conv_op=nn.Conv2d).state_dict()}, path)
    ranking = rank([path], Made(patch=(32, 32), strides=flat), metrics=("ccfv", "logme"), **OPTIONS)
    assert ranking.failures == ()
    assert np.isfinite(list(ranking.rows[0].scores.values())).all()  # type: ignore[arg-type]
    refused = rank([path], Made(), **OPTIONS)
    assert refused.best is None
    assert "2D weights for 3D patches" in refused.failures[0].error


@pytest.mark.parametrize("metrics", [(), ("ccfv", "ccfv"), ("ccfv", "tea leaves")])
def test_unknown_metrics(metrics: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="zero-shot"):
        rank({}, Made(), metrics=metrics)


@pytest.fixture
def preprocessed(nnunet_folders: dict[str, Path]) -> None:
    """A dataset as nnU-Net's preprocessing leaves it, of id 4."""
    folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset004_Made"
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for name in "abcd":
        case = _case(name)
        nnUNetDatasetBlosc2.save_case(case.image, case.segmentation[None], {"spacing": [1, 1, 1]}, str(data / name))


@pytest.mark.usefixtures("preprocessed")
def test_a_ranking_passes_through_few_files(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to a CC-FV value."""
    root, entered, found = str(Path(stunet.__file__).parent), set(), list[float]()

    def enter(frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(root) and code.co_flags & inspect.CO_OPTIMIZED and not found:
            entered.add(Path(code.co_filename).relative_to(root))
            found.extend([value.score] if event == "return" and code is ccfv.__code__ else [])

    options = ["-d", "4", "--checkpoints", str(checkpoints["x"]), "--metrics", "ccfv", "--cases", "2", "--whole", "20"]
    monkeypatch.setattr(sys, "argv", ["stunet", "rank", *options, "-o", str(checkpoints["x"].with_name("out"))])
    sys.setprofile(enter)
    try:
        with suppress(SystemExit):
            main()
    finally:
        sys.setprofile(None)
    assert np.isfinite(found[0])
    assert len(entered) <= 20, sorted(map(str, entered))


@pytest.mark.usefixtures("preprocessed")
def test_the_example_of_the_face(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, other = rank(_only(checkpoints, "xy"), 4, metrics=("ccfv",), n_cases=4, device="cpu").rows
    monkeypatch.chdir(tmp_path)
    Path(best.path).rename("late.pth")
    Path(other.path).rename("early.pth")
    (example,) = doctest.DocTestFinder().find(rank, globs={"rank": rank})
    assert doctest.DocTestRunner().run(example).failed == 0
    assert Path("ranking.csv").read_text().splitlines()[0].startswith("rank,name,ccfv,mean_rank")
