"""What pre-training is worth on real data when few cases are labelled, for each fine-tuning strategy. By hand.

Pre-trains a narrow STU-Net on 140 cases of the hippocampus data (Medical Segmentation Decathlon, task 04), then trains
on 8 other cases with the same budget: from scratch, with each strategy, and with fresh heads. Scored by nnU-Net's final
validation on 36 cases that none of them saw; three seeds, each with 8 cases of its own. Every step is a command that a
user types. Prints a table to standard error and one JSON line. With --work, what is finished is not done again after an
interruption.

    python tests/benchmarks/transfer.py
"""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiment import Experiment, make_parser, spread

DATA = "Dataset004_Hippocampus"
SOURCE, TARGET = "Dataset104_Source", "Dataset105_Target"
STRATEGIES = ("full", "warmup", "layerwise", "frozen-encoder", "head-only")
SETTINGS = "num_val_iterations_per_epoch=5 batch_size=2"
N_PRETRAIN, N_FEW, N_SEEDS = 140, 8, 3


def main() -> None:
    parser = make_parser(__doc__, DATA)
    parser.add_argument("--pretrain-epochs", type=int, default=40, help="epochs of 20 iterations")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of 10 iterations on the 8 cases")
    Benchmark.print_result(parser)


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        started = time.monotonic()
        self.prepare()
        source = self.pretrain()
        calls = {"scratch": [partial(self.from_scratch, seed) for seed in range(N_SEEDS)]}
        for strategy in STRATEGIES:
            calls[strategy] = [partial(self.fine_tune, strategy, seed, source) for seed in range(N_SEEDS)]
        calls["full, fresh heads"] = [
            partial(self.fine_tune, "full", seed, source, head="fresh") for seed in range(N_SEEDS)
        ]
        folds = self.all_of([call for listed in calls.values() for call in listed])
        arms = {arm: folds[i * N_SEEDS : (i + 1) * N_SEEDS] for i, arm in enumerate(calls)}
        dice = {arm: [final_dice(fold) for fold in folds] for arm, folds in arms.items()}
        first = {arm: [first_epoch_dice(fold) for fold in folds] for arm, folds in arms.items()}
        gains = {arm: [a - b for a, b in zip(scores, dice["scratch"], strict=True)] for arm, scores in dice.items()}
        print_table(dice, first, gains)
        return {
            "benchmark": "transfer",
            "cases": {"pretraining": N_PRETRAIN, "training": N_FEW, "scored": len(self.split()[1])},
            "width": self.args.width,
            "iterations": {"pretraining": self.args.pretrain_epochs * 20, "training": self.args.epochs * 10},
            "batch_size": 2,
            "source_dice_on_its_own_cases": final_dice(source.parent),
            "dice": dice,
            "gain_over_scratch": {arm: spread(values) for arm, values in gains.items() if arm != "scratch"},
            "pseudo_dice_after_first_epoch": first,
            "seconds": round(time.monotonic() - started),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def split(self) -> tuple[list[list[str]], list[str]]:
        """Eight cases for each seed, and the cases that all are scored on."""
        names = sorted(p.name.removesuffix(".nii.gz") for p in (self.args.data / "labelsTr").glob("*.nii.gz"))
        random.Random(0).shuffle(names)
        rest = names[N_PRETRAIN:]
        few = [rest[seed * N_FEW : (seed + 1) * N_FEW] for seed in range(N_SEEDS)]
        return few, rest[N_SEEDS * N_FEW :]

    def prepare(self) -> None:
        if (self.root / "prepared").exists():
            return
        few, scored = self.split()
        target = [name for names in (*few, scored) for name in names]
        everything = sorted(p.name.removesuffix(".nii.gz") for p in (self.args.data / "labelsTr").glob("*.nii.gz"))
        source = [name for name in everything if name not in target]
        for dataset, names in ((SOURCE, source), (TARGET, target)):
            self.copy_cases(dataset, names)
        self.run("nnUNetv2_plan_and_preprocess -d 104 105 -c 3d_fullres -npfp 2 -np 2")
        folds = {
            SOURCE: [{"train": source, "val": source[:8]}],
            TARGET: [{"train": names, "val": scored} for names in few],
        }
        for dataset, split in folds.items():
            path = self.preprocessed / dataset / "splits_final.json"
            path.write_text(json.dumps(split))
        (self.root / "prepared").touch()

    def copy_cases(self, dataset: str, names: list[str]) -> None:
        folder = self.raw / dataset
        for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(
                    self.args.data / part / f"{name}{suffix}.nii.gz", folder / part / f"{name}{suffix}.nii.gz"
                )
        description = json.loads((self.args.data / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": len(names)}))

    def settings(self, epochs: int, iterations: int) -> str:
        return f"--set num_epochs={epochs} num_iterations_per_epoch={iterations} {SETTINGS}"

    def pretrain(self) -> Path:
        fold = self.results / SOURCE / "STUNetTrainer__P_source__3d_fullres" / "fold_0"
        if not finished(fold):
            settings = self.settings(self.args.pretrain_epochs, 20)
            plan = f"stunet plan -d 104 --depth 1 --width {self.args.width} -c 3d_fullres --name P_source --overwrite"
            self.run(f"{plan} {settings} && nnUNetv2_train 104 3d_fullres 0 -p P_source -tr STUNetTrainer -device cpu")
        return fold / "checkpoint_final.pth"

    def from_scratch(self, seed: int) -> Path:
        fold = self.results / TARGET / "STUNetTrainer__P_scratch__3d_fullres" / f"fold_{seed}"
        if not finished(fold):
            settings = self.settings(self.args.epochs, 10)
            plan = f"stunet plan -d 105 --depth 1 --width {self.args.width} -c 3d_fullres --name P_scratch"
            train = f"nnUNetv2_train 105 3d_fullres {seed} -p P_scratch -tr STUNetTrainer -device cpu"
            self.run(f"{plan} {settings} && {train}")
        return fold

    def fine_tune(self, strategy: str, seed: int, source: Path, head: str = "by-name") -> Path:
        name = f"P_{strategy}_{head}"
        fold = self.results / TARGET / f"STUNetTrainer__{name}__3d_fullres" / f"fold_{seed}"
        if not finished(fold):
            command = (
                f"stunet finetune -d 105 -f {seed} --from {source} --strategy {strategy} --name {name} -device cpu"
            )
            self.run(f"{command} --overwrite {self.settings(self.args.epochs, 10)} head={head}")
        return fold


def finished(fold: Path) -> bool:
    return (fold / "validation" / "summary.json").is_file()


def final_dice(fold: Path) -> float:
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    return round(summary["foreground_mean"]["Dice"], 4)


def first_epoch_dice(fold: Path) -> float:
    """Mean Dice of the online validation after the first epoch, from the log."""
    log = max(fold.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime).read_text()
    scores = [float(score) for score in re.findall(r"\d\.\d+(?:e-\d+)?", re.search(r"Pseudo dice (.*)", log)[1])]  # type: ignore[index]
    return round(statistics.mean(scores), 4)


def print_table(dice: dict[str, list[float]], first: dict[str, list[float]], gains: dict[str, list[float]]) -> None:
    print(f"{'arm':<20}{'Dice':>8}{'sd':>8}{'gain':>8}{'first epoch':>13}", file=sys.stderr)
    for arm, scores in dice.items():
        final, gain, early = spread(scores), spread(gains[arm]), spread(first[arm])
        line = f"{arm:<20}{final['mean']:>8.3f}{final['sd']:>8.3f}{gain['mean']:>8.3f}{early['mean']:>13.3f}"
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
