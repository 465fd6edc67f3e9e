"""Wheel and editable install: both find trainers and presets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

CHECK = """
import stunet, stunet.trainers
from pathlib import Path
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from stunet.cli.env import trainers_folder
from stunet.labels.labels import list_vocabularies
from stunet.planning.plans import load_preset
from stunet.weights.published import load_registry
import os
os.environ["nnUNet_extTrainer"] = str(trainers_folder())
assert [load_preset(size)["size"] for size in ("small", "base", "large", "huge")]
names = ["abdomenatlas_9", "totalsegmentator_104", "totalsegmentator_v1", "totalsegmentator_v2"]
assert list_vocabularies() == names, list_vocabularies()
assert (Path(stunet.__file__).parent / "labels/schemas/annotated_labels.schema.json").is_file()
assert load_registry()["small_ep4k"].outputs == 105
assert recursive_find_trainer_class_by_name("STUNetTrainer_huge_ep4k").size == "huge"
assert (Path(stunet.__file__).parent / "py.typed").is_file()
print(Path(stunet.__file__).parent, trainers_folder())
"""


def check(code: str, folder: Path, package: Path, trainers: Path) -> None:
    """Run the check in a process of its own, whose package must lie in this folder."""
    got = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr
    assert got.stdout.splitlines()[-1] == f"{package} {trainers}"


def test_wheel(tmp_path: Path) -> None:
    """A wheel, installed into a folder of its own without its dependencies."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # From a copy, so that the checkout gets no build folder.
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stunet", "trainers", "plans"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", "--target", site, source], check=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{CHECK}"
    check(code, tmp_path, site / "stunet", site / "stunet" / "trainers")


def test_editable_install(tmp_path: Path) -> None:
    """This environment's own install, which the test command has made with ``pip install -e``."""
    check(CHECK, tmp_path, ROOT / "stunet", ROOT / "trainers")
