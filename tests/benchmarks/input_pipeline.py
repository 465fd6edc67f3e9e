"""What nnU-Net's input pipeline costs with 3 and with 105 outputs, and how fast a step it can feed.

python tests/benchmarks/input_pipeline.py [--patches 64 128] [--structures 2 104] [--repetitions 7] [--seconds 8]

One JSON line. A generated case of 256 x 256 x 256 voxels is preprocessed as nnU-Net does; 2 structures are the 104
under two names, so that nothing but their number differs. ``steps`` has seconds of the processor on one core, median
and quartiles, of all that makes a sample: reading (from the page cache), and each transform where it is applied, with
the share of samples in which it is. Three ways of turning and scaling labels go by turns: batchgeneratorsv2's own
interpolation (``stock``), ours with the same result (``local``) and the nearest label (``nearest``). ``sample`` is what
a sample takes on average, the transforms weighed by their shares, and ``ratios`` compare the ways within repetitions.
``workers`` is what nnU-Net's own worker processes deliver at the largest patch and most structures, by the clock, and
what they take of the processors for a sample, look by look; ``keep`` is with memory kept as the page on the input
pipeline advises, here set by mallopt in the workers (glibc only). ``feeds`` says how long a step must take for two
cores to keep up: seconds of a sample times batch, by cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from made_trainers import NARROW, make
from preprocessed_cases import structures, write_preprocessed

from plans import configuration, make_plans
from stunet.cli.env import trainers_folder
from stunet.planning.plans import rewrite_plans
from stunet.training.labels import LocalLabelTransform

T = TypeVar("T")
SHAPE, N_STRUCTURES, BATCH, CORES = (256, 256, 256), 104, 2, 2
WAYS = ("stock", "local", "nearest")
RATIOS = (("stock", "local"), ("stock", "nearest"), ("local", "nearest"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--structures", type=int, nargs="+", default=[2, N_STRUCTURES])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8, help="of each look at the worker processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints a lot
        result = measure(Path(folder), args)
    print(json.dumps(result))


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_extTrainer": str(trainers_folder()), "nnUNet_n_proc_DA": str(CORES)}
    segmentation = structures(SHAPE, N_STRUCTURES)
    augmenters = {
        (patch, count): make_augmenter(root / "nnUNet_preprocessed", segmentation, patch, count)
        for patch in args.patches
        for count in args.structures
    }
    settings = {setting: SampleCosts(augmenter.generator) for setting, augmenter in augmenters.items()}
    for repetition in range(args.repetitions):
        for setting, costs in settings.items():
            np.random.seed(repetition)
            torch.manual_seed(repetition)
            costs.measure()
            print(repetition, setting, costs.sample(repetition), file=sys.stderr)
    largest = max(augmenters)
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "torch": torch.__version__},
        "pipeline": [
            {"patch": patch, "outputs": count + 1, **costs.summary()} for (patch, count), costs in settings.items()
        ],
        "workers": {
            "patch": largest[0], "outputs": largest[1] + 1, "rows": look_at_workers(augmenters[largest], args.seconds),
        },
    }  # fmt: skip


def make_augmenter(preprocessed: Path, segmentation: np.ndarray, patch: int, count: int) -> Any:
    """nnU-Net's training data in worker processes that have been ended again, for a dataset of its own."""
    plans = make_plans()
    plans["dataset_name"] = f"Dataset{patch:03d}_Structures{count}"
    plans["configurations"]["3d_fullres"] = configuration("3d_fullres", [patch] * 3, [[1] * 3] + [[2] * 3] * 5)
    plans = rewrite_plans(plans, size=NARROW, plans_name="STUNetPlans_narrow")
    labels = np.where(segmentation > 0, 1 + segmentation % count, 0).astype(np.int16)
    write_preprocessed(preprocessed / plans["dataset_name"], plans, labels)
    names = {"background": 0, **{f"structure_{label}": label for label in range(1, count + 1)}}
    dataset_json = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}
    trainer = make(plans=plans, dataset_json=dataset_json)
    trainer.initialize()
    train, validation = trainer.get_dataloaders()
    for augmenter in (train, validation):
        augmenter._finish()
    return train


