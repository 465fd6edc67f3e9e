"""``stunet study`` as it is typed: planned, killed, resumed, shared between two processes, submitted, reported."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ARTERIAL, TRAINED, VENOUS
from filelock import FileLock
from integration.commands import Shell

from stunet.study.definition import Study

SETTINGS = "num_epochs: 3, num_iterations_per_epoch: 1, num_val_iterations_per_epoch: 1, save_every: 1"
STUDY = """
targets: [{dataset: 2, cases: [2], test: 2}]
candidates:
  - {name: scratch, depth: [1, 1, 1, 1, 1, 1], width: 4}
  - {name: trained, path: TRAINED, strategies: [full, head-only], facts: {training cases: 4}}
seeds: 1
settings: {SETTINGS, batch_size: 2, patch_size: [16, 32, 32], mirroring: none}
metrics: [ccfv, logme]
"""


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = trained.copy(tmp_path_factory.mktemp("study"))
    fold = shell.model(VENOUS, TRAINED) / "fold_0"
    text = STUDY.replace("TRAINED", str(fold / "checkpoint_final.pth")).replace("SETTINGS", SETTINGS)
    (shell.root / "study.yaml").write_text(text)
    return shell


def results(shell: Shell, folder: str = "S") -> dict[str, Any]:
    study = Study(shell.root / folder)
    paths = {cell.name: study.result(cell) for cell in study.cells}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


@pytest.mark.slow
def test_a_study_is_killed_resumed_and_reported(shell: Shell) -> None:
    before = (shell.preprocessed / ARTERIAL / "splits_final.json").exists()
    said = shell.run("stunet study plan study.yaml -o S -device cpu")
    assert "Trainings: 3; rankings: 1; done: 0" in said
    assert (shell.preprocessed / ARTERIAL / "splits_final.json").exists() == before  # the user's dataset is left alone
    assert "; done: 0" in shell.run("stunet study plan study.yaml -o S -device cpu")
    study = Study(shell.root / "S")
    (target,) = study.targets
    assert len(target.test) == 2
    (fold,) = target.folds
    assert len(fold["train"]) == 2
    assert not set(fold["train"]) & set(target.test)

    # Stopped, and then killed, within a training: that cell alone is done again, from its checkpoint.
    first = study.result(study.trainings[0]).with_suffix(".log")
    latest = shell.root / "S" / "nnUNet_results"
    run = "stunet study run S -device cpu"
    shell.type_and_kill(run, lambda log: any(latest.rglob("checkpoint_latest.pth")) and first.is_file(), signal.SIGINT)
    shell.type_and_kill(run, lambda log: "--c\n" in first.read_text())
    done = results(shell)
    assert len(done) < 4
    assert {content["status"] for content in done.values()} == {"done"}  # to be stopped is not to fail
    held = study.result(study.trainings[-1])
    with FileLock(held.with_suffix(".lock")):  # as a process of another machine holds it
        said = shell.type("stunet study run S -device cpu --jobs 2 & stunet study run S -device cpu; wait")
    assert f"{study.trainings[-1].name} in work elsewhere" in said
    assert not held.exists()
    assert "about 0.0 hours left" in shell.type("stunet study run S -device cpu")
    now = results(shell)
    assert len(now) == 4
    assert {content["status"] for content in now.values()} == {"done"}
    assert {path: now[path] for path in done} == done  # none is done twice
    logs = [study.result(cell).with_suffix(".log").read_text() for cell in study.trainings]
    assert [log.count("Training done.") for log in logs] == [1] * 3  # by one of the two processes
    commands = [line for line in first.read_text().splitlines() if line.startswith("$ stunet train")]
    assert commands[-1].endswith("--c")
    assert not list(latest.rglob("checkpoint_*.pth"))  # as keep_checkpoints is off
    ranked = json.loads((study.result(study.rankings[0]).with_suffix("") / "ranking.json").read_text())
    plans = shell.root / "S" / "nnUNet_preprocessed" / ARTERIAL / f"{ranked['target']['plans']}.json"
    assert json.loads(plans.read_text())["configurations"]["3d_fullres"]["patch_size"] == [16, 32, 32]  # as trained

    shell.run("stunet study report S")
    report = json.loads((shell.root / "S" / "results.json").read_text())
    assert report["progress"]["done"] == 3
    assert {row["candidate"] for row in report["summary"]} == {"trained"}
    page = (shell.root / "S" / "index.html").read_text()
    assert "trained, head-only" in page
    assert "<script" not in page
    lines = (shell.root / "S" / "cells.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2
    (row,) = [r for r in report["rows"] if (r["candidate"], r["strategy"]) == ("trained", "full")]
    of_cases = [float(line.split(",")[6]) for line in lines[1:] if line.startswith(f"{ARTERIAL},2,trained,full,")]
    assert row["Dice"][0] == pytest.approx(sum(of_cases) / 2, abs=1e-4)
    assert row["Dice"][1] <= row["Dice"][0] <= row["Dice"][2]


@pytest.mark.slow
def test_submitted_to_processes_of_this_machine(shell: Shell) -> None:
    small = (shell.root / "study.yaml").read_text().replace("[ccfv, logme]", "[]")
    lines = [line for line in small.splitlines() if "trained" not in line]
    (shell.root / "small.yaml").write_text("\n".join(lines))
    shell.run("stunet study plan small.yaml -o L -device cpu")
    shell.run("stunet study run L --slurm cluster=local,timeout_min=10 -device cpu")
    deadline = time.monotonic() + 300
    while not (found := results(shell, "L")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [content["status"] for content in found.values()] == ["done"]
    (cell,) = Study(shell.root / "L").cells
    assert "Training done." in Study(shell.root / "L").result(cell).with_suffix(".log").read_text()
    assert "Submitted 0 cells" in shell.run("stunet study run L --slurm cluster=local -device cpu")
    shell.refuse("stunet study run L --slurm cluster=local,timeout_min=60m -device cpu", "timeout_min=60m")


def test_candidates_and_sources_as_they_are_named(shell: Shell) -> None:
    text = (shell.root / "study.yaml").read_text().replace("dataset: 2,", f"dataset: {ARTERIAL},")
    (given,) = [line for line in text.splitlines() if "name: trained" in line]
    path = given.split("path: ")[1].split(",")[0]
    more = [given, f"  - {{name: trained (again), path: {path}, strategies: [full, full]}}"]
    more += [f"  - {{name: trained again, path: {path}, settings: {{initial_lr: 0.001}}}}"]
    more += [f"  - {{name: its own, path: {path}, sources: [2]}}"]
    (shell.root / "named.yaml").write_text(text.replace(given, "\n".join(more)))
    said = shell.run("stunet study plan named.yaml -o N -device cpu")
    assert "Trainings: 5; rankings: 1; done: 0" in said  # on its own dataset the last one is not compared
    study = Study(shell.root / "N")
    assert len({cell.name for cell in study.cells}) == 6
    zoo = json.loads((shell.root / "N" / f"zoo_{ARTERIAL}.json").read_text())
    assert [each["name"] for each in zoo["checkpoints"]] == ["trained"]  # a checkpoint is ranked once
    (shell.root / "one.yaml").write_text(text.replace("cases: [2]", "cases: [1]"))
    assert "rankings: 0;" in shell.run("stunet study plan one.yaml -o O -device cpu")  # by one case nothing is ranked


def test_what_cannot_be_is_refused(shell: Shell, tmp_path: Path) -> None:
    text = (shell.root / "study.yaml").read_text()

    def refuse(old: str, new: str, *words: str) -> None:
        (shell.root / "bad.yaml").write_text(text.replace(old, new))
        shell.refuse("stunet study plan bad.yaml -o B -device cpu", *words)
        assert not (shell.root / "B" / "study.json").exists()

    refuse("cases: [2]", "cases: [4]", "5 cases", "4 are to be trained on")
    refuse("test: 2", "test: 9", "5 of 9")
    refuse("seeds: 1", "seed: 1", "seed")
    refuse("num_epochs: 3", "epochs: 3", "epochs")
    refuse("dataset: 2,", "dataset: 77,", "77")
    refuse("logme]", "logmee]", "logmee", "logme")
    refuse("num_epochs: 3", "final_validation: false, num_epochs: 3", "final_validation")
    refuse("width: 4}", "width: 4, strategies: [head-only]}", "scratch", "without weights")
    refuse(", width: 4}", "}", "depth", "width and depth")
    refuse("training cases: 4", "training cases: .nan", "training cases: nan")
    refuse("name: trained,", "name: trained, size: small,", "size beside weights")
    refuse("name: scratch", "name: trained", "trained")
    refuse("test: 2}", "test: 2, groups: '('}", "groups")
    cases = sorted(path.stem for path in (shell.preprocessed / ARTERIAL / "gt_segmentations").iterdir())
    case = cases[0].partition(".")[0]
    (shell.root / "groups.json").write_text(json.dumps({"one": [case], "other": [case]}))
    refuse("test: 2}", "test: 2, groups: groups.json}", case, "two groups")
    (shell.root / "groups.json").write_text(json.dumps({"one": [f"{case}.nii.gz"]}))
    refuse("test: 2}", "test: 2, groups: groups.json}", f"{case}.nii.gz", "no case", f"as {case}")
    shell.refuse("stunet study plan study.yaml -o B -device cpu", "nnUNet_raw", nnUNet_raw=None)
    shell.refuse("stunet study run nothing", "study plan")
    shell.refuse("stunet study report nothing", "study plan")
