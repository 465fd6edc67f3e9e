"""What a training needs to know of a manifest: the labels that are outputs, and which of them a batch annotates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stunet.errors import LabelError
from stunet.labels import AnnotationManifest
from stunet.loss import label_members

__all__ = ["CaseAnnotations", "Counts", "count_voxels"]

_IGNORE = "ignore"


@dataclass(frozen=True)
class CaseAnnotations:
    """A manifest as a training sees it.

    Attributes:
        manifest: What each case annotates.
        members: ``(L, C)``, boolean: the outputs that each label value stands for; superclasses come last.
    """

    manifest: AnnotationManifest
    members: Tensor

    @classmethod
    def of(cls, manifest: AnnotationManifest) -> CaseAnnotations:
        """Check that the labels can be outputs.

        Raises:
            LabelError: Leaves with gaps between their values, or superclasses that do not follow them.
        """
        leaves, superclasses = list(manifest.leaves), manifest.superclasses
        expected = list(range(1, 1 + len(leaves) + len(superclasses)))
        if [*sorted(leaves), *sorted(superclasses)] != expected:
            raise LabelError(
                "label values that cannot be a network's outputs",
                got=f"structures {leaves}, superclasses {sorted(superclasses)}",
                expected=f"structures 1 to {len(leaves)}, then the superclasses, without gaps",
                remedy="Number them in dataset.json so, and preprocess again.",
            )
        return cls(manifest, label_members(1 + len(leaves), superclasses))

    @property
    def num_outputs(self) -> int:
        """C: the background and the leaves."""
        return int(self.members.shape[1])

    def of_leaves(self, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
        """A dataset's description without its superclasses, which no network has outputs for."""
        labels = dataset_json["labels"]
        kept = {name: value for name, value in labels.items() if value not in self.manifest.superclasses}
        if _IGNORE in kept:  # which nnU-Net wants right after the others
            kept[_IGNORE] = self.num_outputs
        return {**dataset_json, "labels": kept}

    def mask(self, cases: Iterable[str]) -> Tensor:
        """``(B, L)``, boolean: which label values each case of a batch annotates."""
        return torch.from_numpy(np.stack([self.manifest.annotated_mask(case) for case in cases]))

    def check_every_leaf_is_annotated(self, cases: Sequence[str]) -> None:
        """Refuse a training in which nothing tells some structure from the background.

        Args:
            cases: The training cases.

        Raises:
            LabelError: Names the structures that no case annotates.
        """
        somewhere = self.mask(cases).any(0)
        nowhere = [name for name, value in self.manifest.structures.items() if not somewhere[value]]
        nowhere = [name for name in nowhere if self.manifest.structures[name] < self.num_outputs]
        if nowhere:
            raise LabelError(
                "structures that no training case annotates",
                got=", ".join(nowhere[:8]) + (f" and {len(nowhere) - 8} more" if len(nowhere) > 8 else ""),
                expected="at least one training case for each; the network could not tell them from the background",
                remedy="Leave them out of the dataset, add cases, or train all the same with "
                "--set allow_unannotated=true.",
            )

    def sampling_probabilities(self, cases: Sequence[str]) -> npt.NDArray[np.float64] | None:
        """How often each case is drawn, adding up to 1; None where all are drawn alike."""
        weights = np.array([self.manifest.weight(case) for case in cases], np.float64)
        return None if np.all(weights == weights[:1]) else weights / weights.sum()


@dataclass(frozen=True)
class Counts:
    """Voxels of each foreground output, summed over a batch: ``(C - 1,)`` each.

    Attributes:
        tp: Predicted and there.
        fp: Predicted only.
        fn: There only.
    """

    tp: npt.NDArray[np.float64]
    fp: npt.NDArray[np.float64]
    fn: npt.NDArray[np.float64]


def count_voxels(logits: Tensor, target: Tensor, *, annotated: Tensor | None, ignore_label: int | None) -> Counts:
    """Hits and misses of the most probable output, where a case's unannotated structures count as neither.

    Args:
        logits: ``(B, C, X, Y[, Z])``.
        target: ``(B, 1, X, Y[, Z])``, label values; those from C on are superclasses.
        annotated: ``(B, L)``, boolean; None where every case annotates everything.
        ignore_label: Value of voxels that do not count.
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
    return Counts(*counts[:, 1:])
