"""How long ``stunet study plan`` and ``report`` take for a study of 10,000 cells. By hand.

Five targets (one preprocessed dataset under five names) with four numbers of cases, 50 candidates, ten seeds. For the
report, each cell gets a made-up result of nine test cases. One JSON line.

    python tests/benchmarks/study.py
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from experiment import Experiment, make_parser

from stunet.network import build_stunet
from stunet.sizes import STUNetSize
from stunet.study.definition import Study

DATA = "Dataset020_ChaosT2"
METRICS = ["ccfv", "logme", "transrate", "leep", "gbc", "zero-shot", "linear-probe", "topote", "dropout"]
N_TARGETS, N_CASES, N_CANDIDATES, N_SEEDS, N_TEST = 5, [2, 4, 6, 8], 50, 10, 9


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        study = self.root / "study"
        shutil.rmtree(study, ignore_errors=True)
        self.prepare()
        seconds = {"plan": self.timed(f"stunet study plan {self.root}/study.yaml -o {study} -device cpu")}
        planned = Study(study)
        self.make_up(planned)
        seconds["report"] = self.timed(f"stunet study report {study}")
        return {
            "benchmark": "study",
            "cells": len(planned.trainings),
            "seconds": seconds,
            "page_mb": round((study / "index.html").stat().st_size / 1e6, 1),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def timed(self, line: str) -> float:
        started = time.monotonic()
        self.run(line)
        return round(time.monotonic() - started, 1)

    def prepare(self) -> None:
        first = self.preprocessed / DATA
        if not first.exists():
            shutil.copytree(self.args.data, self.raw / DATA)
            self.run("nnUNetv2_plan_and_preprocess -d 20 -c 3d_fullres -npfp 2 -np 2")
        targets = []
        for number in range(20, 20 + N_TARGETS):
            copy = self.preprocessed / f"Dataset{number:03d}_ChaosT2"
            if not copy.exists():
                shutil.copytree(first, copy)
                for path in copy.glob("nnUNetPlans.json"):
                    path.write_text(path.read_text().replace(DATA, copy.name))
            targets.append({"dataset": number, "cases": N_CASES, "test": N_TEST})
        network = build_stunet(STUNetSize("narrow", (1,) * 6, self.args.width), 1, 5, [1, 2, 2, 2, 2, 2])
        content = {"network_weights": network.state_dict(), "logging": {"ema_fg_dice": [0.5]}}
        candidates: list[dict[str, Any]] = [{"name": "scratch"}]
        for i in range(1, N_CANDIDATES):
            torch.save(content, path := self.root / f"candidate_{i}.pth")
            candidates.append({"name": path.stem, "path": str(path), "facts": {"number": i}})
        definition = {"targets": targets, "candidates": candidates, "seeds": N_SEEDS, "metrics": METRICS}
        (self.root / "study.yaml").write_text(json.dumps(definition))  # which is YAML, too

    def make_up(self, study: Study) -> None:
        rng = np.random.default_rng(0)
        for cell in study.cells:
            result: dict[str, Any]
            if cell.candidate is None:
                scores = rng.random((N_CANDIDATES, len(METRICS)))
                named = zip(study.candidates[1:], scores.tolist(), strict=False)
                result = {"candidates": {c.name: {"scores": dict(zip(METRICS, row, strict=True))} for c, row in named}}
            else:
                dice = rng.random((N_TEST, 4)).tolist()
                cases = {
                    case: {str(i): {"Dice": value, "NSD": value} for i, value in enumerate(row)}
                    for case, row in zip(cell.target.test, dice, strict=True)
                }
                result = {"cases": cases, "curve": rng.random(20).tolist()}
            path = study.result(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"status": "done", "seconds": 60, **result}))


if __name__ == "__main__":
    Benchmark.print_result(make_parser(__doc__, DATA))
