"""Labels in a training: what a batch annotates, how that is scored, and faster augmentation of many structures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from stunet.datasets.raw import has_annotations, read_annotations
from stunet.errors import LabelError
from stunet.labels.annotations import AnnotationManifest
from stunet.loss import label_members

#: What an indicator counts inside its label; half precision rounds the scores, so it decides on ties.
_SCALE = 1000.0
#: Voxels by which a coordinate computed here may differ from grid_sample's own.
_MARGIN = 0.01


class LeafLabels(LabelManager):
    """Labels of preprocessed data with superclasses, which a network has no outputs for."""

    leaves: Sequence[int]

    @property
    def foreground_labels(self) -> list[int]:
        """Label values that are predicted and scored."""
        return list(self.leaves)

    @property
    def num_segmentation_heads(self) -> int:
        """C: the background and the leaves."""
        return 1 + len(self.leaves)


class PartialLabels:
    """A dataset's annotation manifest as a training sees it.

    Attributes:
        members: ``(L, C)``, boolean: the outputs that each label value stands for; superclasses come last.

    Raises:
        LabelError: Leaves with gaps between their values, or superclasses that do not follow them.
    """

    def __init__(self, manifest: AnnotationManifest) -> None:
        leaves, superclasses = sorted(manifest.leaves), sorted(manifest.superclasses)
        if [*leaves, *superclasses] != list(range(1, 1 + len(leaves) + len(superclasses))):
            got = f"structures {leaves}, superclasses {superclasses}"
            raise LabelError(f"{got}: number from 1, then the superclasses, without gaps")
        self.manifest = manifest
        self.members = label_members(1 + len(leaves), manifest.superclasses)

    @classmethod
    def read(cls, dataset_name: str, dataset_json: dict[str, Any]) -> PartialLabels | None:
        """Read those of a preprocessed dataset; None where every case annotates everything."""
        return cls(read_annotations(dataset_name, dataset_json)) if has_annotations(dataset_name) else None

    @property
    def num_outputs(self) -> int:
        """C: the background and the leaves."""
        return int(self.members.shape[1])

    def of_leaves(self, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
        """Describe a dataset without its superclasses, which no network has outputs for."""
        labels = {n: v for n, v in dataset_json["labels"].items() if v not in self.manifest.superclasses}
        if "ignore" in labels:  # which nnU-Net wants right after the others
            labels["ignore"] = self.num_outputs
        return {**dataset_json, "labels": labels}

    def label_manager(self, dataset_json: Mapping[str, Any]) -> LeafLabels:
        """Return the labels of the preprocessed data as nnU-Net asks for them."""
        labels = LeafLabels(dataset_json["labels"], dataset_json.get("regions_class_order"))
        labels.leaves = sorted(self.manifest.leaves)
        return labels

    def mask(self, cases: Iterable[str]) -> Tensor:
        """Return which label values each case of a batch annotates, ``(B, L)``, boolean."""
        return torch.from_numpy(np.stack([self.manifest.annotated_mask(case) for case in cases]))

    def check_every_leaf_is_annotated(self, cases: Sequence[str]) -> None:
        """Refuse training cases that leave some structure out everywhere: nothing tells it from the background."""
        somewhere = self.mask(cases).any(0)
        nowhere = [self.manifest.names[value] for value in self.manifest.leaves if not somewhere[value]]
        if nowhere:
            listed = ", ".join(nowhere[:8]) + (f" and {len(nowhere) - 8} more" if len(nowhere) > 8 else "")
            raise LabelError(f"no training case annotates {listed}: add cases, or --set allow_unannotated=true")

    def describe(self, cases: Sequence[str]) -> str:
        """Describe in a line of the log how much the training cases annotate."""
        mean, n = self.mask(cases)[:, 1:].sum(1).double().mean(), self.num_outputs - 1
        what = f"{len(cases)} training cases annotate {mean:.1f} of {n} structures on average"
        return f"Partial labels: {what} ({self.manifest.source})"

    def sampling_probabilities(self, cases: Sequence[str]) -> npt.NDArray[np.float64] | None:
        """Return how often each case is drawn, adding up to 1; None where all are drawn alike."""
        weights = np.array([self.manifest.weight(case) for case in cases], np.float64)
        return None if np.all(weights == weights[:1]) else weights / weights.sum()


def count_voxels(
    logits: Tensor, target: Tensor, *, annotated: Tensor | None, ignore_label: int | None
) -> npt.NDArray[np.float64]:
    """Count hits and misses of the most probable output; a case's unannotated structures count as neither.

    Args:
        logits: ``(B, C, X, Y[, Z])``.
        target: ``(B, 1, X, Y[, Z])``, label values; those from C on are superclasses.
        annotated: ``(B, L)``, boolean; None where every case annotates everything.
        ignore_label: Value of voxels that do not count.

    Returns:
        ``(3, C - 1)``: true positives, false positives and false negatives of each foreground output, over the batch.
    """
    n_outputs = logits.shape[1]
    predicted, true = logits.argmax(1).flatten(1), target.flatten(1).long()
    other = torch.full_like(true, n_outputs)
    if ignore_label is not None:
        predicted = torch.where(true == ignore_label, other, predicted)
    true = torch.where((true >= 0) & (true < n_outputs), true, other)
    counts = true.new_zeros(3, len(true), n_outputs + 1)
    for count, labels in zip(counts, (torch.where(predicted == true, true, other), predicted, true), strict=True):
        count.scatter_add_(1, labels, torch.ones_like(labels))  # unlike bincount, without waiting for the GPU
    hits, of_prediction, of_truth = counts[..., 1:n_outputs].cpu().numpy().astype(np.float64)
    each = np.stack((hits, of_prediction - hits, of_truth - hits))
    known = 1 if annotated is None else annotated[:, 1:n_outputs].cpu().numpy()
    return cast("npt.NDArray[np.float64]", (each * known).sum(1))


def mask_summary(summary: Mapping[str, Any], manifest: AnnotationManifest, *, file_ending: str) -> dict[str, Any]:
    """Mask nnU-Net's ``summary.json`` by what the cases annotate.

    nnU-Net scores a structure that is predicted and not in the label map with 0, even where the case does not annotate
    it. Here such entries are None (null in JSON), as are undefined ones, and means are over the others. Superclasses,
    which no network predicts, are left out.

    Returns:
        The same form, with ``mean`` and ``foreground_mean`` computed anew.
    """
    per_case = []
    for entry in summary["metric_per_case"]:
        case = Path(entry["reference_file"]).name.removesuffix(file_ending)
        annotated = {0, *manifest.annotated(case)}
        metrics = {
            label: {key: _masked(key, value, annotated=int(label) in annotated) for key, value in values.items()}
            for label, values in entry["metrics"].items()
            if int(label) not in manifest.superclasses
        }
        per_case.append({**entry, "metrics": metrics})
    labels = list(dict.fromkeys(label for entry in per_case for label in entry["metrics"]))
    mean = {label: _means([entry["metrics"].get(label, {}) for entry in per_case]) for label in labels}
    foreground = _means([metrics for label, metrics in mean.items() if int(label) != 0])
    return {**summary, "metric_per_case": per_case, "mean": mean, "foreground_mean": foreground}


def _masked(key: str, value: Any, *, annotated: bool) -> Any:
    undefined = isinstance(value, float) and math.isnan(value)
    return None if undefined or not (annotated or key == "n_pred") else value  # n_pred is of the prediction alone


def _means(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    values: dict[str, list[float]] = {}
    for key, value in (item for entry in entries for item in entry.items()):
        values.setdefault(key, []).extend([] if value is None else [value])
    return {key: statistics.fmean(own) if own else None for key, own in values.items()}


# --- Augmentation ---


class LocalLabelTransform(SpatialTransform):
    """batchgeneratorsv2's spatial transform, with each label interpolated only where it can count.

    The original interpolates the indicator of every label over the whole patch, and a voxel gets the label with the
    highest score; time grows with the number of labels. Yet between voxels of one label that one wins anyway, and
    elsewhere only labels of which a voxel is near can win. The scores that are left to compute come from the same
    ``grid_sample``, so the result is equal to the last bit. Settings that nnU-Net does not use go to the original.
    """

    @classmethod
    def like(cls, transform: SpatialTransform) -> LocalLabelTransform:
        """Make one with the settings of another."""
        local = cls.__new__(cls)
        local.__dict__.update(vars(transform))
        return local

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        grid = params["grid"]
        if grid is None or not self._is_known(segmentation):
            return cast("Tensor", super()._apply_to_segmentation(segmentation, **params))
        pad_label = int(self.padding_value_seg) if self.border_mode_seg == "constant" else 0
        reaches_outside = self._may_reach_outside(grid, segmentation.shape[1:])
        channels = []
        for channel in segmentation.contiguous():
            boxes = _boxes(channel)
            if len(boxes.keys() | ({pad_label} if reaches_outside else set())) < 3:
                # The original decides between two labels by the score of one of them.
                channels.append(super()._apply_to_segmentation(channel[None], **params)[0])
                continue
            result, places = _certain_labels(channel, grid)
            if reaches_outside:
                boxes[pad_label] = ()  # everywhere
            points = grid.reshape(-1, 3)[places]
            result.view(-1)[places] = _winners(channel, points, boxes, pad_label if reaches_outside else None)
            channels.append(result)
        return torch.stack(channels)

    def _is_known(self, segmentation: Tensor) -> bool:
        settings = (self.mode_seg, self.seg_tiebreak, self.align_corners)
        is_volume = segmentation.ndim == 4 and min(segmentation.shape[1:]) > 1
        return (
            is_volume and settings == ("bilinear", "nearest", False) and self.border_mode_seg in ("zeros", "constant")
        )


def _boxes(labels: Tensor) -> dict[int, tuple[slice, ...]]:
    """Find the box that holds each label of a map."""
    lowest = int(labels.min())
    found = ndimage.find_objects((labels.int() - (lowest - 1)).numpy())
    return {lowest + i: box for i, box in enumerate(found) if box is not None}


def _certain_labels(labels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Label the points between eight voxels of one label, and find the places of all others in the flattened patch."""
    low = high = labels
    for axis, size in enumerate(labels.shape):
        low = torch.minimum(low.narrow(axis, 0, size - 1), low.narrow(axis, 1, size - 1))
        high = torch.maximum(high.narrow(axis, 0, size - 1), high.narrow(axis, 1, size - 1))
    # A map of these cells, which has a voxel less than the labels along each axis and is half a voxel further; 0 where
    # it is not certain, and outside.
    lowest = int(labels.min())
    cells = (low.float() - (lowest - 1)) * (low == high)
    sizes = torch.tensor(labels.shape).flip(0)  # grid_sample has the last axis first
    sampled = _sample(cells, grid * (sizes / (sizes - 1)), "nearest")
    return (sampled + (lowest - 1)).to(labels.dtype), torch.nonzero(sampled.flatten() == 0)[:, 0]


