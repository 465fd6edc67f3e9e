"""What a prediction takes of memory, estimated from headers, plans and file sizes before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from stunet.errors import UsageError
from stunet.inference.images import Geometry
from stunet.inference.model import Model
from stunet.inference.predictor import MemoryPlan, Predictor, network_spacing
from stunet.network import peak_forward_bytes

_HALF, _SINGLE = 2, 4
#: A process that has imported PyTorch and nnU-Net and done nothing; measured 400 MB of its own.
_PROCESS_BYTES = 450 * 2**20
#: Tiles of the resampling, blocks of the preprocessing, buffers of files.
_TEMPORARY_BYTES = 100 * 2**20
#: Convolutions on a CPU reorder their inputs and outputs, and the allocator keeps some of what was freed.
_CONVOLUTION_FACTOR = 1.5


def plan_memory(
    predictor: Predictor, geometries: Sequence[Geometry], budget: int | None, n_preparing: int = 1, n_writing: int = 1
) -> tuple[MemoryPlan, int]:
    """Choose the first plan that fits: nnU-Net's order of additions before any other, and processes that overlap first.

    Args:
        predictor: How is predicted.
        geometries: Images to predict, from their headers.
        budget: Bytes for all processes together; None for what the machine has to spare, and the least where even that
            is not enough.
        n_preparing: Processes that may prepare.
        n_writing: Processes that may write.

    Returns:
        The plan, and the bytes that it is estimated to take.

    Raises:
        UsageError: None fits; names the least that works.
    """
    on_device = predictor.device.type != "cpu" and predictor.results_on_device
    network = 0 if on_device else _network_bytes(predictor)
    limit = available_bytes() if budget is None else budget
    estimates: list[tuple[int, MemoryPlan]] = []
    for plan in _plans(predictor.model, n_preparing, n_writing):
        need = network + max(_case_bytes(predictor.model, g, plan, on_device=on_device) for g in geometries)
        if limit is None or need <= limit:
            return plan, need
        estimates.append((need, plan))
    least, plan = min(estimates, key=lambda estimate: estimate[0])
    if budget is None:
        return plan, least
    largest, gigabytes = max(geometries, key=lambda geometry: geometry.n_voxels), math.ceil(least / 2**30 * 10) / 10
    given = f"--memory {budget / 2**30:.2f}GB"
    raise UsageError(f"{given} is too little for {largest}: give {gigabytes:.1f}GB at least, or fewer folds with -f")


def _plans(model: Model, n_preparing: int, n_writing: int) -> Iterator[MemoryPlan]:
    processes = dict.fromkeys([(n_preparing, n_writing), (min(1, n_preparing), min(1, n_writing)), (0, 0)])
    for average in dict.fromkeys((False, len(model.checkpoints) > 1)):
        yield from (MemoryPlan(0, average, *n) for n in processes)
        if len(model.configuration_manager.patch_size) == 3:
            yield from (MemoryPlan(axis, average, 0, 0) for axis in (1, 2))


def _case_bytes(model: Model, geometry: Geometry, plan: MemoryPlan, *, on_device: bool) -> int:
    """Peak of all processes while an image like this one is predicted, without the network."""
    n_processes, channels, n = 1 + plan.n_preparing + plan.n_writing, model.n_channels, geometry.n_voxels
    shape, spacing = (
        [values[i] for i in model.plans_manager.transpose_forward] for values in (geometry.shape, geometry.spacing)
    )
    grid = [int(side) for side in compute_new_shape(shape, spacing, network_spacing(model, spacing))]
    # The slab of logits, planes that are being resampled, the image and its labels.
    patch = model.configuration_manager.patch_size
    window: list[int] = [1] * (3 - len(patch)) + list(patch)
    padded = [max(sides) for sides in zip(grid, window, strict=True)]
    plane = math.prod(padded) // padded[plan.axis]
    n_slabs = 1 if plan.average_folds else len(model.checkpoints)
    slab = 0 if on_device else _HALF * window[plan.axis] * plane * (n_slabs * model.n_outputs + 1)
    predicting = slab + 4 * _HALF * plane * model.n_outputs + _SINGLE * math.prod(padded) * channels + 2 * n
    # The image as read, in single precision, its mask of non-zero voxels with what fills its holes, the result.
    reading = (2 * geometry.bytes_per_voxel + _SINGLE * (channels + 1)) * n
    cropping = (2 * _SINGLE * channels + 5) * n
    resampling = (_SINGLE * channels + 1) * n + 2 * _SINGLE * channels * math.prod(grid)
    preparing, writing = max(reading, cropping, resampling), 5 * n
    fixed = n_processes * _PROCESS_BYTES + _TEMPORARY_BYTES
    if n_processes == 1:
        return fixed + max(predicting, preparing, writing)
    return fixed + predicting + plan.n_preparing * preparing + plan.n_writing * writing


def _network_bytes(predictor: Predictor) -> int:
    """Weights of all folds and a forward pass."""
    model, patch = predictor.model, predictor.model.configuration_manager.patch_size
    with torch.device("meta"):
        network = model.build_network()
    n_logits = int(predictor.mirroring and bool(model.mirroring_axes)) + int(len(model.checkpoints) > 1)
    weights = sum(parameter.numel() for parameter in network.parameters()) * len(model.checkpoints)
    forward = _CONVOLUTION_FACTOR * peak_forward_bytes(network, (1, model.n_channels, *patch))
    return int(_SINGLE * (weights + n_logits * model.n_outputs * math.prod(patch)) + forward)


def parse_memory(text: str, option: str = "--memory") -> int:
    """Read a size such as ``8GB``, ``700M`` or ``0.5TB`` as bytes; 1 GB is 1024^3 bytes.

    Args:
        text: The size.
        option: Where it stands, for the message.

    Raises:
        UsageError: No such size.

    >>> parse_memory("1.5GB") / 2**30
    1.5
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{option} {text} is no size: give a number with a unit, for example 8GB or 700MB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def available_bytes() -> int | None:
    """Return what this machine, or the container of this process, has to spare; None where that is unknown."""
    found = []
    with suppress(OSError, ValueError, AttributeError, TypeError):
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024)  # type: ignore[index]
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        found.append(limit - used)  # a limit of "max" is none
    return min(found, default=None)
