"""``stunet predict`` beside ``nnUNetv2_predict_from_modelfolder``, by turns: seconds and peak memory of all processes.

python tests/benchmarks/prediction.py [--classes 3 25 105] [--lengths 1 4] [--repetitions 1] [--whole-body 900]

One JSON line. A generated volume of 160 x 256 x 256 voxels at 1.5 x 0.75 x 0.75 mm, a narrow STU-Net for 1.5 mm and
windows of 64 x 64 x 64, on the cores that this process may use. ``above_base`` leaves out what the same command takes
for a volume of a window of 16: the programs themselves. ``growth`` is our peak for the volume that is so many times as
long, by our peak for the plain one. Seconds of the processor are less disturbed by a busy machine than those of the
clock. ``--whole-body Z`` instead predicts one volume of 512 x 512 x Z voxels at 0.8 mm with a budget of 4 GB, and says
what nnU-Net would need; where the machine has that, nnU-Net predicts it too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from stunet.inference import Case, Model, load_model, read_geometry
from stunet.inference.images import Geometry
from stunet.inference.predictor import network_spacing
from stunet.network import STUNetSize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prediction_models import smooth_image, write_image, write_model
from processes import run

GB = 2**30
#: Narrow, as it is not the network that is measured, yet wide enough for oneDNN's vector kernels: with 4 channels a
#: convolution takes eight times as long as with 8.
NETWORK: dict[str, Any] = {"size": STUNetSize("d111111w8", (1,) * 6, 8), "n_strides": 4}
SHAPE, SPACING = (160, 256, 256), (1.5, 0.75, 0.75)
STOCK = "nnUNetv2_predict_from_modelfolder -i {images} -o {output} -m {model} -f 0 -device $DEVICE -npp 1 -nps 1"
OURS = "stunet predict -i {images} -o {output} -m {model} -f 0 -device $DEVICE --disable_progress_bar"


def measured(command: str, images: Path, output: Path, model: Path) -> dict[str, float]:
    """Seconds by the clock and of the processors, and the peak of memory in GB."""
    cores = str(len(os.sched_getaffinity(0)))  # nnU-Net counts those of the machine unless it is told
    environment = {**os.environ, "nnUNet_def_n_proc": cores}
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = run(command.format(images=images, output=output, model=model), environment, interval=0.2)
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"seconds": wall, "cpu_seconds": cpu, "peak_gb": peak / GB}
    print(command.split()[0], images.name, model.name, row, file=sys.stderr)
    return row


def medians(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {
        name: {
            "median": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for name in rows[0]
        if (values := [row[name] for row in rows])
    }


def compare(workspace: Path, num_classes: int, base: dict[str, float], repetitions: int) -> dict[str, Any]:
    model = write_model(
        workspace / f"model_{num_classes}", num_classes=num_classes, patch=(64,) * 3, spacing=(1.5,) * 3, **NETWORK
    )
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    differ = []
    for i in range(repetitions):
        for side, command in (("ours", OURS), ("stock", STOCK)):
            output = workspace / f"{side}_{num_classes}_{i}"
            rows[side].append(measured(command, workspace / "plain", output, model))
        differ.append(differing(*(workspace / f"{side}_{num_classes}_{i}" / "a.nii.gz" for side in rows)))
    ratios = {
        f"ratio_{name}": round(statistics.median(o[name] / s[name] for o, s in zip(*rows.values(), strict=True)), 3)
        for name in rows["ours"][0]
    }
    above = {side: round(max(row["peak_gb"] for row in rows[side]) - base[side], 2) for side in rows}
    return {**{side: medians(rows[side]) for side in rows}, **ratios, "above_base_gb": above, "voxels_differ": differ}


def differing(ours: Path, stock: Path) -> int:
    import SimpleITK as sitk

    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (ours, stock))
    return int((first != second).sum())


def bases(workspace: Path) -> dict[str, float]:
    """Peaks of the programs themselves."""
    model = write_model(workspace / "tiny_model", num_classes=3, patch=(16,) * 3, size=NETWORK["size"])
    write_image(workspace / "tiny" / "a_0000.nii.gz", smooth_image((16, 16, 16)))
    return {
        side: measured(command, workspace / "tiny", workspace / f"tiny_{side}", model)["peak_gb"]
        for side, command in (("ours", OURS), ("stock", STOCK))
    }


def growth(workspace: Path, num_classes: int, times: int) -> dict[str, float]:
    images = workspace / f"long_{times}"
    write_image(images / "a_0000.nii.gz", smooth_image((SHAPE[0] * times, *SHAPE[1:])), SPACING)
    return measured(OURS, images, workspace / f"long_out_{times}", workspace / f"model_{num_classes}")


def whole_body(workspace: Path, length: int, patch: int, num_classes: int) -> dict[str, Any]:
    model = write_model(workspace / "model", num_classes=num_classes, patch=(patch,) * 3, spacing=(1.5,) * 3, **NETWORK)
    plane = smooth_image((1, 512, 512))[0]
    image = np.stack([np.roll(plane, 3 * i, axis=1) + i // 4 for i in range(length)]).astype(np.int16)
    path = write_image(workspace / "images" / "a_0000.nii.gz", image, (0.8,) * 3)
    geometry = read_geometry(Case("a", (path,)), 1)
    stock = stock_bytes(load_model(model), geometry) / GB
    sides = {"ours": OURS + " --memory 4GB"}
    if stock < 0.8 * psutil.virtual_memory().available / GB:
        sides["stock"] = STOCK
    described = {"voxels": geometry.shape[::-1], "patch": patch, "classes": num_classes}
    rows = {
        side: {
            key: round(value, 2) for key, value in measured(line, workspace / "images", workspace / side, model).items()
        }
        for side, line in sides.items()
    }
    return {**described, **rows, "stock_would_need_gb": round(stock, 1)}


def stock_bytes(model: Model, geometry: Geometry) -> int:
    """Estimated peak of ``nnUNetv2_predict`` on the same image.

    It holds the logits of all classes on the network's grid twice in half precision, in the process that predicts and
    in the one that exports, there once more in double precision, and in half precision on the original grid.
    """
    shape, spacing = ([values[i] for i in model.plans_manager.transpose_forward] for values in
                      (geometry.shape, geometry.spacing))  # fmt: skip
    grid = compute_new_shape(shape, spacing, network_spacing(model, spacing))
    n_logits, n_resampled = (math.prod(map(int, n)) * model.n_outputs for n in (grid, shape))
    resampling = 4 * n_logits if list(grid) == shape else (8 + 4) * n_logits + 2 * n_resampled
    return 3 * 450 * 2**20 + resampling + 8 * math.prod(geometry.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", nargs="+", type=int, default=[3, 25, 105])
    parser.add_argument("--lengths", nargs="*", type=int, default=[4])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--whole-body", type=int)
    parser.add_argument("--patch", type=int, default=64, help="of --whole-body")
    parser.add_argument("--work", type=Path, help="a folder to work in")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ["DEVICE"] = arguments.device  # as the commands take it
    result: dict[str, Any] = {"benchmark": "prediction"}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        workspace = Path(folder)
        if arguments.whole_body:
            result["whole_body"] = whole_body(workspace, arguments.whole_body, arguments.patch, max(arguments.classes))
        else:
            write_image(workspace / "plain" / "a_0000.nii.gz", smooth_image(SHAPE), SPACING)
            base = bases(workspace)
            result["base_gb"] = {side: round(value, 2) for side, value in base.items()}
            for num_classes in arguments.classes:
                result[f"classes_{num_classes}"] = compare(workspace, num_classes, base, arguments.repetitions)
            most = max(arguments.classes)
            plain = result[f"classes_{most}"]["ours"]["peak_gb"]["max"]
            for times in arguments.lengths:
                long = growth(workspace, most, times)
                result[f"growth_{times}"] = {
                    "peak_gb": round(long["peak_gb"], 2),
                    "ratio": round(long["peak_gb"] / plain, 2),
                    "ratio_above_base": round((long["peak_gb"] - base["ours"]) / (plain - base["ours"]), 2),
                }
    result["cores"] = len(os.sched_getaffinity(0))
    result["versions"] = {name: version(name) for name in ("stunet", "nnunetv2", "torch", "numpy")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
