"""``stunet rank`` and what a pre-training keeps for it, as typed."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from integration.commands import Shell

from stunet.datasets import write_phantom_dataset

SETTINGS = (
    "num_epochs=4 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 batch_size=2 patch_size=16,32,32 "
    "save_every=1 keep_every=2 select_for=2"
)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A pre-training of four short epochs that selects for another dataset."""
    shell = Shell.make(tmp_path_factory.mktemp("rank"))
    for dataset, contrast, n in (("Dataset001_CT", "venous", 6), ("Dataset002_MR", "arterial", 5)):
        folder = shell.root / "nnUNet_raw" / dataset
        write_phantom_dataset(folder, n_training=n, n_test=0, seed=n, contrast=contrast)
    shell.run("nnUNetv2_plan_and_preprocess -d 1 2 -c 3d_fullres -npfp 1 -np 1")
    shell.run(f"stunet plan -d 1 -c 3d_fullres --depth 1 --width 4 --name STUNetPlans_narrow --set {SETTINGS}")
    shell.run("nnUNetv2_train 1 3d_fullres 0 -p STUNetPlans_narrow -tr STUNetTrainer -device cpu", trainers=True)
    return shell


@pytest.fixture(scope="module")
def fold(shell: Shell) -> Path:
    return shell.model("Dataset001_CT", "STUNetTrainer__STUNetPlans_narrow__3d_fullres") / "fold_0"


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
    assert len(re.findall(r"Transferability to Dataset002_MR after epoch \d: CC-FV", log.read_text())) == 4


def test_rank_as_typed(shell: Shell, fold: Path) -> None:
    zoo = shell.root / "zoo.yaml"
    zoo.write_text(
        f"checkpoints:\n- {{name: early, path: {fold}/checkpoint_epoch_0002.pth}}\n"
        f"- {{name: final, path: {fold}/checkpoint_final.pth}}\n- {{name: broken, path: {shell.root}/broken.pth}}\n"
    )
    (shell.root / "broken.pth").write_bytes((fold / "checkpoint_final.pth").read_bytes()[:5000])
    process = shell.start(f"stunet rank -d 2 -p nnUNetPlans --zoo {zoo} --cases 4 --points 50 --whole 200 -o out")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output  # one could not be scored
    assert "broken could not be scored" in output
    assert "Traceback" not in output
    ranking = json.loads((shell.root / "out" / "ranking.json").read_text())
    names = [candidate["name"] for candidate in ranking["candidates"]]
    assert sorted(names) == ["early", "final"]
    assert [failure["name"] for failure in ranking["failures"]] == ["broken"]
    scores = [candidate["scores"] for candidate in ranking["candidates"]]
    assert scores[0]["ccfv"] > scores[1]["ccfv"]
    assert all(0 <= score["zero-shot"] <= 1 for score in scores)  # the kidneys are in both
    rows = list(csv.DictReader((shell.root / "out" / "ranking.csv").open()))
    assert [(row["name"], float(row["ccfv"])) for row in rows] == [
        (n, s["ccfv"]) for n, s in zip(names, scores, strict=True)
    ]
    winner = {"early": "checkpoint_epoch_0002.pth", "final": "checkpoint_final.pth"}[names[0]]
    command = f"stunet finetune -d 2 -c 3d_fullres --from {fold}/{winner}"
    assert ranking["command"] == command
    assert f"$ {command}" in output

    curve = {point["epoch"]: point["score"] for point in json.loads((fold / "transfer_curve.json").read_text())}
    both = f"{fold}/checkpoint_final.pth {fold}/checkpoint_epoch_0002.pth"
    line = f"stunet rank -d 2 --checkpoints {both} --metrics ccfv -o o2"
    again = shell.run(line)
    assert "kept from an earlier run" not in again
    by_name = {
        c["name"]: c["scores"]["ccfv"]
        for c in json.loads((shell.root / "o2" / "ranking.json").read_text())["candidates"]
    }
    # The pre-training scored the same checkpoints with the same cases and points.
    assert by_name == pytest.approx({"checkpoint_final": curve[4], "checkpoint_epoch_0002": curve[2]}, rel=1e-5)
    assert shell.run(line).count("kept from an earlier run") == 2


def test_table_at_80_columns_with_long_names_and_markup(shell: Shell, fold: Path) -> None:
    zoo = shell.root / "long.yaml"
    long = "models/STUNetTrainer_pretrain__STUNetPlans_base__3d_fullres/fold_all/[/red] checkpoint"
    zoo.write_text(
        f"checkpoints:\n- {{name: '{long}_early', path: {fold}/checkpoint_epoch_0002.pth}}\n"
        f"- {{name: '{long}_final', path: {fold}/checkpoint_final.pth}}\n"
    )
    output = shell.run(f"COLUMNS=80 stunet rank -d 2 --zoo {zoo} --cases 3 --points 50 --whole 200 -o long")
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
    shell.run(f"stunet rank -d 2 --checkpoints {fold}/checkpoint_final.pth --metrics ccfv --cases 3 -o page")
    page = (shell.root / "page" / "ranking.html").read_text()
    references = _References()
    references.feed(page)
    assert all(reference.startswith(("#", "data:")) for reference in references.found), references.found
    assert "url(http" not in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("stunet rank -d 2 --checkpoints nowhere.pth", "nowhere.pth"),
        ("stunet rank -d 2", "--checkpoints"),
        ("stunet rank -d 2 --zoo zoo.yaml --checkpoints x.pth", "--zoo"),
        ("stunet rank -d 9 --checkpoints {final}", "9"),
        ("stunet rank -d 2 -c 3d_lowres --checkpoints {final}", "3d_lowres"),
        ("stunet rank -d 2 --metrics luck --checkpoints {final}", "luck"),
        ("stunet rank -d 2 --debias maybe --checkpoints {final}", "maybe"),
        ("stunet rank -d 2 -f 0 --checkpoints {final}", "splits_final.json"),
    ],
)
def test_bad_input(shell: Shell, fold: Path, line: str, problem: str) -> None:
    process = shell.start(line.format(final=fold / "checkpoint_final.pth"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert problem in output
    assert "Traceback" not in output
