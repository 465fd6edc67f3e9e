"""What a prediction takes of memory, estimated from headers, plans and file sizes before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stunet.errors import UsageError
from stunet.inference.preparation import network_grid
from stunet.memory import peak_forward_bytes

if TYPE_CHECKING:
    from stunet.inference.images import Geometry
    from stunet.inference.model import Model

__all__ = ["Strategy", "available_bytes", "choose_strategy", "parse_memory", "prediction_bytes", "stock_bytes"]

_HALF, _SINGLE, _DOUBLE = 2, 4, 8
#: A process that has imported PyTorch and nnU-Net and done nothing; measured 400 MB of its own.
_PROCESS_BYTES = 450 * 2**20
#: Tiles of the resampling, blocks of the preprocessing, buffers of files.
_TEMPORARY_BYTES = 100 * 2**20
#: Convolutions on a CPU reorder their inputs and outputs, and the allocator keeps some of what was freed.
_CONVOLUTION_FACTOR = 1.5
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class Strategy:
    """How memory is used.

    Attributes:
        axis: The axis along which logits are held a window's thickness at a time. Along the first, labels are nnU-Net's
            for the prepared image; along another, where two logits are equal to the last bit or so, either may win.
        average_folds: Whether the logits of several folds are averaged window by window, which takes as much memory as
            one fold and rounds in another order, instead of image by image as nnU-Net does.
        n_preparing: Processes that read and preprocess the next cases; 0 for none beside this one.
        n_writing: Processes that write the last cases.
    """

    axis: int = 0
    average_folds: bool = False
    n_preparing: int = 1
    n_writing: int = 1

    @property
    def exact(self) -> bool:
        """Whether logits are added up in nnU-Net's order."""
        return self.axis == 0 and not self.average_folds


def choose_strategy(
    model: Model,
    geometries: Sequence[Geometry],
    *,
    budget: int | None,
    n_preparing: int = 1,
    n_writing: int = 1,
    mirroring: bool = True,
    on_device: bool = False,
) -> tuple[Strategy, int]:
    """The first strategy that fits: nnU-Net's order of additions before any other, and processes that overlap first.

    Args:
        model: The model.
        geometries: Images to predict, from their headers.
        budget: Bytes for all processes together; None for what the machine has to spare, and the least where even that
            is not enough.
        n_preparing: Processes that may prepare.
        n_writing: Processes that may write.
        mirroring: Whether the model's mirroring axes are used.
        on_device: Whether network and logits are in the memory of a device.

    Returns:
        The strategy, and the bytes that it is estimated to take.

    Raises:
        UsageError: None fits; names the least that works.
    """
    network = 0 if on_device else _network_bytes(model, mirroring=mirroring)
    limit = available_bytes() if budget is None else budget
    estimates: list[tuple[int, Strategy]] = []
    for strategy in _strategies(model, n_preparing, n_writing):
        need = max(prediction_bytes(model, g, strategy, network, on_device=on_device) for g in geometries)
        if limit is None or need <= limit:
            return strategy, need
        estimates.append((need, strategy))
    least, strategy = min(estimates, key=lambda estimate: estimate[0])
    if budget is None:
        return strategy, least
    largest = max(geometries, key=lambda geometry: geometry.n_voxels)
    raise UsageError(
        "a memory budget that is too small",
        got=f"--memory {budget / 2**30:.2f}GB for images of up to {' x '.join(map(str, largest.shape[::-1]))} voxels",
        expected=f"{math.ceil(least / 2**30 * 10) / 10:.1f}GB at least",
        remedy="Give as much, take fewer folds with -f, leave large images out, or predict on a machine with more.",
    )


def _strategies(model: Model, n_preparing: int, n_writing: int) -> Iterator[Strategy]:
    processes = dict.fromkeys([(n_preparing, n_writing), (min(1, n_preparing), min(1, n_writing)), (0, 0)])
    axes = range(3 if len(model.configuration_manager.patch_size) == 3 else 1)
    for average in dict.fromkeys((False, len(model.checkpoints) > 1)):
        for axis in axes:
            if axis == 0:
                yield from (Strategy(axis, average, *n) for n in processes)
            else:
                yield Strategy(axis, average, 0, 0)


