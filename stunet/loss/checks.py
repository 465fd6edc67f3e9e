"""What a loss is given, checked before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from stunet.errors import LossError

__all__ = ["check_annotated", "check_labels", "check_target"]


def check_target(logits: Tensor, target: Tensor, members: Tensor, ignore_label: int | None) -> Tensor:
    """The target as ``(B, X, Y[, Z])``.

    Raises:
        LossError: Logits, target and labels do not fit together.
    """
    n_outputs = members.shape[1]
    if logits.ndim < 3 or logits.shape[1] != n_outputs or not logits.is_floating_point():
        raise LossError(
            "logits that do not fit the labels",
            got=f"{logits.dtype} {tuple(logits.shape)}",
            expected=f"floating point (B, {n_outputs}, X, Y[, Z])",
            remedy="Give a network and its loss the same number of outputs.",
        )
    if target.ndim == logits.ndim and target.shape[1] == 1:
        target = target[:, 0]
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise LossError(
            "a target of another shape than the logits",
            got=f"target {tuple(target.shape)} for logits {tuple(logits.shape)}",
            expected=f"({logits.shape[0]}, [1,] {', '.join(map(str, logits.shape[2:]))})",
            remedy="Give label values, not one-hot maps; with deep supervision, one target for each output.",
        )
    return check_labels(target, members, ignore_label)


def check_labels(target: Tensor, members: Tensor, ignore_label: int | None) -> Tensor:
    """Refuse label values that no output stands for, and return the target in a type that PyTorch computes with.

    Raises:
        LossError: There are some, or there are no voxels.
    """
    if not target.numel():
        raise LossError(
            "an empty batch", got=tuple(target.shape), expected="a voxel at least", remedy="Leave empty batches out."
        )
    if target.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which it can hardly do more with than store
        target = target.long()
    n_labels = len(members)
    # Negated, so that NaN is found as well.
    wrong = ~((target >= 0) & (target < n_labels))
    if ignore_label is not None:
        wrong &= target != ignore_label
    if target.is_floating_point():
        wrong |= target != target.floor()
    if bool(wrong.any()):
        raise LossError(
            "label values that no output stands for",
            got=", ".join(f"{value:g}" for value in sorted(set(target[wrong].tolist()))[:5]),
            expected=f"whole numbers from 0 to {n_labels - 1}"
            + ("" if ignore_label is None else f", or {ignore_label} to ignore"),
            remedy="Check the dataset with `nnUNetv2_plan_and_preprocess --verify_dataset_integrity`.",
        )
    return target


def check_annotated(annotated: Tensor, batch_size: int, n_labels: int) -> Tensor:
    """The annotation on the CPU, with nothing said of the background.

    Raises:
        LossError: It does not fit the batch or the labels.
    """
    if annotated.shape != (batch_size, n_labels) or annotated.dtype != torch.bool:
        raise LossError(
            "an annotation that does not fit batch and labels",
            got=f"{annotated.dtype} {tuple(annotated.shape)}",
            expected=f"boolean ({batch_size}, {n_labels}): one row a case, one column a label value from 0 on",
            remedy="Make one row for each case of the batch, in its order.",
        )
    annotated = annotated.detach().cpu().clone()
    annotated[:, 0] = False
    return annotated
