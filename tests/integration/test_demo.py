"""The demo from its command to its page, shortened: its story, and on a dataset of the user's with regions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

from stunet.datasets import write_phantom_dataset

LABELS = {"background": 0, "soft organs": [1, 2, 3], "kidneys": [3], "spine": [4], "aorta": [5]}


def _demo(tmp_path: Path, *options: str) -> str:
    command = [str(Path(sys.executable).with_name("stunet")), "demo", *options, "-o", "out"]
    # A variable of the user's that would send the run to a service on the network.
    environment = {**os.environ, "nnUNet_wandb_enabled": "1", "nnUNet_raw": "/nowhere", "COLUMNS": "150"}
    got = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-2000:]
    return got.stdout


def test_demo_tells_the_story(tmp_path: Path) -> None:
    printed = _demo(tmp_path, "--epochs", "2")
    steps = [
        "stunet import totalsegmentator", "stunet labels check", "nnUNetv2_plan_and_preprocess", "stunet plan",
        "nnUNetv2_train 1", "nnUNetv2_plan_and_preprocess", "stunet rank", "stunet finetune", "stunet plan",
        "nnUNetv2_train 2", "nnUNetv2_predict", "nnUNetv2_evaluate_folder", "nnUNetv2_predict",
    ]  # fmt: skip
    position = 0
    for step in steps:
        position = printed.index(f"\n$ {step} ", position) + 1
    out = tmp_path / "out"
    ranking = json.loads((out / "ranking" / "ranking.json").read_text())
    assert {candidate["name"] for candidate in ranking["candidates"]} == {"checkpoint_epoch_0001", "checkpoint_final"}
    assert f"--from {ranking['candidates'][0]['path']}" in printed  # the winner is what is fine-tuned
    for structure in ("stomach", "kidneys", "vena cava", "mean"):
        assert re.search(rf"│ {structure} +│ \d\.\d\d\d +│ \d\.\d\d\d ", printed)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("data:image/png;base64,") == 1
    n_commands = printed.count("\n$ ") - printed.count("\n$ export ")
    assert len(re.findall(r"^  # \d+ s$", page, re.MULTILINE)) == n_commands == 14
    for summary in ("finetuned", "scratch"):
        scores = json.loads((out / f"predictions_{summary}" / "summary.json").read_text())
        assert len(scores["metric_per_case"]) == 4


def test_demo_on_data_of_ones_own(tmp_path: Path) -> None:
    data = tmp_path / "mine" / "Dataset123_Mine"
    write_phantom_dataset(data, n_training=7, n_test=0)
    content = json.loads((data / "dataset.json").read_text())
    changed = {**content, "labels": LABELS, "regions_class_order": [1, 3, 4, 5]}
    (data / "dataset.json").write_text(json.dumps(changed))
    before = sorted(p.name for p in data.rglob("*"))

    printed = _demo(tmp_path, "--data", str(data), "--epochs", "1")
    for step in ("nnUNetv2_plan_and_preprocess", "stunet plan", "nnUNetv2_train", "nnUNetv2_predict"):
        assert f"\n$ {step} " in printed
    assert "$ export nnUNet_raw=" in printed
    assert re.search(r"epoch +0 +loss +\S+ +Dice on validation patches( \d\.\d\d){4}", printed)
    for structure in LABELS:
        assert structure == "background" or re.search(rf"│ {structure} +│ \d\.\d\d\d ", printed)
    assert sorted(p.name for p in data.rglob("*")) == before
    out = tmp_path / "out"
    (held_out,) = (out / "predictions").glob("*.nii.gz")
    assert held_out.name in before
    assert (
        out / "nnUNet_results" / "Dataset001_Mine" / "STUNetTrainer_pretrain__STUNetPlans_demo__3d_fullres"
    ).is_dir()
    assert imread(out / "demo.png").shape[1] > 500
