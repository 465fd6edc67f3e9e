"""Logits of an image, plane by plane, of which no more are in memory than the sliding window is thick.

Windows are visited in the order of their position along one axis. Once all that reach a plane were seen, it is
normalised and given away, and its memory serves the plane that is one window further on. Weights, positions and
precision are nnU-Net's: with the first axis also the order of all additions is, and so is every bit of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor, nn

from stunet.errors import CheckpointError

#: Elements that are added at a time on a CPU: PyTorch makes a copy in single precision of what it adds to.
_CHUNK_ELEMENTS = 2**18


@dataclass(frozen=True)
class WindowGrid:
    """Where the windows lie.

    Attributes:
        window: Voxels ``(X, Y, Z)`` of a window. A 2D network's is one voxel thick.
        steps: First voxels of the windows along each axis.
        flat: Whether the network is 2D.
    """

    window: tuple[int, int, int]
    steps: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    flat: bool

    @property
    def n_windows(self) -> int:
        """How many windows there are."""
        return int(np.prod([len(steps) for steps in self.steps]))


def window_grid(image_size: Sequence[int], patch_size: Sequence[int], step_size: float) -> WindowGrid:
    """Place windows as nnU-Net does: in an image of ``(X, Y, Z)`` voxels, along no axis fewer than the patch has."""
    flat = len(patch_size) == 2
    steps = compute_steps_for_sliding_window(image_size[-len(patch_size) :], patch_size, step_size)
    if flat:
        steps = [list(range(image_size[0])), *steps]
    x, y, z = (tuple(s) for s in steps)
    window = (1, *patch_size) if flat else tuple(patch_size)
    return WindowGrid((window[0], window[1], window[2]), (x, y, z), flat)


def predict_planes(
    image: npt.NDArray[np.float32],
    networks: Sequence[Callable[[Tensor], Tensor]],
    grid: WindowGrid,
    *,
    num_classes: int,
    device: torch.device,
    results_device: torch.device,
    axis: int = 0,
    on_window: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Predict an image and yield its logits plane by plane.

    Args:
        image: ``(C, X, Y, Z)``, along no axis smaller than a window. May be mapped from a file.
        networks: One for each fold, from ``(1, C, X, Y, Z)`` to logits ``(1, K, X, Y, Z)``; their logits are averaged.
        grid: Where the windows lie.
        num_classes: ``K``.
        device: Where the networks are.
        results_device: Where their logits are added up.
        axis: The axis of the image along which planes come.
        on_window: Called after each window.

    Yields:
        Logits of one plane, ``(K, Y, Z)`` of half precision where ``axis`` is the first. They are
        overwritten when the next plane is asked for.

    Raises:
        CheckpointError: A logit is too large for half precision, or no number at all.
    """
    first, others = grid.steps[axis], [i for i in range(3) if i != axis]
    thickness, shape = grid.window[axis], [image.shape[1 + i] for i in others]
    # One for each fold, since nnU-Net rounds each fold's logits to half precision.
    logits = [torch.zeros(num_classes, thickness, *shape, dtype=torch.half, device=results_device) for _ in networks]
    weights = torch.zeros(thickness, *shape, dtype=torch.half, device=results_device)
    gaussian = _gaussian(grid, results_device).movedim(axis, 0)
    for start, stop in zip(first, (*first[1:], image.shape[1 + axis]), strict=True):
        for corner in product(*(grid.steps[i] for i in others)):
            position = list(corner)
            position.insert(axis, start)
            window = _cut(image, position, grid, device)
            for network, sums in zip(networks, logits, strict=True):
                _add(sums, network(window)[0].to(results_device), gaussian, axis, start, corner, grid.flat)
            _add_weights(weights, gaussian, start, corner)
            on_window()
        for plane in range(start, stop):
            slot = plane % thickness
            yield _finish([sums[:, slot] for sums in logits], weights[slot])
            for sums in (*(each[:, slot] for each in logits), weights[slot]):
                sums.zero_()


