"""The study that the documentation reports: candidates of many kinds on five real datasets. By hand, for hours.

Pre-trains narrow STU-Nets: on the labels of each of the five datasets (three checkpoints of one of these trainings, and
one with noise on its weights), on the partial labels of two unions, and without labels by three tasks on two datasets
each. Then plans, runs and reports a study (``stunet study``) on the five datasets, in which each candidate is compared
with training from scratch where it has seen no case of the target's dataset. Encoders alone are transferred, which all
candidates have trained. Every step is a command that a user types. With --work, what is finished is not done again.

    python tests/benchmarks/transfer_study.py --work FOLDER --jobs 2
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from experiment import Experiment, make_parser
from scipy.stats import rankdata

from stunet.ranking import leave_one_target_out, mean_agreement
from stunet.ranking.ccfv import VARIANTS
from stunet.study.definition import Study
from stunet.study.results import EARLY, compare, read_results, scores_and_dice

_BRAIN = (
    *("deep_grey=caudate,putamen,pallidum,thalamus,hippocampus,amygdala", "ventricle=lateral_ventricle"),
    *("hindbrain=brain_stem,cerebellum", "white_matter=cerebral_white_matter", "cortex=cerebral_cortex"),
)
_FETAL = (
    *("deep_grey=deep gray matter", "fluid=intra-axial CSF,extra-axial CSF", "hindbrain=cerebellum,brainstem"),
    *("white_matter=white matter,corpus callosum", "cortex=cortical gray matter"),
)


class Target(NamedTuple):
    """What a training sees of a dataset: hundreds of iterations find no small structure of a large volume."""

    patch: str
    test: int
    spacing: str = ""  # in mm; nnU-Net's own where there is none
    merge: tuple[str, ...] = ()


TARGETS = {
    "Dataset004_Hippocampus": Target("24,32,24", 40),
    "Dataset020_ChaosT2": Target("16,32,32", 8, "7.7 5 5"),
    "Dataset027_ACDC": Target("8,48,48", 20),
    "Dataset035_BrainT1": Target("24,32,24", 15, "4 4 4", _BRAIN),
    "Dataset046_FetalBrain": Target("24,32,24", 15, "3.2 3.2 3.2", _FETAL),
}
N_LABELLED = 8
#: Of both body parts, and of both brains.
UNIONS = {140: ((20, 27), Target("16,32,32", 0)), 141: ((35, 46), Target("24,32,24", 0, "4 4 4"))}
TASKS = {"mae": (35, 20), "genesis": (4, 46), "simclr": (27, 35)}
#: The same person scanned twice, and atlases of neighbouring weeks of one cohort.
GROUPS = {
    "Dataset035_BrainT1": [("1003", "1023"), ("1004", "1024"), ("1005", "1025"), ("1018", "1038"), ("1019", "1039")]
}
METRICS = [
    *("ccfv", "logme", "transrate", "leep", "gbc", "zero-shot", "linear-probe"),
    *("topote", "topote-global", "topote-local", "dropout", *VARIANTS),
]


def combine(folder: Path) -> dict[str, Any]:
    """Choose among scores and mean ranks of two of them by leaving one target out, and tell what that comes to."""
    study = Study(folder)
    rows, _failed = read_results(study)
    compare(rows, None, n_resamples=10)
    scores, dice = scores_and_dice(study, rows)
    known = {
        m: of for m, of in scores.items() if EARLY not in m and all(set(of.get(t, ())) == set(dice[t]) for t in dice)
    }
    ranks = {
        m: {t: dict(zip(s, rankdata([*s.values()]), strict=True)) for t, s in of.items()} for m, of in known.items()
    }
    pairs = {
        f"{a}, {b}": {t: {name: ranks[a][t][name] + ranks[b][t][name] for name in of} for t, of in dice.items()}
        for a, b in combinations(ranks, 2)
    }
    found: dict[str, Any] = {}
    for what, choices in {"scores": known, "mean ranks of two": pairs}.items():
        chosen = leave_one_target_out(choices, dice)
        agreement = mean_agreement({t: choices[choice.metric][t] for t, choice in chosen.items()}, dice)
        found[what] = {"chosen": {t: choice.metric for t, choice in chosen.items()}}
        found[what] |= {name: [round(v, 3) for v in (e.value, e.low, e.high)] for name, e in agreement.items()}
    return found


def main() -> None:
    parser = make_parser(__doc__, "")
    parser.add_argument("--pretrain-epochs", type=int, default=20, help="epochs of 50 iterations")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of 50 iterations on the labelled cases")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    Benchmark.print_result(parser)


class Benchmark(Experiment):
    def measure(self) -> dict[str, Any]:
        started = time.monotonic()
        self.prepare()
        calls = {f"labels {number}": partial(self.pretrain, number) for number in (4, 20, 27, 35, 46)}
        calls |= {f"union {number}": partial(self.pretrain, number) for number in UNIONS}
        for task, numbers in TASKS.items():
            calls |= {f"{task} {number}": partial(self.pretrain, number, task) for number in numbers}
        trained = dict(zip(calls, self.all_of([*calls.values()]), strict=True))
        pretraining = time.monotonic() - started
        folder = self.study("encoders", trained)
        return {
            "benchmark": "transfer_study",
            "hours": {"pre-training": pretraining / 3600, "all": (time.monotonic() - started) / 3600},
            "by leaving one target out": combine(folder),
            "results": json.loads((folder / "results.json").read_text()),
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
        }

    def prepare(self) -> None:
        """Let nnU-Net plan and preprocess the datasets, and unions of them with partial labels."""
        if (self.root / "prepared").exists():
            return
        for name, target in TARGETS.items():
            shutil.copytree(self.args.data / name, self.raw / name, dirs_exist_ok=True)
            if target.merge:
                self.merge(self.raw / name, target.merge)
            self.preprocess(int(name[7:10]), target.spacing)
        for number, (sources, target) in UNIONS.items():
            self.run(f"stunet import union -d {number} --from {' '.join(map(str, sources))} --name Union")
            self.preprocess(number, target.spacing)
        (self.root / "prepared").touch()

    def preprocess(self, number: int, spacing: str) -> None:
        more = f" -overwrite_target_spacing {spacing}" if spacing else ""
        self.run(f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 2 -np 2{more}")

    def dataset(self, number: int) -> str:
        return next(path.name for path in self.raw.iterdir() if path.name.startswith(f"Dataset{number:03d}_"))

    def pretrain(self, number: int, task: str | None = None) -> Path:
        name, trainer = f"P_{task or 'labels'}", "STUNetTrainer" if task is None else "STUNetTrainer_pretext"
        fold = self.results / self.dataset(number) / f"{trainer}__{name}__3d_fullres" / "fold_all"
        if not (fold / "checkpoint_final.pth").is_file():
            patch = (UNIONS[number][1] if number in UNIONS else TARGETS[self.dataset(number)]).patch
            batch = {"simclr": 8, None: 2}.get(task, 4)
            settings = f"num_epochs={self.args.pretrain_epochs} num_iterations_per_epoch=50 "
            settings += "num_val_iterations_per_epoch=2 final_validation=false keep_every=2 "
            settings += f"batch_size={batch} patch_size={patch} mirroring=none"
            plan = f"stunet plan -d {number} -c 3d_fullres --depth 1 --width {self.args.width} --name {name}"
            plan += f" --pretext {task}" * (task is not None)
            train = f"stunet train {number} 3d_fullres all -p {name} -tr {trainer} -device cpu --seed 0"
            self.type(f"{plan} --set {settings} && {train}")
        return fold / "checkpoint_final.pth"

    def study(self, name: str, trained: dict[str, Path]) -> Path:
        """Plan, run and report."""
        folder, definition = self.root / name, self.root / f"{name}.yaml"
        self.define(definition, trained)
        self.run(f"stunet study plan {definition} -o {folder} -device cpu")
        self.run_on_all(f"stunet study run {folder} --jobs {self.args.jobs} -device cpu; stunet study report {folder}")
        return folder

    def define(self, definition: Path, trained: dict[str, Path]) -> None:
        scratch = {"name": "scratch", "depth": [1] * 6, "width": self.args.width, "settings": {"head": "fresh"}}
        candidates: list[dict[str, Any]] = [scratch]
        for name, path in trained.items():
            number = int(name.split()[-1])
            sources = [*UNIONS[number][0]] if number in UNIONS else [number]
            facts = {"training cases": sum(self.n_cases(source) for source in sources)}
            candidates.append(
                {"name": name, "path": str(path.relative_to(self.root)), "sources": sources, "facts": facts}
            )
        candidates += self.make_worse(next(each for each in candidates if each["name"] == "labels 35"))
        targets: list[dict[str, Any]] = []
        for name, each in TARGETS.items():
            target: dict[str, Any] = {"dataset": int(name[7:10]), "cases": [N_LABELLED], "test": each.test}
            if name in GROUPS:
                persons = {first: [f"brain_{first}", f"brain_{second}"] for first, second in GROUPS[name]}
                (self.root / f"groups_{name}.json").write_text(json.dumps(persons))
                target["groups"] = f"groups_{name}.json"
            elif "Fetal" in name:  # one cohort is trained on, the other one tested on
                target["groups"] = "^(neurotypical|spina_bifida)"
            targets.append({**target, "settings": {"patch_size": [int(n) for n in each.patch.split(",")]}})
        steps = {"num_epochs": self.args.epochs, "num_iterations_per_epoch": 50, "num_val_iterations_per_epoch": 2}
        settings = {**steps, "batch_size": 2, "initial_lr": 0.01, "head": "fresh-decoder", "mirroring": "none"}
        content = {"targets": targets, "candidates": candidates, "settings": settings, "metrics": self.args.metrics}
        content["seeds"] = self.args.seeds
        content = json.loads(json.dumps(content))  # without aliases, which studies do not take
        definition.write_text(yaml.safe_dump(content, sort_keys=False))

    def make_worse(self, brain: dict[str, Any]) -> list[dict[str, Any]]:
        """The same pre-training after fewer epochs, and with noise on its weights."""
        path = Path(brain["path"])
        worse = {f"epoch {epoch}": path.with_name(f"checkpoint_epoch_{epoch:04d}.pth") for epoch in (2, 10)}
        worse["noisy"] = self.degrade(path)
        return [{**brain, "name": f"{brain['name']}, {how}", "path": str(path)} for how, path in worse.items()]

    def n_cases(self, number: int) -> int:
        return len([*(self.raw / self.dataset(number) / "labelsTr").glob("*.nii.gz")])

    def degrade(self, path: Path) -> Path:
        """Add noise of a weight's own spread to each weight of a checkpoint."""
        noisy = path.with_name("checkpoint_noisy.pth")
        if not (self.root / noisy).is_file():
            content = torch.load(self.root / path, weights_only=False)
            generator = torch.Generator().manual_seed(0)
            for tensor in content["network_weights"].values():
                if tensor.ndim > 1:
                    tensor += torch.randn(tensor.shape, generator=generator) * tensor.std()
            del content["logging"]  # which says how good it was without the noise
            part = (self.root / noisy).with_suffix(".part")
            torch.save(content, part)
            part.rename(self.root / noisy)
        return noisy

    def run_on_all(self, line: str) -> None:
        """Run a line of shell with all cores, whatever the share of one job is."""
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        self.run(f"taskset -cp {cores} $$ >&2; {line}")


if __name__ == "__main__":
    main()
