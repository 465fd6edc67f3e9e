"""``stunet rank`` and what a pre-training keeps for it."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ARTERIAL, TRAINED, VENOUS
from integration.commands import Shell


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """The pre-training of four short epochs that selected for another dataset."""
    return trained.copy(tmp_path_factory.mktemp("rank"))


@pytest.fixture(scope="module")
def fold(shell: Shell) -> Path:
    return shell.model(VENOUS, TRAINED) / "fold_0"


def rank(shell: Shell, options: str, name: str, status: int = 0) -> tuple[str, dict]:
    """What ``stunet rank -d 2`` prints, and what it writes into a folder."""
    printed = shell.run(f"stunet rank -d 2 {options} -o {name}", status=status)
    return printed, json.loads((shell.root / name / "ranking.json").read_text())


def test_pretraining_keeps_and_scores_checkpoints(fold: Path) -> None:
    assert {p.name for p in fold.glob("*.pth")} == {
        "checkpoint_best.pth", "checkpoint_best_transfer.pth", "checkpoint_epoch_0002.pth", "checkpoint_final.pth",
    }  # fmt: skip
    curve = json.loads((fold / "transfer_curve.json").read_text())
    assert [point["epoch"] for point in curve] == [1, 2, 3, 4]
    best = max(curve, key=lambda point: point["score"])
    epochs = {
        name: torch.load(fold / f"checkpoint_{name}.pth", weights_only=False)["current_epoch"]
        for name in ("best_transfer", "epoch_0002", "final")
    }
    assert epochs == {"best_transfer": best["epoch"], "epoch_0002": 2, "final": 4}
    (log,) = fold.glob("training_log_*.txt")
    assert len(re.findall(rf"Transferability to {ARTERIAL} after epoch \d: CC-FV", log.read_text())) == 4


def test_scores_failures_and_the_next_command(shell: Shell, fold: Path) -> None:
    zoo = shell.root / "zoo.yaml"
    zoo.write_text(
        f"checkpoints:\n- {{name: early, path: {fold}/checkpoint_epoch_0002.pth}}\n"
        f"- {{name: final, path: {fold}/checkpoint_final.pth}}\n- {{name: broken, path: {shell.root}/broken.pth}}\n"
    )
    (shell.root / "broken.pth").write_bytes((fold / "checkpoint_final.pth").read_bytes()[:5000])
    options = f"-p nnUNetPlans --zoo {zoo} --cases 4 --points 50 --whole 200"
    output, ranking = rank(shell, options, "out", status=1)  # one could not be scored
    assert "broken could not be scored" in output
    assert "Traceback" not in output
    names = [candidate["name"] for candidate in ranking["candidates"]]
    assert sorted(names) == ["early", "final"]
    assert [failure["name"] for failure in ranking["failures"]] == ["broken"]
    scores = [candidate["scores"] for candidate in ranking["candidates"]]
    assert scores[0]["logme"] > scores[1]["logme"]
    assert all(0 <= score["zero-shot"] <= 1 for score in scores)  # the kidneys are in both
    rows = list(csv.DictReader((shell.root / "out" / "ranking.csv").open()))
    written = [(row["name"], float(row["logme"]), float(row["ccfv"])) for row in rows]
    assert written == [(name, score["logme"], score["ccfv"]) for name, score in zip(names, scores, strict=True)]
    winner = {"early": "checkpoint_epoch_0002.pth", "final": "checkpoint_final.pth"}[names[0]]
    command = f"stunet finetune -d 2 -c 3d_fullres --from {fold}/{winner}"
    assert ranking["command"] == command
    assert f"$ {command}" in output


def test_the_pretraining_scored_alike_and_scores_are_kept(shell: Shell, fold: Path) -> None:
    curve = {point["epoch"]: point["score"] for point in json.loads((fold / "transfer_curve.json").read_text())}
    options = f"--checkpoints {fold}/checkpoint_final.pth {fold}/checkpoint_epoch_0002.pth --metrics ccfv"
    output, ranking = rank(shell, options, "o2")
    assert "kept from an earlier run" not in output
    by_name = {candidate["name"]: candidate["scores"]["ccfv"] for candidate in ranking["candidates"]}
    # With the same cases and points. A score is a logarithm, which rounding may move as far where it is close to 0.
    assert by_name == pytest.approx({"checkpoint_final": curve[4], "checkpoint_epoch_0002": curve[2]}, rel=0, abs=1e-5)
    assert rank(shell, options, "o2")[0].count("kept from an earlier run") == 2


def test_table_at_80_columns_with_long_names_and_markup(shell: Shell, fold: Path) -> None:
    long = "models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all/[/red] checkpoint"
    (shell.root / "long.yaml").write_text(
        f"checkpoints:\n- {{name: '{long}_early', path: {fold}/checkpoint_epoch_0002.pth}}\n"
        f"- {{name: '{long}_final', path: {fold}/checkpoint_final.pth}}\n"
    )
    line = "stunet rank -d 2 --zoo long.yaml --cases 3 --points 50 --whole 200 -o long"
    output = shell.run(line, COLUMNS="80")
    table = output[output.index("Best first") : output.index("1: models")].splitlines()
    assert max(map(len, table)) <= 80
    rows = {line.split()[0]: line for line in table if line.strip()[:2] in ("1 ", "2 ")}
    assert len(rows) == 2  # a line each
    ranking = json.loads((shell.root / "long" / "ranking.json").read_text())
    for (place, row), candidate in zip(rows.items(), ranking["candidates"], strict=True):
        assert f"{candidate['scores']['ccfv']:.2f}" in row
        assert f"{candidate['mean_rank']:.1f}" in row
        assert candidate["name"][-5:] in row
        assert f"\n{place}: {candidate['name']}\n" in output
    assert "warning: Only 3 cases" in output
    assert " ".join(ranking["verdict"].split()) in " ".join(output.split())


class _References(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "iframe", "object") else []
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def test_page_holds_all_it_shows(shell: Shell, fold: Path) -> None:
    rank(shell, f"--checkpoints {fold}/checkpoint_final.pth --metrics ccfv --cases 3", "page")
    page = (shell.root / "page" / "ranking.html").read_text()
    references = _References()
    references.feed(page)
    assert all(reference.startswith(("#", "data:")) for reference in references.found), references.found
    assert "url(http" not in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("-d 2 --checkpoints nowhere.pth", "nowhere.pth"),
        ("-d 2", "--checkpoints"),
        ("-d 2 --zoo zoo.yaml --checkpoints x.pth", "--zoo"),
        ("-d 9 --checkpoints {final}", "9"),
        ("-d 2 -c 3d_lowres --checkpoints {final}", "3d_lowres"),
        ("-d 2 --metrics luck --checkpoints {final}", "luck"),
        ("-d 2 --debias maybe --checkpoints {final}", "maybe"),
        ("-d 2 -f 0 --checkpoints {final}", "splits_final.json"),
    ],
)
def test_bad_input(shell: Shell, fold: Path, options: str, problem: str) -> None:
    shell.refuse(f"stunet rank {options.format(final=fold / 'checkpoint_final.pth')}", problem)
