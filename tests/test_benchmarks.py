"""The benchmark that a person with a GPU runs, here on the CPU and tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "benchmarks" / "gpu.py"
#: Of the parts that differ in an option alone, one.
PARTS = [
    "loss, 3 outputs", "memory, small", "compiled step, small", "prediction", "input pipeline", "sharded step",
]  # fmt: skip


@pytest.mark.parametrize("wanted", [PARTS[:1], pytest.param(PARTS, marks=pytest.mark.slow)], ids=["loss", "all"])
def test_all_figures_of_a_gpu_by_one_command(wanted: list[str], tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--output", output, "--parts", *wanted]
    done = subprocess.run([sys.executable, GPU, *arguments], check=True, capture_output=True, text=True)
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == wanted
    assert {name: part["failed"] for name, part in parts.items() if "failed" in part} == {}
    shown = {line[:26].strip() for line in done.stdout.splitlines()}
    assert shown == set(wanted)


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--minutes", "0", "--output", output, "--parts", "loss", "memory"]
    subprocess.run([sys.executable, GPU, *arguments], check=True, capture_output=True)
    assert [part["failed"] for part in json.loads(output.read_text())["parts"].values()] == ["out of time"] * 2