def _sample(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    return grid_sample(volume[None, None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0, 0]


def _winners(labels: Tensor, grid: Tensor, boxes: dict[int, tuple[slice, ...]], pad_label: int | None) -> Tensor:
    """Return the label of each point ``(N,)`` at which labels compete.

    Args:
        labels: The map, ``(X, Y, Z)``.
        grid: Where the points are, ``(N, 3)``, as grid_sample wants it.
        boxes: The labels that compete, and where in the map they are.
        pad_label: The label around the map, if points reach there.
    """
    voxels = [((grid[:, -1 - axis] + 1) * size - 1) / 2 for axis, size in enumerate(labels.shape)]
    around = pad_label or 0
    indicator = labels.float().sub_(around)
    nearest = _sample(indicator, grid.view(-1, 1, 1, 3), "nearest").flatten().add_(around).to(labels.dtype)
    indicator.zero_()
    best = torch.full(nearest.shape, float("-inf"), dtype=torch.float16)
    best_of_nearest, winner = best.clone(), nearest.clone()
    for label in sorted(boxes):  # the lower one wins ties
        # Zeros are all around the map: there the indicator of the label that is there, too, is less by one.
        outside, box, near = label == pad_label, boxes[label], torch.ones(len(grid), dtype=torch.bool)
        for along, cut in zip(voxels, box, strict=not outside):
            near &= (along > cut.start - 1 - _MARGIN) & (along < cut.stop + _MARGIN)
        chosen, inside = torch.nonzero(near)[:, 0], indicator[box]
        torch.eq(labels[box], label, out=inside)
        if outside:
            inside.sub_(1)
        inside.mul_(_SCALE)
        scores = _sample(indicator, grid[chosen].view(-1, 1, 1, 3), "bilinear").flatten()
        indicator.zero_()
        scores = (scores.add_(_SCALE) if outside else scores).half()
        better = scores > best[chosen]
        best[chosen[better]] = scores[better]
        winner[chosen[better]] = label
        own = nearest[chosen] == label
        best_of_nearest[chosen[own]] = scores[own]
    return torch.where(best_of_nearest == best, nearest, winner)  # the nearest one wins ties that it takes part in
