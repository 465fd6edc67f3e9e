"""The command line as it is typed, in processes of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weights import TINY, tiny_weights, write_v1

import stunet
from plans import DATASET_JSON, make_plans
from stunet.cli.console import human_bytes, human_count
from stunet.cli.env import trainers_folder
from stunet.cli.main import main
from stunet.memory import USABLE_SHARE, estimate
from stunet.network import STUNetSize
from stunet.settings import parse_settings

STUNET = str(Path(sys.executable).with_name("stunet"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line's entry point in this process, which saves its imports."""

    def run_here(*args: str, **environment: str) -> SimpleNamespace:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "SHELL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"COLUMNS": "200", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["stunet", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=int(caught.value.code or 0), stdout=printed.out, stderr=printed.err)

    return run_here


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    for name in names:
        (tmp_path / name).mkdir()
    dataset = tmp_path / "nnUNet_preprocessed" / "Dataset001_Test"
    dataset.mkdir()
    (dataset / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    return {name: str(tmp_path / name) for name in names}


def plans_in(folders: dict[str, str], name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((Path(folders["nnUNet_preprocessed"]) / "Dataset001_Test" / f"{name}.json").read_text())


@pytest.mark.parametrize("command", [[STUNET], [sys.executable, "-m", "stunet"]])
def test_version(command: list[str]) -> None:
    got = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert got.stdout == f"stunet {stunet.__version__}\n"


def test_env_can_be_evaluated_by_bash(tmp_path: Path) -> None:
    script = f'eval "$({STUNET} env)"; eval "$({STUNET} env)"; printf %s "$nnUNet_extTrainer"'
    got = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={"nnUNet_extTrainer": "/a b"},
                         check=True)  # fmt: skip
    assert got.stdout == f"{trainers_folder()}:/a b"


@pytest.mark.parametrize(
    ("args", "environment", "expected"),
    [
        ((), {}, "export nnUNet_extTrainer={}"),
        ((), {"SHELL": "/usr/bin/fish"}, "export nnUNet_extTrainer={}"),
        (("--shell", "fish"), {}, "set -gx nnUNet_extTrainer '{}'"),
        (("--shell", "powershell"), {}, "$env:nnUNet_extTrainer = '{}'"),
    ],
)
def test_env_speaks_three_shells(args: tuple[str, ...], environment: dict[str, str], expected: str, run: Any) -> None:
    assert run("env", *args, **environment).stdout.strip() == expected.format(trainers_folder())


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_env_can_be_evaluated_by_fish() -> None:
    for command in (f"{STUNET} env --shell fish | source", f'eval "$({STUNET} env)"'):
        script = f'{command}; printf %s "$nnUNet_extTrainer"'
        got = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True)
        assert got.stdout == str(trainers_folder())


def test_info_as_table_and_json(run: Any) -> None:
    table = run("info", "--size", "small", "base", "--patch", "32,32,64", "--classes", "105").stdout
    assert "14.6M" in table
    assert "58.3M" in table
    assert "large" not in table
    got = json.loads(run("info", "--size", "small", "--patch", "32x32x64", "--classes", "105", "--json").stdout)
    assert got["settings"]["patch_size"] == [32, 32, 64]
    (row,) = got["sizes"]
    assert row["parameters"] == 14_596_941
    assert row["training_bytes"] > row["inference_bytes"] > 4 * row["parameters"] * 1.4
    custom = json.loads(run("info", "--width", "2", "--depth", "1,1,2,2,2,2", "--patch", "32,32", "--json").stdout)
    assert custom["sizes"][0]["name"] == "d112222w2"


