"""Voxels of a target's cases, the same ones for every checkpoint, and a network's features at them.

Feature maps are read as they are: nothing is upsampled, and only the windows that hold points are run.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor, nn
from torch.nn.functional import grid_sample, linear

from stunet.errors import DatasetError, FeatureError, TransferabilityError

Integers = npt.NDArray[np.int64]
Part = Literal["encoder", "decoder"]

_STEP = 0.5  # between windows, in windows, as in nnU-Net's prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class CasePoints:
    """Voxels drawn from one case."""

    case: str  # its name
    shape: tuple[int, ...]  # the volume that they lie in, (X, Y, Z)
    balanced: Integers  # (n, 3), voxels of each class in turn
    labels: Integers  # (n,), their classes
    whole: Integers  # (m, 3), voxels of the whole volume, whatever their class
    whole_labels: Integers  # (m,), their classes
    per_class: int  # how many of each class were asked for
    n_whole: int  # how many of the whole volume were asked for
    voxels: Mapping[int, int]  # for each class in the case how many voxels it has
    annotated: frozenset[int]  # label values of the structures that the case annotates

    def as_dict(self) -> dict[str, Any]:
        """Return what was asked for and what there was, for JSON."""
        whole = {"asked": self.n_whole, "drawn": len(self.whole)}
        fewer = {label: count for label, count in self.voxels.items() if count < self.per_class}
        return {"case": self.case, "per_class": self.per_class, "voxels": self.voxels, "fewer": fewer, "whole": whole}


def draw_points(
    segmentation: npt.NDArray[np.integer[Any]],
    *,
    case: str,
    per_class: int,
    n_whole: int,
    seed: int = 0,
    ignore_label: int | None = None,
    annotated: frozenset[int] | None = None,
) -> CasePoints:
    """Draw voxels of a case without replacement: some of each class that it has, and some of the whole volume.

    Voxels below 0 (nnU-Net marks -1 what lies outside the image's nonzero part) and those of the ignore label are never
    drawn. The draw depends on the seed, the case's name and its labels alone: neither on the order of the cases nor,
    for the voxels of one class, on what other classes there are. Where a class has fewer voxels than asked for, all
    are taken.

    >>> segmentation = np.repeat([-1, 0, 1], 9).reshape(3, 3, 3)
    >>> drawn = draw_points(segmentation, case="case_1", per_class=2, n_whole=20)
    >>> drawn.labels, drawn.balanced[:, 0], len(drawn.whole)
    (array([0, 0, 1, 1]), array([1, 1, 2, 2]), 18)

    Args:
        segmentation: Labels ``(X, Y, Z)``, as nnU-Net's preprocessing leaves them.
        case: Name of the case.
        per_class: Voxels of each class, background included.
        n_whole: Voxels of the whole volume.
        seed: Any whole number from 0.
        ignore_label: Label of voxels that nobody annotated.
        annotated: Label values of the structures that the case annotates; by default of those that it has.

    Raises:
        DatasetError: There is no voxel to draw.
    """
    known = segmentation >= 0
    if ignore_label is not None:
        known &= segmentation != ignore_label
    everywhere = np.flatnonzero(known)
    present = segmentation.ravel()[everywhere]
    voxels = {label: count for label, count in enumerate(np.bincount(present).tolist()) if count}
    if not voxels:
        raise DatasetError(f"case {case} has no voxel to draw, only ignored ones or none in the image: leave it out")
    digest = int.from_bytes(hashlib.sha256(case.encode()).digest()[:16], "big")

    def draw(stream: int, candidates: Integers, asked: int) -> Integers:
        if len(candidates) > asked:
            generator = np.random.default_rng([seed, digest, stream])
            candidates = candidates[np.sort(generator.choice(len(candidates), size=asked, replace=False))]
        return np.stack(np.unravel_index(candidates, segmentation.shape), axis=1)

    drawn = [draw(label + 1, everywhere[present == label], per_class) for label in voxels]
    whole = draw(0, everywhere, n_whole)
    return CasePoints(
        case=case,
        shape=segmentation.shape,
        balanced=np.concatenate(drawn),
        labels=np.repeat(np.array(list(voxels), np.int64), list(map(len, drawn))),
        whole=whole,
        whole_labels=segmentation[tuple(whole.T)].astype(np.int64),
        per_class=per_class,
        n_whole=n_whole,
        voxels=voxels,
        annotated=frozenset(voxels) - {0} if annotated is None else annotated,
    )


@dataclass(frozen=True, eq=False)
class Window:
    """A window and the points that are read from it."""

    start: tuple[int, ...]  # first voxel on each axis of the volume; below 0 where there is padding on both sides
    points: Integers  # (k,), which of the points it holds
    local: Integers  # (k, n_axes), where these lie in the window; of a 2D window, its two axes


def assign_windows(points: Integers, shape: Sequence[int], patch_size: Sequence[int]) -> list[Window]:
    """Find the windows of nnU-Net's sliding window that hold points; each point in the one in which it is most central.

    That is the window with the greatest weight at this point when nnU-Net merges its predictions: its Gaussian is a
    product over the axes, and so is the choice.

    Args:
        points: ``(n, 3)``, voxels in the volume.
        shape: The volume, ``(X, Y, Z)``.
        patch_size: The window. With two axes, as in 2D configurations, windows are slices along the first axis.
    """
    n_flat = len(shape) - len(patch_size)
    starts = points.copy()
    for axis, (size, patch) in enumerate(zip(shape[n_flat:], patch_size, strict=True), start=n_flat):
        if size > patch:
            steps = np.array(compute_steps_for_sliding_window((size,), (patch,), _STEP)[0])
        else:
            steps = np.array([-((patch - size) // 2)])  # in the middle, as nnU-Net pads
        local = points[:, axis, None] - steps
        # The Gaussian's centre is not the middle of an even number of voxels, so the nearest may miss the point.
        distances = np.where((local >= 0) & (local < patch), np.abs(local - patch // 2), patch)
        starts[:, axis] = steps[np.argmin(distances, axis=1)]
    distinct, window_of = np.unique(starts, axis=0, return_inverse=True)
    groups = np.split(np.argsort(window_of.ravel(), kind="stable"), np.cumsum(np.bincount(window_of.ravel()))[:-1])
    return [
        Window(tuple(map(int, start)), group, (points[group] - start)[:, n_flat:])
        for start, group in zip(distinct, groups, strict=True)
    ]


def cut_window(image: Any, start: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """Cut a window ``(C, *patch_size)`` of an image ``(C, X, Y, Z)``, padded as nnU-Net pads: with 0, on both sides."""
    n_flat = len(start) - len(patch_size)
    slices = (slice(max(first, 0), first + n) for first, n in zip(start[n_flat:], patch_size, strict=True))
    index = (slice(None), *start[:n_flat], *slices)
    cut = torch.tensor(np.asarray(image[index], np.float32))
    padded: Tensor = pad_nd_image(cut, tuple(patch_size), "constant", {"value": 0})
    return padded


def read_stages(network: nn.Module, x: Tensor, read: Callable[[Any], Tensor], part: Part) -> list[Tensor]:
    """Run a network once, and return what ``read`` makes of the output of each stage of a part of it, finest first.

    Of STU-Net and of nnU-Net's networks. The stages, not the heads: nnU-Net's decoders compute the coarse heads in
    training alone.

    Args:
        network: The network.
        x: ``(B, C, X, Y[, Z])``.
        read: Takes an output ``(B, C_d, ...)`` as soon as it is there: later layers may change it in place, and what is
            not kept need not stay in memory.
        part: ``decoder`` or ``encoder``.

    Raises:
        FeatureError: The network has no such stages, or one does not run.
    """
    stages = getattr(getattr(network, part, None), "stages", ())
    outputs: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[index] = read(output)

    handles = [stage.register_forward_hook(partial(keep, index)) for index, stage in enumerate(stages)]
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs or len(outputs) < len(stages):
        got = f"{len(outputs)} of the {len(stages)} stages in {part}.stages of a {type(network).__name__} run"
        raise FeatureError(f"{got}: leave this checkpoint out, all stages are compared")
    return [outputs[index] for index in (range(len(stages))[:: -1 if part == "decoder" else 1])]


def read_points(feature_map: Tensor, points: Integers, patch_size: Sequence[int]) -> Tensor:
    """Read features ``(k, C)`` at voxels ``(k, n_axes)`` of a window from a map ``(C, X, Y[, Z])`` of any resolution.

    Equals the trilinear (or bilinear) interpolation of the map to the window's size, with ``align_corners=False``, at
    these voxels, at the cost of these voxels. The result is float32, on the map's device.
    """
    if tuple(feature_map.shape[1:]) == tuple(patch_size):  # each point is a voxel of the map
        voxels: Any = (slice(None), *torch.from_numpy(points).to(feature_map.device).unbind(1))
        return feature_map[voxels].T.float()
    n_axes = len(patch_size)
    # From -1 to 1 between the outer faces of the first and the last voxel; grid_sample counts axes from the last.
    grid = torch.from_numpy(((2 * points + 1) / np.array(patch_size) - 1)[:, ::-1].astype(np.float32))
    grid = grid.reshape(1, *[1] * (n_axes - 1), -1, n_axes).to(feature_map.device)
    values = grid_sample(feature_map[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values.reshape(len(feature_map), -1).T


class SourceHead(NamedTuple):
    """A checkpoint's finest head: a convolution of one voxel, whose output at a point needs features there."""

    weight: Tensor  # (K, C), for features of the decoder's finest stage
    bias: Tensor  # (K,)

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the softmax ``(n, K)`` of the head's logits for float32 features ``(n, C)``."""
        return linear(features, self.weight, self.bias).softmax(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseFeatures:
    """What a checkpoint makes of one case of the target dataset, at points.

    Raises:
        TransferabilityError: Features that are not finite.
    """

    case: str  # its name
    labels: npt.NDArray[np.integer]  # (n,), class of each class-balanced point; 0 is background, which is among them
    scales: tuple[npt.NDArray[np.float32], ...]  # (n, C_d) features at these points, for each scale, finest first
    variety: tuple[npt.NDArray[np.float32], ...]  # (m, C_d) features at points of the whole volume, for each scale
    # (n, K) softmax outputs of the checkpoint's own head at the class-balanced points, which LEEP needs
    probabilities: npt.NDArray[np.float32] | None = None
    points: CasePoints | None = None  # where the features were read, which scores by Dice or by boundaries need
    head: SourceHead | None = None  # the checkpoint's own head, which scores of its own predictions need

    def __post_init__(self) -> None:
        for index, array in enumerate((*self.scales, *self.variety)):
            if n_bad := int(array.size - np.isfinite(array).sum()):
                got = f"scale {index % len(self.scales)}: {n_bad} of {array.size} values are NaN or infinite"
                raise TransferabilityError(f"{got} in case {self.case}: check weights and image, use single precision")


def extract_case(
    network: nn.Module,
    image: npt.NDArray[np.floating[Any]],
    points: CasePoints,
    *,
    patch_size: Sequence[int],
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    head: SourceHead | None = None,
    part: Part = "decoder",
    on_window: Callable[[float], Any] = lambda share: None,
) -> CaseFeatures:
    """Read a network's features of one case.

    Each point is read from the window of nnU-Net's sliding window in which it is most central. On CUDA the network runs
    in mixed precision, as in nnU-Net's prediction.

    Args:
        network: The network in evaluation mode, without deep supervision. It is moved to the device and stays there.
        image: ``(C, X, Y, Z)``, preprocessed.
        points: Where to read.
        patch_size: Voxels of a window; two axes in a 2D configuration.
        device: Where the network runs.
        batch_size: Windows at once.
        head: The checkpoint's own head, for the probabilities; of features of the decoder.
        part: Whose stages are read.
        on_window: Called with the share of the windows that are done.

    Raises:
        FeatureError: A decoder without maps.
        TransferabilityError: Features that are not finite.
    """
    device = torch.device(device)
    everywhere = np.concatenate((points.balanced, points.whole))
    windows = assign_windows(everywhere, points.shape, patch_size)
    network.to(device)
    scales: list[Tensor] = []
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            index = torch.from_numpy(np.concatenate([window.points for window in batch]))
            x = torch.stack([cut_window(image, window.start, patch_size) for window in batch]).to(device)
            values = read_stages(network, x, partial(_read_windows, batch, patch_size), part)
            scales = scales or [torch.empty(len(everywhere), rows.shape[1]) for rows in values]
            for scale, rows in zip(scales, values, strict=True):
                scale[index] = rows.cpu()
            on_window(min(first + batch_size, len(windows)) / len(windows))
    n = len(points.balanced)
    return CaseFeatures(
        case=points.case,
        labels=points.labels,
        scales=tuple(scale[:n].numpy() for scale in scales),
        variety=tuple(scale[n:].numpy() for scale in scales),
        probabilities=None if head is None else head.probabilities(scales[0][:n]).numpy(),
        points=points,
        head=head,
    )


def _read_windows(windows: Sequence[Window], patch_size: Sequence[int], output: Any) -> Tensor:
    """Read the points of a batch of windows from a stage's output ``(B, C, ...)``: ``(k, C)``, window by window."""
    if not isinstance(output, Tensor) or output.ndim != len(patch_size) + 2 or len(output) != len(windows):
        got = f"{type(output).__name__} {list(getattr(output, 'shape', []))}"
        raise FeatureError(f"a stage gives a {got}, no map of {len(windows)} windows: leave it out")
    # Coordinates in half precision would miss the points.
    with torch.autocast(output.device.type, enabled=False):
        maps = zip(output, windows, strict=True)
        return torch.cat([read_points(feature_map, window.local, patch_size) for feature_map, window in maps])
