"""Whether rankings predict what fine-tuning reaches, on real data. By hand.

A zoo of nine checkpoints of different worth from the hippocampus data (Medical Segmentation Decathlon, task 04): random
weights, four lengths of pre-training, pre-training on half of the labels, on another task (strong edges of the image),
and the longest one with noise on its weights. Each is really fine-tuned on the same 10 cases with the same budget, for
each of several seeds with other cases, and scored by nnU-Net's final validation on cases that none of them saw; and
each is ranked by ``stunet rank`` on the same 10 cases. Then weighted Kendall tau, Pearson, Spearman and top-1 regret of
every metric with bootstrap intervals over the checkpoints, by ``stunet rank-eval``. Every step is a command that a user
types. Prints a table to standard error and one JSON line. With --work, what is finished is not done again after an
interruption.

    python tests/benchmarks/ranking_agreement.py
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from experiment import Experiment, make_parser
from scipy.ndimage import gaussian_gradient_magnitude

DATA = "Dataset004_Hippocampus"
SOURCE, ANTERIOR, EDGES, TARGET = "Dataset301_Source", "Dataset302_Anterior", "Dataset303_Edges", "Dataset304_Target"
N_PRETRAIN, N_FEW, N_SCORED = 120, 10, 40
PLANS, TRAINER = "P_zoo", "STUNetTrainer"
METRICS = "ccfv,logme,transrate,leep,gbc,gbc-full,zero-shot"
COMMON = "num_iterations_per_epoch=10 num_val_iterations_per_epoch=2 batch_size=2 patch_size=32,48,32 mirroring=none"


def main() -> None:
    parser = make_parser(__doc__, DATA)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of 10 iterations of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=48, help="epochs of 10 iterations of the longest one")
    parser.add_argument("--seeds", type=int, default=2, help="sets of 10 cases")
    Benchmark.print_result(parser)


class Benchmark(Experiment):
    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        super().__init__(root, args)
        names = sorted(p.name.removesuffix(".nii.gz") for p in (args.data / "labelsTr").glob("*.nii.gz"))
        random.Random(1).shuffle(names)
        self.source, rest = names[:N_PRETRAIN], names[N_PRETRAIN:]
        self.few = [rest[seed * N_FEW : (seed + 1) * N_FEW] for seed in range(args.seeds)]
        self.scored = rest[-N_SCORED:]

    def measure(self) -> dict[str, Any]:
        started = time.monotonic()
        self.prepare()
        zoo = self.make_zoo()
        calls = [
            partial(self.fine_tune, name, path, seed) for seed in range(self.args.seeds) for name, path in zoo.items()
        ]
        dice = self.all_of(calls)
        results = {}
        for seed in range(self.args.seeds):
            own = dict(zip(zoo, dice[seed * len(zoo) : (seed + 1) * len(zoo)], strict=True))
            results[f"cases {seed}"] = self.compare(seed, zoo, own)
        print_table(results)
        return {
            "benchmark": "ranking_agreement",
            "cases": {"pretraining": N_PRETRAIN, "fine-tuning and ranking": N_FEW, "scored": N_SCORED},
            "iterations": {"pretraining": self.args.pretrain_epochs * 10, "fine-tuning": self.args.epochs * 10},
            "results": results,
            "seconds": round(time.monotonic() - started),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def prepare(self) -> None:
        if (self.root / "prepared").exists():
            return
        target = [name for names in (*self.few, self.scored) for name in names]
        for dataset, names in ((SOURCE, self.source), (ANTERIOR, self.source), (EDGES, self.source), (TARGET, target)):
            self.write_dataset(dataset, names)
        self.run("nnUNetv2_plan_and_preprocess -d 301 302 303 304 -c 3d_fullres -npfp 2 -np 2")
        for dataset in (SOURCE, ANTERIOR, EDGES):
            folds = [{"train": self.source[4:], "val": self.source[:4]}]
            (self.preprocessed / dataset / "splits_final.json").write_text(json.dumps(folds))
        folds = [{"train": few, "val": self.scored} for few in self.few]
        (self.preprocessed / TARGET / "splits_final.json").write_text(json.dumps(folds))
        (self.root / "prepared").touch()

    def write_dataset(self, dataset: str, names: list[str]) -> None:
        folder = self.raw / dataset
        labels = json.loads((self.args.data / "dataset.json").read_text())["labels"]
        change = {ANTERIOR: lambda image, label: label == 1, EDGES: lambda image, label: edges(image)}.get(dataset)
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            image, label = Path("imagesTr") / f"{name}_0000.nii.gz", Path("labelsTr") / f"{name}.nii.gz"
            shutil.copyfile(self.args.data / image, folder / image)
            if change is None:
                shutil.copyfile(self.args.data / label, folder / label)
                continue
            source = sitk.ReadImage(str(self.args.data / label))
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(self.args.data / image)))
            made = sitk.GetImageFromArray(change(voxels, sitk.GetArrayFromImage(source)).astype(np.uint8))
            made.CopyInformation(source)
            sitk.WriteImage(made, str(folder / label))
        names_of = {ANTERIOR: {"background": 0, "Anterior": 1}, EDGES: {"background": 0, "edge": 1}}
        description = {
            "channel_names": {"0": "MRI"},
            "labels": names_of.get(dataset, labels),
            "numTraining": len(names),
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description))

    def make_zoo(self) -> dict[str, Path]:
        """Paths by name, from random weights on."""
        longest = self.args.pretrain_epochs
        quarter = longest // 4
        main_fold = self.pretrain(SOURCE, longest, f"keep_every={quarter // 2}")
        final = main_fold / "checkpoint_final.pth"
        zoo = {
            "random": self.changed(final, "random"),
            f"{10 * (quarter // 2)} iterations": main_fold / f"checkpoint_epoch_{quarter // 2:04d}.pth",
            f"{10 * quarter} iterations": main_fold / f"checkpoint_epoch_{quarter:04d}.pth",
            f"{20 * quarter} iterations": main_fold / f"checkpoint_epoch_{2 * quarter:04d}.pth",
            f"{10 * longest} iterations": final,
            "half of the labels": self.pretrain(ANTERIOR, 2 * quarter) / "checkpoint_final.pth",
            "edges": self.pretrain(EDGES, 2 * quarter) / "checkpoint_final.pth",
            "little noise": self.changed(final, "little noise", 0.3),
            "much noise": self.changed(final, "much noise", 1.0),
        }
        lines = [f"- {{name: {json.dumps(name)}, path: {json.dumps(str(path))}}}" for name, path in zoo.items()]
        (self.root / "zoo.yaml").write_text("checkpoints:\n" + "\n".join(lines) + "\n")
        return zoo

    def pretrain(self, dataset: str, epochs: int, more: str = "") -> Path:
        fold = self.results / dataset / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_0"
        if not finished(fold):
            number = dataset[7:10]
            settings = f"--set num_epochs={epochs} {COMMON} {more}"
            network = f"-c 3d_fullres --depth 1 --width {self.args.width}"
            self.run(
                f"stunet plan -d {number} {network} --name {PLANS} --overwrite {settings} && "
                f"nnUNetv2_train {number} 3d_fullres 0 -p {PLANS} -tr {TRAINER} -device cpu"
            )
        return fold

    def changed(self, source: Path, name: str, noise: float | None = None) -> Path:
        """The checkpoint with noise on each weight tensor in units of its standard deviation, or with fresh weights."""
        path = self.root / f"{name.replace(' ', '_')}.pth"
        if not path.is_file():
            checkpoint = torch.load(source, map_location="cpu", weights_only=False)  # our own file
            torch.manual_seed(0)
            for tensor in checkpoint["network_weights"].values():
                if tensor.ndim < 2:
                    continue
                if noise is None:
                    torch.nn.init.kaiming_normal_(tensor, a=0.01)
                else:
                    tensor += noise * tensor.std() * torch.randn_like(tensor)
            torch.save(checkpoint, path)
        return path

    def fine_tune(self, name: str, path: Path, seed: int) -> float:
        plans = f"P_{name.replace(' ', '_')}"
        fold = self.results / TARGET / f"{TRAINER}__{plans}__3d_fullres" / f"fold_{seed}"
        if not finished(fold):
            # Fresh heads: the worth of the features, not of a head that knows the answer already.
            settings = f"--set num_epochs={self.args.epochs} {COMMON} head=fresh initial_lr=0.01"
            self.run(
                f"stunet finetune -d 304 -f {seed} --from '{path}' --name {plans} -device cpu --overwrite {settings}"
            )
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        return round(summary["foreground_mean"]["Dice"], 4)

    def compare(self, seed: int, zoo: dict[str, Path], dice: dict[str, float]) -> dict[str, Any]:
        folder = self.root / f"ranking_{seed}"
        self.run(f"stunet rank -d 304 -f {seed} --zoo {self.root / 'zoo.yaml'} --metrics {METRICS} -o {folder}")
        (folder / "dice.json").write_text(json.dumps(dice))
        self.run(
            f"stunet rank-eval {folder / 'ranking.json'} {folder / 'dice.json'} --json > {folder / 'agreement.json'}"
        )
        ranking = json.loads((folder / "ranking.json").read_text())
        scores = {candidate["name"]: candidate["scores"] for candidate in ranking["candidates"]}
        return {
            "dice": dice,
            "scores": {name: scores[name] for name in zoo},
            "seconds_to_rank": sum(candidate["seconds"] for candidate in ranking["candidates"]),
            "agreement": json.loads((folder / "agreement.json").read_text()),
        }


def edges(image: np.ndarray) -> np.ndarray:
    """The tenth of the voxels where the image changes most."""
    strength = gaussian_gradient_magnitude(image.astype(np.float32), 1.0)
    return strength > np.quantile(strength, 0.9)


def finished(fold: Path) -> bool:
    return (fold / "validation" / "summary.json").is_file()


def print_table(results: dict[str, Any]) -> None:
    for cases, result in results.items():
        print(
            f"{cases}\n{'candidate':<22}{'Dice':>8}" + "".join(f"{m:>11}" for m in METRICS.split(",")), file=sys.stderr
        )
        for name, dice in result["dice"].items():
            scores = [result["scores"][name].get(metric) for metric in METRICS.split(",")]
            cells = "".join(f"{'-' if score is None else f'{score:.3f}':>11}" for score in scores)
            print(f"{name:<22}{dice:>8.4f}{cells}", file=sys.stderr)
        print(json.dumps(result["agreement"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
