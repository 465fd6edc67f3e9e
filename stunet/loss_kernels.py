"""The loss of one output of the network in two kernels: sums from one pass over the logits, the gradient from another.

Notation as in :mod:`stunet.loss`. A tile is all C outputs of some voxels, so the softmax never leaves the registers.
Each program adds up its tiles and writes sums of its own, which are added up in double precision: no atomics, the same
result in each run. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from triton import cdiv, next_power_of_2

_TILE = 4096  # elements: 16 for each thread of eight warps, so that all stay in registers
_FEWEST_VOXELS = 16  # of a tile, however many outputs
_PROGRAMS = 1024  # of a case, at most: enough to fill a GPU, and few sums beside the logits


@triton.jit
def _tile(
    logits, target, counts_as, owner, rows, voxels, n_outputs, n_labels, n_voxels, stride_c, stride_v, stride_y,
    ignore_label: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Read a tile.

    Returns:
        p and the softmax within each voxel's E, 0 elsewhere, both ``(C, V)``; -log q, the label that the voxel counts
        as, and its weight, all ``(V,)``. The weight is 1, 0 for a voxel that is left out, and NaN where no output
        stands for the label; p and -log q are multiplied by it.
    """
    is_output, is_voxel = rows < n_outputs, voxels < n_voxels
    at = logits + rows.to(tl.int64)[:, None] * stride_c + voxels.to(tl.int64)[None, :] * stride_v
    z = tl.load(at, mask=is_output[:, None] & is_voxel[None, :], other=0).to(dtype)
    z = tl.where(is_output[:, None], z, float("-inf"))

    value = tl.load(target + voxels.to(tl.int64) * stride_y, mask=is_voxel, other=0)
    index = value.to(tl.int32)
    is_label = (value >= 0) & (value < n_labels) & (index.to(value.dtype) == value)
    label = tl.load(counts_as + index, mask=is_voxel & is_label, other=n_labels).to(tl.int32)
    is_left_out = label == n_labels
    is_allowed = is_label
    if ignore_label is not None:
        is_allowed = is_allowed | (value == ignore_label)
    weight = tl.where(is_allowed, tl.where(is_left_out, 0.0, 1.0), float("nan")).to(dtype)

    peak = tl.max(z, 0)
    p = tl.exp(z - peak[None, :])
    total = tl.sum(p, 0)
    p = p * (weight / total)[None, :]
    # E has a maximum of its own, so that the softmax within it is exact where q underflows.
    owners = tl.load(owner + rows, mask=is_output, other=-1).to(tl.int32)
    z_set = tl.where(owners[:, None] == label[None, :], z, float("-inf"))
    peak_set = tl.where(is_left_out, peak, tl.max(z_set, 0))
    share = tl.exp(z_set - peak_set[None, :])
    total_set = tl.where(is_left_out, 1.0, tl.sum(share, 0))
    nll = (tl.log(total) - tl.log(total_set) + (peak - peak_set)) * weight
    return p, share / total_set[None, :], nll, label, weight


