"""What pre-training without labels is worth on real data when few cases are labelled, for each task. By hand.

Pre-trains a narrow STU-Net on one part of a dataset without looking at its labels, then trains on 4 and on 8 labelled
cases of another part, all with the same budget: from the weights of each task; from those of a training with all labels
of the first part; from scratch; and from scratch for as many iterations as pre-training and fine-tuning take together.
Scored by nnU-Net's final validation on cases that no training saw. Three seeds, each with labelled cases of its own.
Every step is a command that a user types. Prints a table to standard error and one JSON line, with each task's measures
on validation cases at its end too. With --work, what is finished is not done again after an interruption; with
--pretrain-only that is all. With --joint, in place of all this: 4 labelled cases alone, and the same beside 16 without
labels, which a task sees; each labelled case is drawn as often in both.

    python tests/benchmarks/self_supervised.py --data ../shared/data/Dataset035_BrainT1 --work FOLDER --jobs 2
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from experiment import Experiment, make_parser, spread

DATA = "Dataset035_BrainT1"
SOURCE, TARGET = "Dataset106_Source", "Dataset107_Target"
SUPERVISED = "supervised"  # what pre-training on labels is called beside the tasks
PRETEXTS = ("mae", "mae:pretext_skips=false", "genesis", "volume-fusion", "rotation", "relative-location", "simclr")
N_SEEDS, N_UNLABELLED = 3, 16
N_ITERATIONS = 50  # of an epoch: nnU-Net draws progress.png after each, which takes as long as ten iterations here
JOINT = [f"Dataset{110 + seed}_Joint" for seed in range(N_SEEDS)]


def main() -> None:
    parser = make_parser(__doc__, DATA)
    parser.add_argument("--pretexts", nargs="+", default=list(PRETEXTS), help="a task, or TASK:SETTING=VALUE:...")
    parser.add_argument("--few", type=int, nargs="+", default=[4, 8], help="labelled cases")
    parser.add_argument("--scored", type=int, default=10, help="cases that all are scored on")
    parser.add_argument("--pretrain-epochs", type=int, default=20, help="of 50 iterations")
    parser.add_argument("--epochs", type=int, default=10, help="on the labelled cases")
    parser.add_argument("--encoder-only", action="store_true", help="transfer no decoder where a task trains one")
    parser.add_argument("--pretrain-only", action="store_true")
    parser.add_argument("--joint", nargs="+", default=[], metavar="TASK")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--patch", default="32,32,32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--together", nargs="*", default=[], metavar="A/B", help="pairs of cases of one person")
    parser.add_argument("--merge", nargs="*", default=[], metavar="NAME=A,B", help="structures that become one")
    parser.add_argument("--spacing", default="", metavar="MM", help="of all axes, in place of the planned one")
    Benchmark.print_result(parser)


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        started = time.monotonic()
        self.configuration = self.args.configuration
        if self.args.joint:
            return self.joint()
        self.prepare()
        starts = [*self.args.pretexts] if self.args.pretrain_only else [SUPERVISED, *self.args.pretexts]
        sources = dict(zip(starts, self.all_of([partial(self.pretrain, start) for start in starts]), strict=True))
        measures = {arm: read_measures(path.parent) for arm, path in sources.items() if arm != SUPERVISED}
        print(json.dumps(measures, indent=1), file=sys.stderr)
        if self.args.pretrain_only:
            return {"benchmark": "self_supervised", "data": self.args.data.name, "measures": measures}
        arms: dict[str, Path | None] = {"scratch": None, "scratch, longer": None, **sources}
        cells = [(arm, n, seed) for arm in arms for n in self.args.few for seed in range(N_SEEDS)]
        trained = self.all_of([partial(self.train, arm, arms[arm], n, seed) for arm, n, seed in cells])
        dice = {cell: final_dice(fold) for cell, fold in zip(cells, trained, strict=True)}
        table = {str(n): {arm: [dice[arm, n, seed] for seed in range(N_SEEDS)] for arm in arms} for n in self.args.few}
        for n, rows in table.items():
            for arm, scores in rows.items():
                gains = [a - b for a, b in zip(scores, rows["scratch, longer"], strict=True)]
                one, gain = spread(scores), spread(gains)
                line = f"{n:>3} cases  {arm:<28}{one['mean']:>8.3f} +- {one['sd']:.3f}"
                print(f"{line}{gain['mean']:>+9.3f} +- {gain['sd']:.3f} over longer", file=sys.stderr)
        source, _few, scored = self.split()
        return {
            "benchmark": "self_supervised",
            "data": self.args.data.name,
            "cases": {"pretraining": len(source), "labelled": self.args.few, "scored": len(scored)},
            "width": self.args.width,
            "patch": self.args.patch,
            "batch_size": self.args.batch_size,
            "iterations": {
                "pretraining": self.args.pretrain_epochs * N_ITERATIONS,
                "training": self.args.epochs * N_ITERATIONS,
            },
            "measures": measures,
            "dice": table,
            "seconds": round(time.monotonic() - started),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def joint(self) -> dict[str, Any]:
        """Train on few labelled cases, alone and with unlabelled ones."""
        seeds = range(N_SEEDS)
        self.all_of([partial(self.prepare_joint, seed) for seed in seeds])
        cells = [(arm, seed) for arm in ("alone", *self.args.joint) for seed in seeds]
        trained = self.all_of([partial(self.train_joint, *cell) for cell in cells])
        dice = {cell: final_dice(fold) for cell, fold in zip(cells, trained, strict=True)}
        table = {arm: [dice[arm, seed] for seed in seeds] for arm in ("alone", *self.args.joint)}
        for arm, scores in table.items():
            gain = spread([a - b for a, b in zip(scores, table["alone"], strict=True)])
            print(arm, spread(scores), "gain", gain, file=sys.stderr)
        iterations = self.args.epochs * N_ITERATIONS
        return {"benchmark": "joint_training", "data": self.args.data.name, "iterations": iterations, "dice": table}

    def prepare_joint(self, seed: int) -> None:
        source, few, scored = self.split()
        labelled, others = few[seed][: self.args.few[0]], random.Random(seed).sample(source, N_UNLABELLED)
        dataset, (folder, done) = 110 + seed, (self.raw / JOINT[seed], self.preprocessed / JOINT[seed])
        if (done / "splits_final.json").exists():
            return
        structures = self.copy(JOINT[seed], [*scored, *labelled, *others])
        for name in others:  # patches must not lie where their labels are, either
            path = folder / "labelsTr" / f"{name}.nii.gz"
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), path)
        often = {name: len(others) / len(labelled) for name in labelled}
        cases: dict[str, list[str]] = {name: [] for name in others}
        manifest = {"version": 1, "groups": {"all": structures}, "default": "all", "cases": cases, "weights": often}
        (folder / "annotated_labels.json").write_text(json.dumps(manifest))
        self.preprocess(dataset)
        folds = [{"train": labelled, "val": scored}, {"train": [*labelled, *others], "val": scored}]
        shutil.copy(folder / "annotated_labels.json", done)
        (done / "splits_final.json").write_text(json.dumps(folds))

    def train_joint(self, arm: str, seed: int) -> Path:
        dataset, fold, name = 110 + seed, int(arm != "alone"), f"P_{arm}"
        folder = self.results / JOINT[seed] / f"STUNetTrainer__{name}__{self.configuration}" / f"fold_{fold}"
        if not (folder / "validation" / "summary.json").is_file():
            settings = self.from_zero(self.args.epochs)
            if fold:  # twice the batch: half of it is labelled
                settings += f" pretext={arm} pretext_weight=0.1 batch_size={2 * self.args.batch_size}"
            train = f"stunet train {dataset} {self.configuration} {fold} -p {name} -device cpu --seed {seed}"
            self.type(f"{self.plan(dataset, name)} {settings} && {train}")
        return folder

    def copy(self, dataset: str, names: Sequence[str]) -> list[str]:
        """Make a raw dataset of some cases and return its structures."""
        folder = self.raw / dataset
        for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for name in names:
                file = f"{name}{suffix}.nii.gz"
                shutil.copyfile(self.args.data / part / file, folder / part / file)
        description = json.loads((self.args.data / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": len(names)}))
        if self.args.merge:
            self.merge(
                folder, {name: parts.split(",") for name, _, parts in (x.partition("=") for x in self.args.merge)}
            )
        return [*json.loads((folder / "dataset.json").read_text())["labels"]][1:]

    def split(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Cases to pre-train on, the labelled ones of each seed, and those that all are scored on."""
        names = sorted(p.name.removesuffix(".nii.gz") for p in (self.args.data / "labelsTr").glob("*.nii.gz"))
        first = {name: a for a, b in (pair.split("/") for pair in self.args.together) for name in names if b in name}
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(next((n for n in names if first.get(name, "-") in n), name), []).append(name)
        listed = list(groups.values())
        random.Random(0).shuffle(listed)
        ordered = [name for group in listed for name in group]
        scored, rest = ordered[: self.args.scored], ordered[self.args.scored :]
        pool = rest[: max(12, max(self.args.few))]
        few = [random.Random(seed).sample(pool, max(self.args.few)) for seed in range(N_SEEDS)]
        return rest[len(pool) :], few, scored

    def prepare(self) -> None:
        if (self.root / "prepared").exists():
            return
        source, few, scored = self.split()
        self.copy(SOURCE, source)
        self.copy(TARGET, sorted({*scored, *(name for row in few for name in row)}))
        self.preprocess(106, 107)
        # Fold 3 i + j: the i-th number of labelled cases, the j-th seed.
        folds = [{"train": row[:n], "val": scored} for n in self.args.few for row in few]
        (self.preprocessed / TARGET / "splits_final.json").write_text(json.dumps(folds))
        held = max(2, len(source) // 8)
        split = [{"train": source[held:], "val": source[:held]}]
        (self.preprocessed / SOURCE / "splits_final.json").write_text(json.dumps(split))
        (self.root / "prepared").touch()

    def preprocess(self, *datasets: int) -> None:
        spacing = f" -overwrite_target_spacing {' '.join([self.args.spacing] * 3)}" if self.args.spacing else ""
        numbers = " ".join(map(str, datasets))
        line = f"nnUNetv2_plan_and_preprocess -d {numbers} -c {self.configuration} -npfp 1 -np 1"
        self.run(f"{line}{spacing}")

    def plan(self, dataset: int, name: str) -> str:
        size = f"--depth 1 --width {self.args.width}"
        return f"stunet plan -d {dataset} {size} -c {self.configuration} --name {name} --overwrite"

    def settings(self, epochs: int, n_validation: int = 1) -> str:
        steps = f"num_epochs={epochs} num_iterations_per_epoch={N_ITERATIONS}"
        steps += f" num_val_iterations_per_epoch={n_validation}"
        steps += " mirroring=none"  # structures have a front and a back; prediction takes one pass, not eight
        return f"--set {steps} batch_size={self.args.batch_size} patch_size={self.args.patch}"

    def from_zero(self, epochs: int) -> str:
        """Settings of all that is scored: heads begin at 0 from scratch too, for drawn ones cost much."""
        return f"{self.settings(epochs)} head=fresh"

    def pretrain(self, start: str) -> Path:
        name = "P_" + re.sub("[:=,]", "_", start)
        trainer = "STUNetTrainer" if start == SUPERVISED else "STUNetTrainer_pretext"
        final = self.results / SOURCE / f"{trainer}__{name}__{self.configuration}" / "fold_0" / "checkpoint_final.pth"
        if not final.is_file():
            plan = self.plan(106, name)
            task, _, more = start.partition(":")
            plan += f" --pretext {task}" * (start != SUPERVISED)
            settings = f"{self.settings(self.args.pretrain_epochs, 4)} {more.replace(':', ' ')}"
            line = f"{plan} {settings} final_validation=false"
            train = f"stunet train 106 {self.configuration} 0 -p {name} -tr {trainer} -device cpu --seed 0"
            self.type(f"{line} && {train}")
        return final

    def train(self, arm: str, source: Path | None, n: int, seed: int) -> Path:
        fold = N_SEEDS * self.args.few.index(n) + seed
        name = "P_" + re.sub("[^a-z]+", "_", arm + " encoder" * (source is not None and self.args.encoder_only))
        folder = self.results / TARGET / f"STUNetTrainer__{name}__{self.configuration}" / f"fold_{fold}"
        if (folder / "validation" / "summary.json").is_file():
            return folder
        if source is not None:
            # At the rate of a training from scratch: so few iterations at a tenth of it would not leave the start.
            settings = f"{self.from_zero(self.args.epochs)}{'-decoder' * self.args.encoder_only} initial_lr=0.01"
            line = f"stunet finetune -d 107 -c {self.configuration} -f {fold} --from {source} --name {name}"
            self.type(f"{line} -device cpu --seed {seed} --overwrite {settings}")
            return folder
        epochs = self.args.epochs + (self.args.pretrain_epochs if arm.endswith("longer") else 0)
        train = f"stunet train 107 {self.configuration} {fold} -p {name} -tr STUNetTrainer -device cpu --seed {seed}"
        self.type(f"{self.plan(107, name)} {self.from_zero(epochs)} && {train}")
        return folder


def final_dice(fold: Path) -> float:
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    return round(summary["foreground_mean"]["Dice"], 4)


def read_measures(fold: Path) -> dict[str, float]:
    """The means over the last five epochs of what the training has logged of validation cases."""
    logged: dict[str, list[float]] = {}
    for line in sorted(fold.glob("training_log_*.txt"))[-1].read_text().splitlines():
        pairs = re.findall(r"\b([A-Za-z][A-Za-z ]*) (-?\d[\d.e-]*)(?:,|$)", line.strip().partition(": ")[2].strip())
        if pairs and pairs[0][0] != "Epoch" and "rate" not in pairs[0][0] and "best" not in line:
            for name, value in pairs:
                logged.setdefault(name, []).append(float(value))
    return {name: round(sum(values[-5:]) / len(values[-5:]), 4) for name, values in logged.items()}


if __name__ == "__main__":
    main()
