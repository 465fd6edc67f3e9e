"""What all commands share: help, examples, completion, quick refusals, devices, and tables of 80 columns."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnunetv2.run.run_training
import numpy as np
import pytest
import torch
import typer
from made_trainers import make
from test_cli import STUNET

import stunet.training.distributed
from stunet.cli.main import app, main
from stunet.cli.options import choose_device
from stunet.errors import UsageError
from stunet.labels.labels import load_vocabulary
from stunet.settings import SETTINGS
from stunet.weights.published import load_registry


def _commands(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from _commands(child, *names, name)
    else:
        yield " ".join(names), command


ROOT: Any = typer.main.get_command(app)
COMMANDS = dict(_commands(ROOT))


def _typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Status and output of a command, in this process and in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["stunet", *args])
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_flags_without_a_type_and_ends_with_examples_that_parse(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _typed(monkeypatch, capsys, *name.split(), "--help")
    assert status == 0
    assert "bool" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert [p.name for p in COMMANDS[name].params if not p.help and not getattr(p, "hidden", False)] == []
    shown = out.partition("Example")[2]
    lines = [line[2:] for line in COMMANDS[name].epilog.splitlines() if line.startswith("$ ")]
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert f"$ {line}" in shown
        line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
        program, *words = shlex.split(line.partition(" > ")[0])
        assert program == "stunet"
        assert " ".join(words).startswith(name)
        context = ROOT.make_context("stunet", words)  # refuses what does not parse
        command, args = ROOT, words
        while hasattr(command, "commands"):
            command, args = command.commands[args[0]], args[1:]
        command.make_context(name, args, parent=context)


def test_a_wrong_example_would_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["info"].make_context("info", ["--nope"])


def test_completion_in_bash() -> None:
    """As bash calls it: it splits words at ``=``."""
    script = f"""
        eval "$(_STUNET_COMPLETE=source_bash {STUNET})"
        complete_line() {{
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _stunet_completion {STUNET}; echo ${{COMPREPLY[@]}}
        }}
        complete_line stunet plan --size ""
        complete_line stunet plan --set num_epochs = 3 mirroring = n
    """
    got = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert got.stdout.splitlines() == ["small base large huge", "no-left-right none"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_completion_in_fish() -> None:
    script = f"_STUNET_COMPLETE=source_fish {STUNET} | source; complete --do-complete 'stunet finetune --from sm'"
    environment = {"PATH": f"{Path(STUNET).parent}:/usr/bin:/bin", "HOME": "/nonexistent"}
    got = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert [line.split("\t")[0] for line in got.stdout.splitlines()] == ["small_ep4k"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("plan --set ", [f"{name}=" for name in SETTINGS]),
        ("plan --set num_epochs=3 ini", ["initial_lr="]),
        ("plan --set fused", ["fused_optimizer=true", "fused_optimizer=false"]),
        ("plan --preset ", ["totalsegmentator"]),
        ("info --size small ba", ["base"]),
        ("finetune --strategy w", ["warmup"]),
        ("finetune -device ", ["auto", "cuda", "mps", "cpu"]),
        ("rank --checkpoints base_ep4k small", ["small_ep4k"]),
        ("convert abdomenatlas_l", ["abdomenatlas_large_ep2k"]),
        ("weights fetch ", list(load_registry())),
        ("evaluate --label-map bt", ["btcv", "btcv_cervix"]),
        ("convert --to p", ["published"]),
        ("finetune --cont", ["--continue"]),
    ],
)
def test_values_are_completed(
    line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stunet", *line.split(" ")]
    for name, value in (("COMP_WORDS", "\n".join(words)), ("COMP_CWORD", str(len(words) - 1))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_STUNET_COMPLETE", "complete_bash")
    status, out, _ = _typed(monkeypatch, capsys)
    assert status == 0
    assert out.split() == expected


WRONG = [
    ("finetune --nope", "No such option"),
    ("finetune", "Missing option"),
    ("finetune -d 1 --from x --strategy zzz", "'zzz' is not one of"),
    ("finetune -d 1 --from x --set epochs=3", "num_epochs"),
    ("finetune -d 9 --from x", "Dataset001_Here"),
    ("train 1 3d_fullres x", "'x' is neither the number of a fold nor all"),
    ("train 1 3d_fullres 0 --c --val", "--val"),
    ("plan -d 1 --size giant", "small, base, large, huge"),
    ("plan -d 1 --set num_epochs=0", "num_epochs"),
    ("plan -d 1 --width 0", "width"),
    ("plan -d 1 --preset small", "choose one of totalsegmentator"),
    ("plan -d 9", "Dataset001_Here"),
    ("info --size giant", "small, base, large, huge"),
    ("info --precision fp8", "'fp8' is not one of"),
    ("info --activation-checkpointing some", "'some' is not one of"),
    ("info --patch a", "impossible patch"),
    ("rank -d 1 -device tpu", "'tpu' is not one of"),
    ("predict -i a -o b -device tpu", "'tpu' is not one of"),
    ("demo --device tpu", "'tpu' is not one of"),
    ("evaluate -d 1 --device tpu", "'tpu' is not one of"),
    ("evaluate -d 1 --split val", "'val' is not one of"),
    ("evaluate -d 1", "--predictions"),
    ("labels check -d 9", "Dataset001_Here"),
    ("import union -d 9 --from 7 8", "Dataset001_Here"),
    ("weights fetch nope", "nope"),
    ("convert x -o {here}", "an output that exists"),
    ("convert x -o y --to onnx", "'onnx' is not one of"),
]


def test_usage_errors_come_before_pytorch_is_imported(tmp_path: Path) -> None:
    """In one process, where importing PyTorch or nnU-Net ends it."""
    for name in ("torch", "nnunetv2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name / "Dataset001_Here").mkdir(parents=True)
    script = """
        import contextlib, io, json, sys
        from stunet.cli.main import main
        assert not {"numpy", "nibabel", "torch", "nnunetv2"} & set(sys.modules)
        for line in json.load(sys.stdin):
            sys.argv, err = ["stunet", *line.split()], io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
                try:
                    main()
                except SystemExit as stop:
                    print(json.dumps([stop.code, " ".join(err.getvalue().replace("│", " ").split())]))
        assert not {"torch", "nnunetv2"} & set(sys.modules)
    """
    lines = [line.format(here=tmp_path) for line, _ in WRONG]
    got = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())], text=True, capture_output=True,
        input=json.dumps(lines), check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "COLUMNS": "200", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
             **{name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}},
    )  # fmt: skip
    results = [json.loads(line) for line in got.stdout.splitlines()]
    assert len(results) == len(WRONG)
    for (line, expected), (status, message) in zip(WRONG, results, strict=True):
        assert (line, status) == (line, 2), message
        assert expected in message, line


@pytest.mark.parametrize(
    ("found", "expected"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")]
)
def test_the_device_is_cuda_then_mps_then_cpu(
    found: tuple[bool, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: found[1])
    assert choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"
    for name, there in zip(("cuda", "mps"), found, strict=True):
        if there:
            assert choose_device(name) == name
        else:
            with pytest.raises(UsageError, match="PyTorch does not find"):
                choose_device(name)


def test_every_command_that_computes_has_the_same_device_option() -> None:
    options = {
        name: parameter
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name == "device"
    }
    assert set(options) == {"train", "finetune", "predict", "rank", "evaluate", "demo", "study plan", "study run"}
    for option in options.values():
        assert option.default == "auto"
        assert set(option.opts) == {"-device", "--device"}


@pytest.mark.parametrize("name", ["train", "finetune", "predict"])
def test_both_spellings_continue(name: str) -> None:
    assert any({"--c", "--continue"} <= set(parameter.opts) for parameter in COMMANDS[name].params)


@pytest.mark.parametrize(("typed", "device", "goes_on"), [((), "cpu", False), (("--continue",), "cpu", True),
                                                          (("--c", "-device", "cpu"), "cpu", True)])  # fmt: skip
def test_train_gives_nnunet_the_chosen_device(
    typed: tuple[str, ...], device: str, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[tuple[Any, ...]] = []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        raise UsageError("far enough")

    monkeypatch.setattr(nnunetv2.run.run_training, "get_trainer_from_args", stop)
    monkeypatch.setattr(stunet.training.distributed, "_use_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("stunet.cli.train.preflight", lambda *_: "Dataset004_Here")
    monkeypatch.setattr("stunet.cli.train.check_training", lambda *_: None)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert _typed(monkeypatch, capsys, "train", "4", "3d_fullres", "0", *typed)[0] == 2
    assert [(str(call[-1]), call[-2]) for call in calls] == [(device, goes_on)]


def test_settings_are_listed_with_their_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _typed(monkeypatch, capsys, "plan", "--list-settings")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line and not line.startswith(" ")}
    assert set(SETTINGS) <= set(rows)
    assert rows["num_epochs"][0] == "1000"
    assert rows["momentum_dtype"][0] == "fp32"
    assert out.count("STUNetTrainer") == 1


def test_the_defaults_are_the_trainers_own(dataset: Path) -> None:
    trainer = make()
    ours = {name: setting.default for name, setting in SETTINGS.items() if setting.place == "training"}
    settings = {"mirroring", "nearest_labels", "allow_unannotated", "parallel", "gradient_accumulation"}
    found = {name: getattr(trainer, name) for name in ours if name not in settings or hasattr(trainer, name)}
    assert found == {name: ours[name] for name in found}
    assert set(ours) - set(found) == set()


def test_tables_keep_names_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import SimpleITK as sitk

    structures = list(load_vocabulary("totalsegmentator_104").labels)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    name = "Dataset101_TotalSegmentatorTrainingCases"
    for dataset, labels in ((name, structures), ("Dataset004_Abdomen", ["background", "kidney", "spleen"])):
        for folder in ("imagesTr", "labelsTr"):
            (tmp_path / dataset / folder).mkdir(parents=True)
        volume = np.resize(np.arange(len(labels), dtype=np.uint8), (4, 8, 8))
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / dataset / "labelsTr" / "a.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(volume * 1.0), str(tmp_path / dataset / "imagesTr" / "a_0000.nii.gz"))
        content = {"channel_names": {"0": "CT"}, "labels": {label: i for i, label in enumerate(labels)},
                   "numTraining": 1, "file_ending": ".nii.gz"}  # fmt: skip
        (tmp_path / dataset / "dataset.json").write_text(json.dumps(content))
    shutil.copytree(tmp_path / name / "labelsTr", tmp_path / "predictions")
    shutil.copy(tmp_path / name / "dataset.json", tmp_path / "predictions")
    monkeypatch.chdir(tmp_path)
    for line, names in (
        ("weights list", list(load_registry())),
        ("labels check -d 101 -np 1", structures[1:]),
        ("import union -d 110 --from 101 4 --dry-run", [*structures[1:], name, "50.0%"]),
        ("evaluate -d 101 --predictions predictions -np 1", structures[1:]),
    ):
        status, out, err = _typed(monkeypatch, capsys, *line.split())
        assert status == 0, err
        rows = (err if "union" in line else out).splitlines()
        table = [row for row in rows if not row.endswith(".") and not row.startswith(("Next:", "Wrote"))]
        assert max(map(len, table)) <= 80, line
        words = {word for row in table for word in row.split()}
        assert set(names) <= words, line