def prediction_bytes(
    model: Model, geometry: Geometry, strategy: Strategy, network: int, *, on_device: bool = False
) -> int:
    """Estimated peak of all processes while an image like this one is predicted.

    Args:
        model: The model.
        geometry: Size and spacing of the image.
        strategy: How memory is used.
        network: Bytes of weights and a forward pass.
        on_device: Whether network and logits are in the memory of a device.
    """
    n_processes = 1 + strategy.n_preparing + strategy.n_writing
    fixed = n_processes * _PROCESS_BYTES + _TEMPORARY_BYTES + network
    predicting = _labelling_bytes(model, geometry, strategy, on_device=on_device)
    preparing, writing = _preparing_bytes(model, geometry), _writing_bytes(geometry)
    if not strategy.n_preparing and not strategy.n_writing:
        return fixed + max(predicting, preparing, writing)
    return fixed + predicting + strategy.n_preparing * preparing + strategy.n_writing * writing


def _labelling_bytes(model: Model, geometry: Geometry, strategy: Strategy, *, on_device: bool) -> int:
    """The slab of logits, planes that are being resampled, the image and its labels."""
    configuration = model.configuration_manager
    _, grid = network_grid(geometry, model.plans_manager, configuration)
    window: list[int] = [1] * (3 - len(configuration.patch_size)) + list(configuration.patch_size)
    padded = [max(n, w) for n, w in zip(grid, window, strict=True)]
    plane = math.prod(padded) // padded[strategy.axis]
    n_slabs = 1 if strategy.average_folds else len(model.checkpoints)
    slab = 0 if on_device else _HALF * window[strategy.axis] * plane * (n_slabs * model.n_outputs + 1)
    planes = 4 * _HALF * plane * model.n_outputs
    image = _SINGLE * math.prod(padded) * model.n_channels
    return slab + planes + image + 2 * geometry.n_voxels


def _preparing_bytes(model: Model, geometry: Geometry) -> int:
    """The image as read, in single precision, its mask of non-zero voxels with what fills its holes, the result."""
    _, grid = network_grid(geometry, model.plans_manager, model.configuration_manager)
    channels = model.n_channels
    reading = (2 * geometry.bytes_per_voxel + _SINGLE * (channels + 1)) * geometry.n_voxels
    cropping = (2 * _SINGLE * channels + 5) * geometry.n_voxels
    resampling = (_SINGLE * channels + 1) * geometry.n_voxels + 2 * _SINGLE * channels * math.prod(grid)
    return max(reading, cropping, resampling)


def _writing_bytes(geometry: Geometry) -> int:
    return 5 * geometry.n_voxels


def _network_bytes(model: Model, *, mirroring: bool) -> int:
    configuration = model.configuration_manager
    shape = (1, model.n_channels, *configuration.patch_size)
    with torch.device("meta"):
        network = model.build_network()
    logits: int = _SINGLE * model.n_outputs * math.prod(configuration.patch_size)
    n_more = int(mirroring and bool(model.mirroring_axes)) + int(len(model.checkpoints) > 1)
    weights = _SINGLE * sum(parameter.numel() for parameter in network.parameters()) * len(model.checkpoints)
    return weights + int(_CONVOLUTION_FACTOR * peak_forward_bytes(network, shape)) + n_more * logits


def stock_bytes(model: Model, geometry: Geometry) -> int:
    """Estimated peak of ``nnUNetv2_predict`` on the same image.

    It holds the logits of all classes on the network's grid twice in half precision, in the process that predicts and
    in the one that exports, there once more in double precision, and in half precision on the original grid.
    """
    _, grid = network_grid(geometry, model.plans_manager, model.configuration_manager)
    n_logits, n_resampled = (n * model.n_outputs for n in (math.prod(grid), geometry.n_voxels))
    if tuple(grid) == tuple(geometry.shape[i] for i in model.plans_manager.transpose_forward):
        return 3 * _PROCESS_BYTES + (2 * _HALF) * n_logits + _DOUBLE * geometry.n_voxels
    resampling = _DOUBLE * n_logits + _HALF * n_resampled + _DOUBLE * geometry.n_voxels
    return 3 * _PROCESS_BYTES + 2 * _HALF * n_logits + resampling


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of a size such as ``8GB``, ``700M`` or ``0.5TB``; 1 GB is 1024^3 bytes.

    Args:
        text: The size.
        option: Where it stands, for the message.

    Raises:
        UsageError: No such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise UsageError(
            "a memory budget that is no size",
            got=text,
            expected="a number with a unit, for example 8GB or 700MB",
            remedy=f"Correct {option}.",
        )
    return int(float(match[1]) * _UNITS[match[2]])


def available_bytes() -> int | None:
    """Memory that this machine, or the container that this process runs in, has to spare; None where it is unknown."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo):
            found.append(int(match[1]) * 1024)
    with suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            found.append(int(limit) - used)
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None
