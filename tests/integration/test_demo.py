"""The demo from its command to its figure, shortened, on a dataset of the user's with overlapping regions."""

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


def test_demo_on_data_of_ones_own(tmp_path: Path) -> None:
    data = tmp_path / "mine" / "Dataset123_Mine"
    write_phantom_dataset(data, n_training=7, n_test=0)
    content = json.loads((data / "dataset.json").read_text())
    changed = {**content, "labels": LABELS, "regions_class_order": [1, 3, 4, 5]}
    (data / "dataset.json").write_text(json.dumps(changed))
    before = sorted(p.name for p in data.rglob("*"))

    command = [str(Path(sys.executable).with_name("stunet")), "demo", "--data", str(data), "--epochs", "1", "-o", "out"]
    # A variable of the user's that would send the run to a service on the network.
    environment = {**os.environ, "nnUNet_wandb_enabled": "1", "nnUNet_raw": "/nowhere", "COLUMNS": "150"}
    got = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-2000:]

    for step in ("nnUNetv2_plan_and_preprocess", "stunet plan", "nnUNetv2_train", "nnUNetv2_predict"):
        assert f"\n$ {step} " in got.stdout
    assert "$ export nnUNet_raw=" in got.stdout
    assert re.search(r"epoch +0 +loss +\S+ +Dice on validation patches( \d\.\d\d){4}", got.stdout)
    for structure in LABELS:
        assert structure == "background" or re.search(rf"│ {structure} +│ \d\.\d\d\d ", got.stdout)
    assert sorted(p.name for p in data.rglob("*")) == before
    out = tmp_path / "out"
    (held_out,) = (out / "predictions").glob("*.nii.gz")
    assert held_out.name in before
    assert (
        out / "nnUNet_results" / "Dataset001_Mine" / "STUNetTrainer_pretrain__STUNetPlans_demo__3d_fullres"
    ).is_dir()
    assert imread(out / "demo.png").shape[1] > 500