def test_info_recommends_settings_for_a_gpu(run: Any) -> None:
    settings = {"fused_optimizer": True, "gradient_accumulation": 2}
    kwargs: dict[str, Any] = {"patch_size": (32, 32, 32), "batch_size": 4, "num_classes": 3, "precision": "amp"}
    needed = estimate(STUNetSize("tiny", (1,) * 6, 4), **kwargs, **settings).training_bytes
    typed = ["info", "--width", "4", "--depth", "1,1,1,1,1,1", "--patch", "32,32,32", "--batch", "4", "--classes", "3"]
    gpu = f"{needed / USABLE_SHARE / 1024 + 1:.0f}k"
    (row,) = json.loads(run(*typed, "--gpu", gpu, "--json").stdout)["sizes"]
    assert row["recommendation"]["fits"]
    assert row["recommendation"]["settings"] == settings
    assert row["recommendation"]["training_bytes"] == needed < row["training_bytes"]
    said = run(*typed, "--gpu", gpu).stdout
    assert parse_settings(said.partition("--set ")[2].partition("  (")[0].split()) == settings
    too_small = run(*typed, "--batch", "1", "--gpu", "1MB").stdout
    assert re.search(r"does not fit, [\d.]+ \w+ too little even with --set .*\(needs .*, 921.6 kB usable\)", too_small)
    assert f"{'d111111w4'} on 24.0 GB: none needed  (" in run(*typed, "--gpu", "24GB").stdout


def test_info_says_where_the_strides_change_and_fits_80_columns(run: Any) -> None:
    """100 is halved twice, to 25; 96 and 112 can be halved four times."""
    odd = run("info", "--size", "small", "--patch", "100,100,100", COLUMNS="80")
    text = " ".join(odd.stdout.split())
    assert "warning: 100 voxels are not divisible by 16, so this axis is halved to 25 and no further" in text
    assert "a patch of 96 or 112 takes" in text
    assert max(map(len, odd.stdout.splitlines())) <= 80
    (row,) = [line for line in odd.stdout.splitlines() if "small" in line]
    assert "16 to 256" in row
    assert "14.6M" in row
    shown = {}
    for patch in ("100,100,100", "96,96,96", "112,160,128", "64,64,8"):
        for json_too in ((), ("--json",)):
            shown[patch, bool(json_too)] = run("info", "--width", "2", "--patch", patch, *json_too).stdout
    assert [patch for patch, as_json in shown if "warning" in shown[patch, as_json]] == ["100,100,100"]
    strides = json.loads(shown["100,100,100", True])["settings"]["strides"]
    assert strides == [[1] * 3, [2] * 3, [2] * 3, [1] * 3, [1] * 3, [1] * 3]


def test_plan_writes_and_says_what_to_do_next(folders: dict[str, str], run: Any) -> None:
    got = run("plan", "-d", "1", "--size", "small", "--set", "num_epochs=3", "initial_lr=0.1", **folders)
    assert got.returncode == 0, got.stderr
    written = plans_in(folders, "STUNetPlans_small")
    assert written["plans_name"] == "STUNetPlans_small"
    assert all(
        written["configurations"][c]["stunet"] == {"num_epochs": 3, "initial_lr": 0.1} for c in ("2d", "3d_fullres")
    )
    assert "nnUNetv2_train 1 3d_fullres 0 -p STUNetPlans_small -tr STUNetTrainer" in got.stdout
    assert "nnU-Net's own trainer" not in got.stdout  # it would pass over the settings
    assert "nnUNetv2_preprocess -d 1 -plans_name STUNetPlans_small -c 3d_fullres" in got.stdout
    again = run("plan", "-d", "1", "--size", "small", "--set", "num_epochs=3", "--set", "initial_lr=0.1", **folders)
    assert again.returncode == 0
    assert "unchanged" in again.stdout