@triton.jit
def _sum_kernel(
    logits, target, counts_as, owner, out, n_outputs, n_labels, n_voxels, n_tiles,
    stride_b, stride_c, stride_v, stride_yb, stride_y,
    ignore_label: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    program, case = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits, target = logits + case * stride_b, target + case * stride_yb
    counts_as, owner = counts_as + case * (n_labels + 1), owner + case * n_outputs
    rows = tl.arange(0, ROWS)  # outputs or labels
    intersection = tl.zeros((ROWS,), dtype)
    reference = tl.zeros((ROWS,), dtype)
    prediction = tl.zeros((ROWS,), dtype)
    cross_entropy = tl.zeros((VOXELS,), dtype)
    for i in range(n_tiles):
        voxels = (program * n_tiles + i) * VOXELS + tl.arange(0, VOXELS)
        p, _, nll, label, _ = _tile(
            logits, target, counts_as, owner, rows, voxels, n_outputs, n_labels, n_voxels, stride_c, stride_v, stride_y,
            ignore_label, dtype,
        )  # fmt: skip
        has_label = rows[:, None] == label[None, :]
        intersection += tl.sum(tl.where(has_label, tl.exp(-nll)[None, :], 0.0), 1)
        reference += tl.sum(has_label.to(dtype), 1)
        prediction += tl.sum(p, 1)
        cross_entropy += nll
    out += (case * tl.num_programs(0) + program) * (2 * n_labels + n_outputs + 1)
    tl.store(out + rows, intersection, mask=rows < n_labels)
    tl.store(out + n_labels + rows, reference, mask=rows < n_labels)
    tl.store(out + 2 * n_labels + rows, prediction, mask=rows < n_outputs)
    tl.store(out + 2 * n_labels + n_outputs, tl.sum(cross_entropy, 0))


@triton.jit
def _gradient_kernel(
    logits, target, counts_as, owner, nu, alpha, beta, out, n_outputs, n_labels, n_voxels,
    stride_b, stride_c, stride_v, stride_yb, stride_y, stride_a,
    ignore_label: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    case = tl.program_id(1).to(tl.int64)
    rows, voxels = tl.arange(0, ROWS), tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    owner += case * n_outputs
    p, share, nll, label, weight = _tile(
        logits + case * stride_b, target + case * stride_yb, counts_as + case * (n_labels + 1), owner, rows, voxels,
        n_outputs, n_labels, n_voxels, stride_c, stride_v, stride_y, ignore_label, dtype,
    )  # fmt: skip
    is_output = rows < n_outputs
    owners = tl.load(owner + rows, mask=is_output, other=0)
    by_output = tl.load(beta + case * stride_a + owners, mask=is_output, other=0).to(dtype)
    by_label = tl.load(alpha + case * stride_a + label, mask=label < n_labels, other=0).to(dtype)
    pull = (by_label * tl.exp(-nll) + tl.load(nu).to(dtype)) * weight
    push = pull - tl.sum(p * by_output[:, None], 0)
    gradient = p * (by_output[:, None] + push[None, :]) - share * pull[None, :]
    at = out + (case * n_outputs + rows)[:, None] * n_voxels + voxels[None, :]
    tl.store(at, gradient, mask=is_output[:, None] & (voxels < n_voxels)[None, :])


def _tiles(logits: Tensor, n_labels: int) -> tuple[int, int, int]:
    """Return rows and voxels of a tile, and how many tiles a program adds up."""
    rows = next_power_of_2(max(logits.shape[1], n_labels))
    voxels = max(_TILE // rows, _FEWEST_VOXELS)
    return rows, voxels, cdiv(logits.shape[2], voxels * _PROGRAMS)


def _launch(kernel: Any, n_programs: int, tensors: Sequence[Tensor], sizes: Sequence[int], **constants: Any) -> None:
    logits = tensors[0]
    dtype = tl.float64 if logits.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(logits):
        kernel[n_programs, len(logits)](*tensors, *sizes, **constants, dtype=dtype, num_warps=8)


@custom_op(
    "stunet::loss_sums",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor counts_as, Tensor owner, int? ignore_label) -> Tensor",
)
def loss_sums(logits: Tensor, target: Tensor, counts_as: Tensor, owner: Tensor, ignore_label: int | None) -> Tensor:
    """Return the sums of each program, ``(B, programs, 2L + C + 1)``: I and voxels by label, P by output, -log q.

    Args:
        logits: ``(B, C, N)``.
        target: ``(B, N)``, label values.
        counts_as: ``(B, L + 1)``, the label that each counts as in a case; L where it is left out.
        owner: ``(B, C)``, the label of which Dice counts an output, 0 for none.
        ignore_label: Value of voxels that are left out.
    """
    out: Tensor = _room_for_sums(logits, target, counts_as, owner, ignore_label)
    n_labels = counts_as.shape[1] - 1
    rows, voxels, n_tiles = _tiles(logits, n_labels)
    sizes = (logits.shape[1], n_labels, logits.shape[2], n_tiles, *logits.stride(), *target.stride())
    constants = {"ignore_label": ignore_label, "ROWS": rows, "VOXELS": voxels}
    _launch(_sum_kernel, out.shape[1], (logits, target, counts_as, owner, out), sizes, **constants)
    return out


@loss_sums.register_fake
def _room_for_sums(
    logits: Tensor, target: Tensor, counts_as: Tensor, owner: Tensor, ignore_label: int | None
) -> Tensor:
    n_labels = counts_as.shape[1] - 1
    _, voxels, n_tiles = _tiles(logits, n_labels)
    n_programs = cdiv(logits.shape[2], voxels * n_tiles)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((len(logits), n_programs, 2 * n_labels + logits.shape[1] + 1), dtype=dtype)


@custom_op(
    "stunet::loss_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor counts_as, Tensor owner, int? ignore_label, Tensor nu, Tensor alpha, "
    "Tensor beta) -> Tensor",
)
def loss_gradient(
    logits: Tensor,
    target: Tensor,
    counts_as: Tensor,
    owner: Tensor,
    ignore_label: int | None,
    nu: Tensor,
    alpha: Tensor,
    beta: Tensor,
) -> Tensor:
    """Return the gradient by the logits, ``(B, C, N)``, given nu ``()`` and alpha and beta ``(B, L)``."""
    out = logits.new_empty(logits.shape)
    n_labels = counts_as.shape[1] - 1
    rows, voxels, _ = _tiles(logits, n_labels)
    tensors = (logits, target, counts_as, owner, nu, alpha, beta, out)
    sizes = (*logits.shape[1:2], n_labels, logits.shape[2], *logits.stride(), *target.stride(), alpha.stride(0))
    constants = {"ignore_label": ignore_label, "ROWS": rows, "VOXELS": voxels}
    _launch(_gradient_kernel, cdiv(logits.shape[2], voxels), tensors, sizes, **constants)
    return out


@loss_gradient.register_fake
def _room_for_gradient(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)