def mirror_and_predict(network: nn.Module, axes: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """Return a network whose logits are the mean over all mirror images of its input, as in nnU-Net's predictor."""
    combined = [
        [a + 2 for a in subset] for n in range(1, len(axes or ()) + 1) for subset in combinations(axes or (), n)
    ]

    def predict(image: Tensor) -> Tensor:
        with torch.inference_mode(), _autocast(image.device):
            prediction: Tensor = network(image)
            for flipped in combined:
                other = network(image.flip(flipped))
                # Flipping all classes at once would be one more copy of all logits.
                at_once = 1 if image.device.type == "cpu" else other.shape[1]
                for i in range(0, other.shape[1], at_once):
                    prediction[:, i : i + at_once] += other[:, i : i + at_once].flip(flipped)
                del other
            if combined:
                prediction /= len(combined) + 1
            return prediction

    return predict


def average(networks: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return one network whose logits are the mean of those of several, taken window by window."""

    def predict(image: Tensor) -> Tensor:
        with torch.inference_mode():
            first, *others = networks
            total = first(image)
            for network in others:
                total += network(image)
            total /= len(networks)
            return total

    return predict


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cuda") if device.type == "cuda" else contextlib.nullcontext()


def _gaussian(grid: WindowGrid, device: torch.device) -> Tensor:
    size = grid.window[1:] if grid.flat else grid.window
    gaussian: Tensor = compute_gaussian(size, sigma_scale=1 / 8, value_scaling_factor=10, device=device)
    return gaussian[None] if grid.flat else gaussian


def _cut(image: npt.NDArray[np.float32], position: list[int], grid: WindowGrid, device: torch.device) -> Tensor:
    x, y, z = (slice(p, p + n) for p, n in zip(position, grid.window, strict=True))
    window = image[:, x, y, z]
    tensor = torch.from_numpy(np.array(window, dtype=np.float32, order="C"))[None].to(device)
    return tensor[:, :, 0] if grid.flat else tensor


@torch.inference_mode()
def _add(
    sums: Tensor, prediction: Tensor, gaussian: Tensor, axis: int, start: int, corner: Sequence[int], flat: bool
) -> None:
    """Add a window's weighted logits to the slab, in which plane ``p`` lies at ``p`` modulo the slab's thickness."""
    prediction = (prediction[:, None] if flat else prediction).movedim(axis + 1, 1)
    n_classes = len(prediction)
    at_once = max(1, _CHUNK_ELEMENTS // gaussian.numel()) if sums.device.type == "cpu" else n_classes
    for i in range(0, n_classes, at_once):
        group = prediction[i : i + at_once]
        group *= gaussian
        for slab, window in _slab_parts(start, len(gaussian)):
            rows, columns = _in_plane(corner, gaussian)
            sums[i : i + at_once, slab, rows, columns] += group[:, window]


@torch.inference_mode()
def _add_weights(weights: Tensor, gaussian: Tensor, start: int, corner: Sequence[int]) -> None:
    for slab, window in _slab_parts(start, len(gaussian)):
        rows, columns = _in_plane(corner, gaussian)
        weights[slab, rows, columns] += gaussian[window]


def _slab_parts(start: int, thickness: int) -> Iterator[tuple[slice, slice]]:
    """The two parts of a window in a slab that is used in turn, as slices of the slab and of the window."""
    offset = start % thickness
    yield slice(offset, thickness), slice(0, thickness - offset)
    if offset:
        yield slice(0, offset), slice(thickness - offset, thickness)


def _in_plane(corner: Sequence[int], gaussian: Tensor) -> tuple[slice, slice]:
    (row, column), (height, width) = corner, gaussian.shape[1:]
    return slice(row, row + height), slice(column, column + width)


@torch.inference_mode()
def _finish(of_folds: Sequence[Tensor], weights: Tensor) -> Tensor:
    for logits in of_folds:
        torch.div(logits, weights, out=logits)
        if not torch.isfinite(logits).all():
            most = torch.finfo(torch.half).max
            raise CheckpointError(
                f"logits beyond {most:.0f}, which half precision cannot hold: the training has diverged"
            )
    mean, *more = of_folds
    for logits in more:
        mean += logits
    if more:
        mean /= len(of_folds)
    return mean