def ways_of(loader: Any) -> dict[str, SpatialTransform]:
    """The spatial transform of a loader with labels in each of the ways."""
    (ours,) = (t for t in loader.transforms.transforms if isinstance(t, SpatialTransform))
    assert isinstance(ours, LocalLabelTransform)
    stock, nearest = (copy.copy(ours) for _ in range(2))
    stock.__class__ = nearest.__class__ = SpatialTransform
    nearest.mode_seg = "nearest"
    return dict(zip(WAYS, (stock, ours, nearest), strict=True))


class SampleCosts:
    """Seconds of the processor for each step of a sample, repetition by repetition.

    Args:
        loader: nnU-Net's loader with its transforms.
    """

    def __init__(self, loader: Any) -> None:
        self._loader, self._ways = loader, ways_of(loader)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._shares: dict[str, float] = {}
        self._labels: list[int] = []

    def measure(self) -> None:
        """Make a sample once more."""
        sample = self._read()
        for index, transform in enumerate(self._loader.transforms.transforms):
            if isinstance(transform, SpatialTransform):
                sample = self._turn(transform, sample)
                continue
            name, share = type(transform).__name__, 1.0
            if isinstance(transform, RandomTransform):
                share, transform = transform.apply_probability, copy.copy(transform.transform)
                share *= getattr(transform, "p_per_channel", 1)
                transform.p_per_channel = 1
                name = f"{index} {type(transform).__name__}"
                if len(self._labels) == 1:
                    transform(**_copied(sample))  # GaussianBlurTransform tries ways of its own first
            given = _copied(sample)
            sample = self._timed(name, share, lambda t=transform, g=given: t(**g))

    def _read(self) -> dict[str, Any]:
        loader = self._loader
        image, labels, _, properties = self._timed(
            "open case and properties", 1, lambda: loader._data.load_case(loader.indices[0])
        )
        lower, upper = loader.get_bbox(image.shape[1:], True, properties["class_locations"])
        box = [list(ends) for ends in zip(lower, upper, strict=True)]
        sample = {
            "image": self._timed("read image", 1, lambda: torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()),
            "segmentation": self._timed(
                "read labels", 1, lambda: torch.from_numpy(crop_and_pad_nd(labels, box, -1, cast_cropped_to=np.int16))
            ),
        }
        self._labels.append(len(torch.unique(sample["segmentation"])))
        return sample

    def _turn(self, transform: SpatialTransform, sample: dict[str, Any]) -> dict[str, Any]:
        """Turn or scale, labels in each way; what comes of it goes on."""
        share = 1 - (1 - transform.p_rotation) * (1 - transform.p_scaling)
        image, labels = sample["image"], sample["segmentation"]
        still = copy.copy(transform)
        still.p_rotation = still.p_scaling = 0
        self._timed("SpatialTransform, cropping", 1 - share, lambda: still(image=image, segmentation=labels))
        parameters, before = {"grid": None}, 0.0
        while parameters["grid"] is None:
            before = time.thread_time()
            parameters = transform.get_parameters(image=image)
        self._note("SpatialTransform, grid", share, time.thread_time() - before)
        apply = transform.apply
        turned = self._timed("SpatialTransform, image", share, lambda: apply({"image": image}, **parameters))
        results = {}
        for way, one in self._ways.items():
            given = {"segmentation": labels}
            name = f"SpatialTransform, labels {way}"
            results[way] = self._timed(name, share, lambda o=one, g=given: o.apply(g, **parameters))["segmentation"]
        if not torch.equal(results["stock"], results["local"]):
            sys.exit("labels differ from batchgeneratorsv2's")
        return {**turned, "segmentation": results["stock"]}

    def _timed(self, name: str, share: float, call: Callable[[], T]) -> T:
        before = time.thread_time()
        result = call()
        self._note(name, share, time.thread_time() - before)
        return result

    def _note(self, name: str, share: float, seconds: float) -> None:
        self._seconds[name].append(seconds)
        self._shares[name] = share

    def sample(self, repetition: int) -> dict[str, float]:
        """Seconds that a sample takes on average, each way, by one repetition's measurements."""
        total = dict.fromkeys(WAYS, 0.0)
        for name, seconds in self._seconds.items():
            for way in WAYS:
                if not name.startswith("SpatialTransform, labels") or name.endswith(way):
                    total[way] += self._shares[name] * seconds[repetition]
        return total

    def summary(self) -> dict[str, Any]:
        """What is printed."""
        samples = [self.sample(repetition) for repetition in range(len(self._labels))]
        by_way = {way: quartiles([sample[way] for sample in samples]) for way in WAYS}
        return {
            "labels_in_patch": quartiles([float(n) for n in self._labels]),
            "steps": {
                name: {"share": round(self._shares[name], 3), **quartiles(seconds)}
                for name, seconds in self._seconds.items()
            },
            "sample": by_way,
            "ratios": {f"{a}/{b}": quartiles([sample[a] / sample[b] for sample in samples]) for a, b in RATIOS},
            "feeds": {
                way: {"samples_per_second_per_core": _rounded(1 / row["median"]),
                      f"seconds_per_step_batch_{BATCH}_cores_{CORES}": _rounded(BATCH * row["median"] / CORES)}
                for way, row in by_way.items()
            },
        }  # fmt: skip


