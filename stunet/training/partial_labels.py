"""Training on datasets whose cases annotate only some structures: what a batch annotates, and how that is scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from stunet.datasets.raw import has_annotations, read_annotations
from stunet.errors import LabelError
from stunet.labels.annotations import AnnotationManifest
from stunet.loss import label_members


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
            raise LabelError(
                f"structures {leaves}, superclasses {superclasses}: number from 1, then the superclasses, without gaps"
            )
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
        names = {value: name for name, value in self.manifest.structures.items()}
        nowhere = [names[value] for value in self.manifest.leaves if not somewhere[value]]
        if nowhere:
            listed = ", ".join(nowhere[:8]) + (f" and {len(nowhere) - 8} more" if len(nowhere) > 8 else "")
            raise LabelError(f"no training case annotates {listed}: add cases, or --set allow_unannotated=true")

    def describe(self, cases: Sequence[str]) -> str:
        """Describe in a line of the log how much the training cases annotate."""
        mean = self.mask(cases)[:, 1:].sum(1).double().mean()
        return (
            f"Partial labels: {len(cases)} training cases annotate {mean:.1f} of {self.num_outputs - 1} structures on "
            f"average ({self.manifest.source})"
        )

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
    counts = np.zeros((3, n_outputs))
    for case, (one, labels) in enumerate(zip(logits, target, strict=True)):
        predicted, true = one.argmax(0).flatten(), labels.flatten().long()
        if ignore_label is not None:
            predicted, true = predicted[true != ignore_label], true[true != ignore_label]
        hits = torch.bincount(predicted[predicted == true], minlength=n_outputs)
        of_prediction = torch.bincount(predicted, minlength=n_outputs)
        of_truth = torch.bincount(true, minlength=n_outputs)[:n_outputs]
        each = torch.stack((hits, of_prediction - hits, of_truth - hits)).cpu().numpy().astype(np.float64)
        counts += each if annotated is None else each * annotated[case, :n_outputs].cpu().numpy()
    return counts[:, 1:]


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
    keys = dict.fromkeys(key for entry in entries for key in entry)
    defined = {key: [entry[key] for entry in entries if entry.get(key) is not None] for key in keys}
    return {key: statistics.fmean(values) if values else None for key, values in defined.items()}