def test_plan_from_published_weights(folders: dict[str, str], tmp_path: Path, run: Any) -> None:
    dataset = Path(folders["nnUNet_preprocessed"]) / "Dataset001_Test"
    labels = {"background": 0, "Left Kidney": 1, "lesion": 2}
    (dataset / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": labels}))
    weights = write_v1(tmp_path, tiny_weights(num_classes=105), None)
    got = run("plan", "-d", "1", "--from", str(weights), "--strategy", "layerwise", "--set", "stem=first", **folders)
    assert got.returncode == 0, got.stderr
    assert "Left Kidney from kidney_left" in got.stdout
    configurations = plans_in(folders, f"STUNetPlans_{TINY.name}_ft_layerwise")["configurations"]
    assert configurations["3d_fullres"]["stunet"] == {
        "pretrained_weights": str(weights), "fine_tune": "layerwise", "initial_lr": 1e-3, "stem": "first",
    }  # fmt: skip
    assert configurations["3d_lowres"]["architecture"]["arch_kwargs"]["features_per_stage"] == list(TINY.features)
    assert "stunet" not in configurations["2d"]


def test_plan_with_the_pretraining_recipe(folders: dict[str, str], run: Any) -> None:
    got = run("plan", "-d", "1", "--preset", "totalsegmentator", "--size", "small", "--set", "num_epochs=5", **folders)
    assert got.returncode == 0, got.stderr
    plans = plans_in(folders, "STUNetPlans_small_totalsegmentator")
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["spacing"]) == ([128] * 3, [1.5] * 3)
    assert configuration["stunet"]["num_epochs"] == 5
    assert configuration["stunet"]["nearest_labels"] is True
    assert "nnUNetv2_preprocess -d 1 -plans_name STUNetPlans_small_totalsegmentator -c 3d_fullres" in got.stdout
    assert "-p STUNetPlans_small_totalsegmentator -tr STUNetTrainer_small_pretrain\n" in got.stdout
    wrong = run("plan", "-d", "1", "--preset", "totalsegmentator", "--name", "x", "-c", "2d", **folders)
    assert wrong.returncode == 2
    assert "unknown configuration" in wrong.stderr


def test_plan_of_ones_own_size_for_some_configurations(folders: dict[str, str], run: Any) -> None:
    args = ("plan", "-d", "Dataset001_Test", "-c", "2d", "3d_lowres", "--depth", "1,1,2,2,2,2", "--width", "24")
    assert run(*args, **folders).returncode == 0
    configurations = plans_in(folders, "STUNetPlans_d112222w24")["configurations"]
    kwargs = configurations["3d_lowres"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [24, 48, 96, 192, 384, 384]
    assert kwargs["n_blocks_per_stage"] == [1, 1, 2, 2, 2, 2]
    assert configurations["3d_fullres"] == make_plans()["configurations"]["3d_fullres"]


def test_plan_replaces_what_differs_only_when_asked(folders: dict[str, str], run: Any) -> None:
    assert run("plan", "-d", "1", "--set=num_epochs=3", "save_every=2", **folders).returncode == 0
    first = plans_in(folders, "STUNetPlans_base")
    assert first["configurations"]["2d"]["stunet"] == {"num_epochs": 3, "save_every": 2}
    got = run("plan", "-d", "1", **folders)
    assert got.returncode == 2
    assert "--overwrite" in got.stderr
    assert plans_in(folders, "STUNetPlans_base") == first
    assert run("plan", "-d", "1", "--overwrite", **folders).returncode == 0
    assert "stunet" not in plans_in(folders, "STUNetPlans_base")["configurations"]["2d"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--size", "base", "--width", "8"), "--size base --width 8"),
        (("--size", "giant"), "giant"),
        (("--patch", "1,1,1"), "1"),
        (("--patch", "100000000,100000000,100000000", "--size", "small"), "100000000"),
        (("--patch", "a"), "impossible patch"),
        (("--patch", "64"), "impossible patch"),
        (("--size", "small", "--patch", "32,32,32", "--ranks", "4"), "4"),
        (("--size", "small", "--patch", "32,32,32", "--gpu", "large"), "--gpu"),
    ],
)
def test_bad_input_to_info(args: tuple[str, ...], expected: str, run: Any) -> None:
    got = run("info", *args)
    assert got.returncode == 2
    assert expected in got.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--size", "giant"), ("giant", "small, base, large, huge")),
        (("--size", "small", "--width", "8"), ("--size small --width 8",)),
        (("--from", "small_ep4"), ("unknown weights", "Did you mean small_ep4k", "stunet list")),
        (("--width", "0"), ("width", "0")),
        (("--width", "-8"), ("width", "-8")),
        (("--depth", "1,1,0,1,1,1"), ("depth",)),
        (("--depth", "1,1"), ("depth", "1, 1")),
        (("--depth", "a"), ("depth",)),
        (("--set", "epochs=3"), ("epochs", "num_epochs")),
        (("--set", "num_epochs=0"), ("num_epochs", "0")),
        (("--set", "patch_size=[40,56,42]", "-c", "3d_fullres"), ("8, 8, 8",)),
        (("--plans", "otherPlans"), ("otherPlans",)),
        (("-c", "4d"), ("4d", "2d, 3d_lowres, 3d_fullres")),
        (("-d", "9"), ("9", "Dataset001_Test")),
        (("--name", "nnUNetPlans"), ("another name than nnUNetPlans",)),
        (("--name", "nnUNetPlans", "--overwrite"), ("another name than nnUNetPlans",)),
        (("--name", "../evil"), ("../evil",)),
        (("--set", "patch_size=[64,64,64]"), ("2d",)),
    ],
)
def test_bad_input_is_explained(
    folders: dict[str, str], args: tuple[str, ...], expected: tuple[str, ...], run: Any
) -> None:
    before = plans_in(folders, "nnUNetPlans")
    command = ("plan", *(() if "-d" in args else ("-d", "1")), *args)
    got = run(*command, **folders)
    assert got.returncode == 2
    assert got.stderr.startswith("error:")
    for part in expected:
        assert part in got.stderr
    assert plans_in(folders, "nnUNetPlans") == before
    assert len(list(Path(folders["nnUNet_preprocessed"], "Dataset001_Test").iterdir())) == 1