def look_at_workers(augmenter: Any, seconds: float, rounds: int = 2) -> list[dict[str, Any]]:
    """Samples per second that nnU-Net's worker processes deliver, and what they take of the processors for each."""
    loader = augmenter.generator
    ways = ways_of(loader)
    place = next(i for i, t in enumerate(loader.transforms.transforms) if isinstance(t, SpatialTransform))
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    for _ in range(rounds):
        for way, processes, keep in (
            ("nearest", 1, False),
            ("nearest", CORES, True),
            *((w, CORES, False) for w in WAYS),
        ):
            spatial = ways[way]
            loader.transforms.transforms[place] = KeepingMemory(spatial, 1) if keep else spatial
            augmenter.num_processes, augmenter.seeds = processes, list(range(processes))
            with running(augmenter):
                row = rows.setdefault((f"{way}, keep" if keep else way, processes), defaultdict(list))
                for name, value in deliver(augmenter, seconds).items():
                    row[name].append(value)
                print(way, processes, dict(row), file=sys.stderr)
    return [
        {"labels": way, "processes": processes, **{name: [_rounded(v) for v in values] for name, values in row.items()}}
        for (way, processes), row in rows.items()
    ]


class KeepingMemory(RandomTransform):
    """Another transform in a process that does not give large arrays back to the system, from the first sample on."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        return super().apply(data_dict, **params)


@contextlib.contextmanager
def running(augmenter: Any) -> Iterator[None]:
    """Worker processes, ended afterwards."""
    augmenter._start()
    try:
        yield
    finally:
        augmenter._finish()


def deliver(augmenter: Any, seconds: float) -> dict[str, float]:
    """Take batches as fast as they come, from the first one on."""
    next(augmenter)
    workers = [psutil.Process(process.pid) for process in augmenter._processes]

    def busy() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in workers)

    before, start, samples = busy(), time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        samples += len(next(augmenter)["keys"])
    wall, cpu = time.perf_counter() - start, busy() - before
    return {"samples_per_second": samples / wall, "cpu_seconds_per_sample": cpu / samples}


def _copied(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() for key, value in sample.items()}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": _rounded(middle), "q1": _rounded(low), "q3": _rounded(high)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
