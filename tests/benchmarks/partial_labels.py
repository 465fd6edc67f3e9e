"""What training on partial labels reaches beside full labels, on real data. By hand.

140 training cases of the hippocampus data (Medical Segmentation Decathlon, task 04), half of them annotated only for
Anterior and half only for Posterior, 40 cases held out. Four arms with the same budget, three seeds each: everything
annotated; partial labels with the manifest; the same label maps without it, so that what is not annotated is
background; and partial labels of half the cases. Scored by nnU-Net's final validation on the held-out cases, which
annotate both. Every step is a command that a user types. Prints a table to standard error and one JSON line. With
--work, what is finished is not done again after an interruption.

    python tests/benchmarks/partial_labels.py
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from experiment import Experiment, make_parser, spread

from stunet.files import write_json
from stunet.labels.annotations import group_cases, order_manifest

DATA = "Dataset004_Hippocampus"
FULL, PARTIAL, NAIVE = "Dataset201_Full", "Dataset202_Partial", "Dataset203_Naive"
N_TRAIN, N_HELD_OUT, N_SEEDS = 140, 40, 3
ARMS = {"everything annotated": (FULL, 1), "partial": (PARTIAL, 1), "naive": (NAIVE, 1), "partial, half": (PARTIAL, 2)}


def main() -> None:
    parser = make_parser(__doc__, DATA)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of 20 iterations, batch 2")
    Benchmark.print_result(parser)


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        started = time.monotonic()
        self.prepare()
        calls = [
            partial(self.train, dataset, seed + (N_SEEDS if share == 2 else 0))
            for dataset, share in ARMS.values()
            for seed in range(N_SEEDS)
        ]
        scores = self.all_of(calls)
        dice = {arm: scores[i * N_SEEDS : (i + 1) * N_SEEDS] for i, arm in enumerate(ARMS)}
        means = {arm: [entry["mean"] for entry in entries] for arm, entries in dice.items()}
        self.print_table(dice)
        return {
            "benchmark": "partial_labels",
            "cases": {"training": N_TRAIN, "held_out": N_HELD_OUT},
            "width": self.args.width,
            "iterations": self.args.epochs * 20,
            "batch_size": 2,
            "patch_size": [32, 48, 32],
            "dice": dice,
            "mean": {arm: spread(values) for arm, values in means.items()},
            "below_upper_bound": {
                arm: spread([a - b for a, b in zip(means["everything annotated"], values, strict=True)])
                for arm, values in means.items()
            },
            "seconds": round(time.monotonic() - started),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def prepare(self) -> None:
        """Three datasets with the same images; seeds differ in their start alone, not in who annotates what."""
        if (self.root / "prepared").exists():
            return
        names = sorted(p.name.removesuffix(".nii.gz") for p in (self.args.data / "labelsTr").glob("*.nii.gz"))
        random.Random(0).shuffle(names)
        held_out, training = names[:N_HELD_OUT], names[N_HELD_OUT : N_HELD_OUT + N_TRAIN]
        anterior = set(training[: N_TRAIN // 2])
        for dataset in (FULL, PARTIAL, NAIVE):
            self.write_dataset(dataset, held_out, training, anterior)
        manifest = {name: ["Anterior" if name in anterior else "Posterior"] for name in training}
        manifest |= {name: ["Anterior", "Posterior"] for name in held_out}
        content = group_cases(manifest, ["Anterior", "Posterior"])
        write_json(order_manifest(content), self.raw / PARTIAL / "annotated_labels.json")
        self.run("nnUNetv2_plan_and_preprocess -d 201 202 203 -c 3d_fullres -npfp 2 -np 2")
        half = [*training[: N_TRAIN // 4], *training[N_TRAIN // 2 : N_TRAIN // 2 + N_TRAIN // 4]]
        folds = [{"train": cases, "val": held_out} for cases in (training, half) for _ in range(N_SEEDS)]
        for dataset in (FULL, PARTIAL, NAIVE):
            (self.preprocessed / dataset / "splits_final.json").write_text(json.dumps(folds))
        (self.root / "prepared").touch()

    def write_dataset(self, dataset: str, held_out: list[str], training: list[str], anterior: set[str]) -> None:
        folder = self.raw / dataset
        (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
        (folder / "labelsTr").mkdir(exist_ok=True)
        for name in (*held_out, *training):
            image = Path("imagesTr") / f"{name}_0000.nii.gz"
            shutil.copyfile(self.args.data / image, folder / image)
            source, target = (parent / "labelsTr" / f"{name}.nii.gz" for parent in (self.args.data, folder))
            if dataset == FULL or name in held_out:
                shutil.copyfile(source, target)
            else:
                keep_one_label(source, target, 1 if name in anterior else 2)
        description = json.loads((self.args.data / "dataset.json").read_text())
        n_cases = len(held_out) + len(training)
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": n_cases}))

    def train(self, dataset: str, fold: int) -> dict[str, float]:
        model = self.results / dataset / "STUNetTrainer__P_partial__3d_fullres"
        summary = model / f"fold_{fold}" / "validation" / "summary.json"
        if not summary.is_file():
            dataset_id = int(dataset[7:10])
            plan = f"stunet plan -d {dataset_id} --depth 1 --width {self.args.width} -c 3d_fullres --name P_partial"
            settings = f"num_epochs={self.args.epochs} num_iterations_per_epoch=20 num_val_iterations_per_epoch=2"
            train = f"nnUNetv2_train {dataset_id} 3d_fullres {fold} -p P_partial -tr STUNetTrainer -device cpu"
            self.run(f"{plan} --set {settings} batch_size=2 patch_size=32,48,32 mirroring=none && {train}")
        content = json.loads(summary.read_text())
        each = {label: round(metrics["Dice"], 4) for label, metrics in content["mean"].items() if label != "0"}
        return {**each, "mean": round(content["foreground_mean"]["Dice"], 4)}

    def print_table(self, dice: dict[str, list[dict[str, float]]]) -> None:
        print(f"{'arm':<22}{'Dice':>8}{'sd':>8}{'Anterior':>10}{'Posterior':>11}", file=sys.stderr)
        for arm, entries in dice.items():
            final = spread([entry["mean"] for entry in entries])
            each = [statistics.mean(entry[label] for entry in entries) for label in ("1", "2")]
            print(f"{arm:<22}{final['mean']:>8.3f}{final['sd']:>8.3f}{each[0]:>10.3f}{each[1]:>11.3f}", file=sys.stderr)


def keep_one_label(source: Path, target: Path, value: int) -> None:
    image = sitk.ReadImage(str(source))
    labels = sitk.GetArrayFromImage(image)
    kept = sitk.GetImageFromArray(np.where(labels == value, labels, 0).astype(labels.dtype))
    kept.CopyInformation(image)
    sitk.WriteImage(kept, str(target))


if __name__ == "__main__":
    main()
