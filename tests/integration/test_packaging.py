"""Wheel and editable install: both find trainers and presets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHECK = """
import stunet, stunet.trainers
from pathlib import Path
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from stunet.cli.env import trainers_folder
from stunet.labels import list_vocabularies, manifest_schema
from stunet.planning import list_presets
from stunet.weights import load_registry
import os
os.environ["nnUNet_extTrainer"] = str(trainers_folder())
assert list_presets() == ["small", "base", "large", "huge"], list_presets()
names = ["abdomenatlas_9", "totalsegmentator_104", "totalsegmentator_v1", "totalsegmentator_v2"]
assert list_vocabularies() == names, list_vocabularies()
assert manifest_schema()["required"] == ["version", "cases"]
assert load_registry()["small_ep4k"].outputs == 105
assert recursive_find_trainer_class_by_name("STUNetTrainer_huge_ep4k").size == "huge"
assert (Path(stunet.__file__).parent / "py.typed").is_file()
print(Path(stunet.__file__).parent, trainers_folder())
"""


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package installed into a folder of its own, without its dependencies."""
    target = tmp_path_factory.mktemp(request.param)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation"]
    if request.param == "wheel":
        # From a copy, so that the checkout gets no build folder.
        source = target / "source"
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for name in ("stunet", "trainers", "plans"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([*pip, "wheel", *options, "-w", str(target), str(source)], check=True)
        (wheel,) = target.glob("stunet-*.whl")
        subprocess.run([*pip, "install", *options, "--target", str(target / "site"), str(wheel)], check=True)
    return target / "site"


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_wheel(installed: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{CHECK}"
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert got.stdout.splitlines()[-1] == f"{installed / 'stunet'} {installed / 'stunet' / 'trainers'}"


def test_editable_install(tmp_path: Path) -> None:
    """This environment's own install, which the test command has made with ``pip install -e``."""
    got = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr
    assert got.stdout.splitlines()[-1] == f"{ROOT / 'stunet'} {ROOT / 'trainers'}"
