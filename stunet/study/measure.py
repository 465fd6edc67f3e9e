"""What one cell of a study costs, and what it has given."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stunet.evaluation import evaluate
from stunet.network import build_stunet
from stunet.planning.plans import fit_strides
from stunet.planning.preprocessed import PreprocessedDataset
from stunet.sizes import STUNetSize
from stunet.weights.read import read_checkpoint


def step_seconds(
    size: STUNetSize, dataset: PreprocessedDataset, settings: Mapping[str, Any], device: str
) -> tuple[float, int]:
    """Measure a forward and backward pass of a network, in seconds of a whole batch, and count its parameters.

    On the CPU it is one pass over the smallest patch that is worth it, scaled by the number of voxels.
    """
    planned = dataset.configuration
    patch = [int(n) for n in settings.get("patch_size") or planned["patch_size"]]
    strides = fit_strides(planned["architecture"]["arch_kwargs"]["strides"])
    conv_op, n_outputs = nn.Conv3d if len(patch) == 3 else nn.Conv2d, len(dataset.structures) + 1
    network = build_stunet(size, dataset.input_channels, n_outputs, strides, deep_supervision=True, conv_op=conv_op).to(
        device
    )
    small = list(patch)
    if device == "cpu":
        least = [2 * math.prod(int(stage[axis]) for stage in strides) for axis in range(len(patch))]
        small = [min(n, max(32, low)) for n, low in zip(patch, least, strict=True)]
    images = torch.randn(1, dataset.input_channels, *small, device=device)
    seconds = math.inf
    for _ in range(2):  # the first pass also prepares kernels
        started = time.monotonic()
        torch.autograd.backward(torch.stack([level.float().square().mean() for level in network(images)]).sum())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.monotonic() - started)
    batch = int(settings.get("batch_size") or planned["batch_size"])
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    return seconds * batch * math.prod(patch) / math.prod(small), n_parameters


def score_fold(fold: Path, dataset: str, test: Sequence[str]) -> dict[str, Any]:
    """Score what a trained fold has predicted of the test cases.

    Returns:
        ``cases``: for each of them, Dice and normalised surface Dice of each structure, null where it has none.
        ``curve``: for each epoch, nnU-Net's pseudo Dice on patches of the test cases.
    """
    results = evaluate(fold / "validation", dataset, model=fold.parent, cases=test)
    if results.failed:
        raise next(iter(results.failed.values()))
    names = [structure.comparison.name for structure in results.structures]
    cases = {}
    for case, found in results.cases.items():
        scored = dict(zip(names, found.scores, strict=True))
        cases[case] = {name: {m: score.metrics[m] for m in ("Dice", "NSD")} for name, score in scored.items()}
    logged = read_checkpoint(fold / "checkpoint_final.pth")["logging"]["mean_fg_dice"]
    return {"cases": cases, "curve": [round(float(value), 4) for value in logged]}