def test_missing_variables_are_named_with_the_line_that_sets_them(run: Any) -> None:
    got = run("plan", "-d", "1")
    assert got.returncode == 2
    assert got.stderr.startswith("error: ")
    assert "export nnUNet_preprocessed=" in got.stderr
    assert "Traceback" not in got.stderr


@pytest.mark.parametrize("content", ["{", '{"plans_per_stage": {}}', "[]"])
def test_broken_plans(folders: dict[str, str], content: str, run: Any) -> None:
    (Path(folders["nnUNet_preprocessed"]) / "Dataset001_Test" / "nnUNetPlans.json").write_text(content)
    got = run("plan", "-d", "1", **folders)
    assert got.returncode == 2
    assert "nnUNetv2_plan_experiment" in got.stderr


def test_demo_refuses_a_folder_in_use_and_data_that_is_none(tmp_path: Path, run: Any) -> None:
    (tmp_path / "precious.txt").touch()
    used, new = ("-o", str(tmp_path)), ("-o", str(tmp_path / "new"))
    for args, expected in (
        (used, "in use"),
        ((*new, "--data", str(tmp_path)), "raw dataset"),
        ((*new, "--size", "giant"), "small, base, large, huge"),
        ((*new, "--device", "mps"), "a device that PyTorch does not find"),
        ((*new, "--data", str(tmp_path / "nowhere")), "nowhere"),
    ):
        got = run("demo", *args)
        assert got.returncode == 2
        assert expected in got.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_numbers_for_people() -> None:
    assert [human_bytes(n) for n in (0, 512, 1536, 5 * 2**30)] == ["0 B", "512 B", "1.5 kB", "5.0 GB"]
    assert [human_count(n) for n in (7, 14_596_941, 440_302_605, 12.6e12)] == ["7", "14.6M", "440M", "12.6T"]
