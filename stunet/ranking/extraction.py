"""Features of a network at points of one case, read from the maps as they are: nothing is upsampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from stunet.errors import FeatureError
from stunet.ranking.features import FeatureHooks, decoder_stages, unwrap
from stunet.ranking.heads import SourceHead
from stunet.ranking.samples import CaseFeatures
from stunet.ranking.sampling import CasePoints
from stunet.ranking.windows import Window, assign_windows, cut_window

__all__ = ["extract_case", "read_points"]


def read_points(feature_map: Tensor, points: npt.NDArray[np.int64], patch_size: Sequence[int]) -> Tensor:
    """Features at voxels of a window, from a map of this or a coarser resolution.

    Equals the trilinear (or bilinear) interpolation of the map to the window's size, with ``align_corners=False``, at
    these voxels, at the cost of these voxels.

    Args:
        feature_map: ``(C, X, Y[, Z])``.
        points: ``(k, n_axes)``, voxels of the window.
        patch_size: The window's size.

    Returns:
        ``(k, C)``, float32, on the map's device.
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


def extract_case(
    network: nn.Module,
    image: npt.NDArray[Any] | Tensor,
    points: CasePoints,
    *,
    patch_size: Sequence[int],
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    step_size: float = 0.5,
    layers: Sequence[str] | None = None,
    head: SourceHead | None = None,
    source: str = "the network",
    on_window: Callable[[int, int], Any] | None = None,
) -> CaseFeatures:
    """Read features of one case.

    Only those windows of nnU-Net's sliding window are run that hold points, and each point is read from the window in
    which it is most central. On CUDA the network runs in mixed precision, as in nnU-Net's prediction.

    Args:
        network: The network, wrapped or not. Its mode and its deep supervision are afterwards as they were before; it
            is moved to the device and stays there.
        image: ``(C, X, Y, Z)``, preprocessed; an array, or anything that gives arrays when sliced.
        points: Where to read.
        patch_size: Voxels of a window; two axes in a 2D configuration, whose windows are slices along the first axis.
        device: Where the network runs.
        batch_size: Windows that are run at once.
        step_size: Greatest distance of neighbouring windows, in windows. 0.5 as in nnU-Net's prediction; 1 runs the
            fewest windows.
        layers: Names of the layers to read, finest first; the decoder's stages by default.
        head: The source model's own head, for the probabilities.
        source: The checkpoint, for messages.
        on_window: Called with the number of windows that are done, and of all.

    Raises:
        FeatureError: Image and points do not belong together, a layer that does not exist or does not run, or features
            that are not finite; names the layer.
    """
    _check_image(image, points)
    device = torch.device(device)
    names = decoder_stages(network) if layers is None else tuple(layers)
    needed = names if head is None or head.layer in names else (*names, head.layer)
    everywhere = np.concatenate((points.balanced, points.whole))
    windows = assign_windows(everywhere, points.shape, patch_size, step_size=step_size)
    network.to(device)
    read: dict[str, Tensor] = {}
    n_done = 0
    with _as_in_prediction(network, device), FeatureHooks(network, needed) as hooks:
        for batch in _batched(windows, batch_size):
            index = torch.from_numpy(np.concatenate([window.points for window in batch]))
            x = torch.stack([cut_window(image, window.start, patch_size) for window in batch]).to(device)
            for name, values in zip(needed, hooks.run(x, _Reader(batch, patch_size)), strict=True):
                if name not in read:
                    read[name] = torch.empty(len(everywhere), values.shape[1])
                read[name][index] = values.cpu()
            n_done += len(batch)
            if on_window is not None:
                on_window(n_done, len(windows))
    for name in needed:
        _check_finite(read[name], name, points.case, source)
    n = len(points.balanced)
    return CaseFeatures(
        case=points.case,
        labels=points.labels.copy(),
        scales=tuple(read[name][:n].numpy() for name in names),
        variety=tuple(read[name][n:].numpy() for name in names),
        probabilities=None if head is None else head.probabilities(read[head.layer][:n]).numpy(),
    )


class _Reader:
    """Reads the points of a batch of windows from a layer's output, ``(B, C, ...)``: ``(k, C)``, window by window."""

    def __init__(self, windows: Sequence[Window], patch_size: Sequence[int]) -> None:
        self.windows, self.patch_size = windows, patch_size

    def __call__(self, name: str, output: Tensor) -> Tensor:
        if output.ndim != len(self.patch_size) + 2 or len(output) != len(self.windows):
            raise FeatureError(
                "a layer without a feature map",
                got=f"{name} with an output of shape {tuple(output.shape)}",
                expected=f"(B, C) and {len(self.patch_size)} axes, as the patch has, for {len(self.windows)} windows",
                remedy="Name a convolutional layer, and take patch_size from the network's configuration.",
            )
        # Coordinates in half precision would miss the points.
        with torch.autocast(output.device.type, enabled=False):
            parts = zip(output, self.windows, strict=True)
            return torch.cat([read_points(map_, window.local, self.patch_size) for map_, window in parts])


def _batched(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    if batch_size < 1:
        raise FeatureError(
            "impossible batch size", got=batch_size, expected="a whole number from 1", remedy="Correct batch_size."
        )
    remaining = iter(windows)
    while batch := list(islice(remaining, batch_size)):
        yield batch


@contextmanager
def _as_in_prediction(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, the finest head alone, mixed precision on CUDA; and everything back."""
    network = unwrap(network)
    modes = {module: module.training for module in network.modules()}
    decoder = getattr(network, "decoder", None)
    supervised = getattr(decoder, "deep_supervision", None)
    try:
        network.eval()
        if isinstance(supervised, bool):
            decoder.deep_supervision = False  # type: ignore[union-attr]
        with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if isinstance(supervised, bool):
            decoder.deep_supervision = supervised  # type: ignore[union-attr]


def _check_image(image: npt.NDArray[Any] | Tensor, points: CasePoints) -> None:
    if len(image.shape) != 4 or tuple(image.shape[1:]) != tuple(points.shape):
        raise FeatureError(
            f"an image and points of case {points.case} that do not belong together",
            got=f"an image of shape {tuple(image.shape)}",
            expected=f"(C, {', '.join(map(str, points.shape))}), as the segmentation that the points are from",
            remedy="Give image and segmentation of one case from one preprocessed folder.",
        )


def _check_finite(values: Tensor, name: str, case: str, source: str) -> None:
    if n_bad := int((~torch.isfinite(values)).sum()):
        raise FeatureError(
            "features that are not finite",
            got=f"{source}: {name} has {n_bad} NaN or infinite values of {values.numel()} in case {case}",
            expected="finite numbers",
            remedy="Check the image; if it is sound, the weights are not: leave this checkpoint out. On CUDA, mixed "
            "precision may be too narrow for it: read it on the CPU.",
        )
