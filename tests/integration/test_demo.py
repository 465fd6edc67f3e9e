"""The demo from its command to its page, shortened: its story, and on a dataset of the user's with regions."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from integration.commands import Shell, edit_json
from matplotlib.image import imread

from stunet.datasets.phantoms import write_phantom_dataset
from stunet.reports.figures import StructureDice, conclude

LABELS = {"background": 0, "soft organs": [1, 2, 3], "kidneys": [3], "spine": [4], "aorta": [5]}


def _demo(tmp_path: Path, *options: str) -> str:
    # A variable of the user's that would send the run to a service on the network.
    user = {"nnUNet_wandb_enabled": "1", "nnUNet_raw": "/nowhere", "COLUMNS": "150"}
    return Shell(tmp_path).type(f"stunet demo {' '.join(options)} -o out", **user)


@pytest.mark.slow
def test_demo_tells_the_story(tmp_path: Path) -> None:
    printed = _demo(tmp_path, "--epochs", "2")
    steps = [
        "stunet import totalsegmentator", "stunet labels check", "nnUNetv2_plan_and_preprocess", "stunet plan",
        "stunet plan", "stunet train 1", "stunet rank", "stunet finetune",
        "stunet train 2", "nnUNetv2_predict", "nnUNetv2_predict", "nnUNetv2_evaluate_folder",
    ]  # fmt: skip
    position = 0
    for step in steps:
        position = printed.index(f"\n$ {step} ", position) + 1
    out = tmp_path / "out"
    ranking = json.loads((out / "ranking" / "ranking.json").read_text())
    assert {candidate["name"] for candidate in ranking["candidates"]} == {"checkpoint_epoch_0001", "checkpoint_final"}
    # The winner is what is fine-tuned; long paths are shown as variables.
    assert f"--from $PRETRAINED/{Path(ranking['candidates'][0]['path']).name} " in printed
    assert str(tmp_path) not in printed.partition("$ export")[2].rpartition("The whole story")[0]
    for structure in ("liver", "stomach", "kidneys", "vena cava", "mean"):
        assert re.search(rf"^{structure} +\d\.\d\d\d +\d\.\d\d\d *$", printed, re.MULTILINE)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("data:image/png;base64,") == 1
    conclusion = re.search(
        r"with 3 labelled cases and 100 iterations.* Dice of (\S+) on unseen .* scratch (\d\.\d\d)", page
    )
    scores = [
        json.loads((out / f"predictions_{name}" / "summary.json").read_text()) for name in ("finetuned", "scratch")
    ]
    assert [f"{score['foreground_mean']['Dice']:.2f}" for score in scores] == [conclusion[1], conclusion[2]]
    n_commands = printed.count("\n$ stunet ") + printed.count("\n$ nnUNetv2_")
    assert len(re.findall(r"^  # \d+ s$", page, re.MULTILINE)) == n_commands == 13
    for summary in ("finetuned", "scratch"):
        assert len(json.loads((out / f"predictions_{summary}" / "summary.json").read_text())["metric_per_case"]) == 4


def _dice(*means: float) -> list[StructureDice]:
    return [StructureDice(structure, mean, mean, mean, 4) for structure, mean in zip("ab", means, strict=True)]


@pytest.mark.parametrize(
    ("tuned", "scratch", "said"),
    [
        ((0.9, 0.7), (0.5, 0.5), "Pre-training helped: with 3 labelled cases and 80 iterations, the fine-tuned network "
         "reaches a mean Dice of 0.80 on unseen cases, and the same network trained from scratch 0.50."),
        ((0.5, 0.5), (0.49, 0.5), "Pre-training made no clear difference here: "),
        ((0.5, 0.01), (0.9, 0.7), "Pre-training did harm here: "),
        ((0.5, 0.01), (0.9, math.nan), "; not learned: b (from scratch), b (fine-tuned)."),
    ],
)  # fmt: skip
def test_the_conclusion_says_what_the_figures_say(tuned: Any, scratch: Any, said: str) -> None:
    dice = {"from scratch": _dice(*scratch), "fine-tuned": _dice(*tuned)}
    assert said in conclude(dice, n_cases=3, iterations=80)


@pytest.mark.slow
def test_demo_on_data_of_ones_own(tmp_path: Path) -> None:
    data = tmp_path / "mine" / "Dataset123_Mine"
    write_phantom_dataset(data, n_training=7, n_test=0)
    edit_json(data / "dataset.json", labels=LABELS, regions_class_order=[1, 3, 4, 5])
    before = sorted(p.name for p in data.rglob("*"))

    printed = _demo(tmp_path, "--data", str(data), "--epochs", "1")
    for step in ("nnUNetv2_plan_and_preprocess", "stunet plan", "stunet train", "nnUNetv2_predict"):
        assert f"\n$ {step} " in printed
    assert "$ export nnUNet_raw=" in printed
    assert re.search(r"epoch +0 +loss +\S+ +Dice on validation patches( \d\.\d\d){4}", printed)
    for structure in LABELS:
        assert structure == "background" or re.search(rf"^{structure} +\d\.\d\d\d ", printed, re.MULTILINE)
    assert sorted(p.name for p in data.rglob("*")) == before
    out = tmp_path / "out"
    (held_out,) = (out / "predictions").glob("*.nii.gz")
    assert held_out.name in before
    assert (out / "nnUNet_results" / "Dataset001_Mine" / "STUNetTrainer_pretrain__demo__3d_fullres").is_dir()
    assert imread(out / "demo.png").shape[1] > 500
