"""Instance normalisation that keeps the layout, and training through it that keeps one tensor instead of two."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm, instance_norm, leaky_relu_

__all__ = ["NORMS", "add_and_activate", "in_layout_for", "is_channels_last", "normalize_and_convolve"]

_aten = torch.ops.aten

#: Voxels for each channel from which on a tensor is larger than the weights of a 3x3x3 convolution of it.
VOXELS_PER_CHANNEL = 32


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a voxel lie side by side, as oneDNN likes them; half precision is not treated so."""
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def outweighs_weights(x: Tensor, channels: int) -> bool:
    """Whether a batch has so many voxels that work on its tensors counts for more than work on weights."""
    return x.shape[0] * x[0, 0].numel() >= VOXELS_PER_CHANNEL * channels


def in_layout_for(x: Tensor, channels: int) -> Tensor:
    """The layout in which convolutions of so many channels are fastest.

    On the CPU that is channels-last: the finest stages then take about half to three quarters of the time. Where there
    are few voxels, bringing the weights into that layout would cost more than it saves.
    """
    if x.device.type != "cpu" or x.ndim != 5 or x.dtype != torch.float32:
        return x
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return x
    # Single images with fewer elements in a slice PyTorch convolves without oneDNN, and in its usual layout.
    alone_and_small = x.shape[0] == 1 and channels * x.shape[2] * x.shape[3] <= 20480
    if outweighs_weights(x, channels) and not alone_and_small:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous()


class _Norm:
    """PyTorch's instance norms, which would turn channels-last into another layout and back."""

    def forward(self, x: Tensor) -> Tensor:
        this = cast(nn.InstanceNorm3d, self)
        if is_channels_last(x) and not torch.is_grad_enabled():
            return _normalize(x, this.weight, this.bias, this.eps)[0]
        return instance_norm(x, weight=this.weight, bias=this.bias, eps=this.eps)


class InstanceNorm2d(_Norm, nn.InstanceNorm2d):
    pass


class InstanceNorm3d(_Norm, nn.InstanceNorm3d):
    pass


NORMS: dict[type[nn.Module], type[InstanceNorm2d] | type[InstanceNorm3d]] = {
    nn.Conv2d: InstanceNorm2d,
    nn.Conv3d: InstanceNorm3d,
}


def normalize_and_convolve(x: Tensor, norm: nn.Module, slope: float, conv: nn.Module) -> Tensor:
    """``conv(leaky_relu(norm(x)))``, keeping ``x`` alone for the backward pass, which computes the rest again.

    Args:
        x: ``(B, C, X, Y[, Z])``.
        norm: Of :data:`NORMS`.
        slope: Of the rectifier, above 0.
        conv: Keeps the size: 3x3(x3), padding 1.
    """
    norm_, conv_ = cast(nn.InstanceNorm3d, norm), cast(nn.Conv3d, conv)
    out: Tensor = _NormalizeAndConvolve.apply(x, norm_.weight, norm_.bias, conv_.weight, conv_.bias, norm_.eps, slope)
    return out


def add_and_activate(x: Tensor, norm: nn.Module, residual: Tensor, slope: float) -> Tensor:
    """``leaky_relu(norm(x) + residual)``, keeping ``x`` and the result, which the next layer keeps anyway.

    Args:
        x: ``(B, C, X, Y[, Z])``.
        norm: Of :data:`NORMS`.
        residual: As large as ``x``.
        slope: Of the rectifier, above 0.
    """
    norm_ = cast(nn.InstanceNorm3d, norm)
    out: Tensor = _AddAndActivate.apply(x, norm_.weight, norm_.bias, residual, norm_.eps, slope)
    return out


class _NormalizeAndConvolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, conv_bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        y, mean, rstd = _normalize(x, weight, bias, eps)
        y = _convolve(leaky_relu_(y, slope), kernel, conv_bias)
        ctx.save_for_backward(x, weight, bias, kernel, mean, rstd)
        ctx.eps, ctx.slope = eps, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, kernel, mean, rstd = ctx.saved_tensors
        y = leaky_relu_(_normalize_again(x, weight, bias, mean, rstd, ctx.eps), ctx.slope)
        pads = [1] * (x.ndim - 2)
        wanted = [any(ctx.needs_input_grad[:3]), *ctx.needs_input_grad[3:5]]
        grad_y, grad_kernel, grad_conv_bias = _aten.convolution_backward(
            _like(grad, y),
            y,
            kernel.to(y.dtype),
            [kernel.shape[0]],
            pads,
            pads,
            pads,
            False,
            [0] * len(pads),
            1,
            wanted,
        )
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if wanted[0]:
            _aten.leaky_relu_backward(grad_y, y, ctx.slope, False, grad_input=grad_y)
            grads = _normalize_backward(grad_y, x, weight, mean, rstd, scratch=y)
        return (*grads, _of_type(grad_kernel, kernel), _of_type(grad_conv_bias, kernel), None, None)


class _AddAndActivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float, slope: float
    ) -> Tensor:
        y, mean, rstd = _normalize(x, weight, bias, eps)
        y = leaky_relu_(y.add_(residual), slope)
        ctx.save_for_backward(x, weight, mean, rstd, y)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, rstd, y = ctx.saved_tensors
        grad = _aten.leaky_relu_backward(_like(grad, y), y, ctx.slope, True)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            grads = _normalize_backward(grad, x, weight, mean, rstd)
        return (*grads, grad, None, None)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    pads = [1] * (x.ndim - 2)
    return torch.convolution(x, kernel.to(x.dtype), bias.to(x.dtype), pads, pads, pads, False, [0] * len(pads), 1)


def _of_type(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the layout of what it is the gradient of; heads give others."""
    return grad.contiguous(memory_format=torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format)


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised tensor; mean and reciprocal standard deviation of each image and channel."""
    batch, channels = x.shape[:2]
    if is_channels_last(x):
        # PyTorch's own kernels for this layout add up voxel by voxel, which costs two of seven digits.
        shape, voxels = (batch, channels, 1, 1, 1), x[0, 0].numel()
        mean = _sums(x) / voxels
        y = x - mean.view(shape)
        rstd = (_sums_of_products(y, y) / voxels + eps).rsqrt()
        return torch.addcmul(bias.view(1, -1, 1, 1, 1), y, (weight * rstd).view(shape), out=y), mean, rstd
    y, mean, rstd = torch.native_batch_norm(
        _as_one_image(x), weight.repeat(batch), bias.repeat(batch), None, None, True, 0.0, eps
    )
    return y.view(x.shape), mean, rstd


def _as_one_image(x: Tensor) -> Tensor:
    return x.contiguous().view(1, -1, *x.shape[2:])


def _normalize_again(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """The normalised tensor once more, from statistics that are known."""
    if is_channels_last(x):
        shape = (*x.shape[:2], 1, 1, 1)
        scale = weight * rstd
        return torch.addcmul((bias - mean * scale).view(shape), x, scale.view(shape))
    batch = x.shape[0]
    variance = rstd.square().reciprocal() - eps
    y = batch_norm(_as_one_image(x), mean, variance, weight.repeat(batch), bias.repeat(batch), False, 0.0, eps)
    return y.view(x.shape)


def _normalize_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weights and the biases.

    Args:
        grad: Of the normalised tensor.
        x: What was normalised.
        weight: Of the channels.
        mean: Of each image and channel.
        rstd: Likewise.
        scratch: A tensor as large as ``x`` that may be overwritten.
    """
    batch, channels = x.shape[:2]
    if not is_channels_last(x):
        grad_x, grad_weight, grad_bias = _aten.native_batch_norm_backward(
            _as_one_image(grad), _as_one_image(x), weight.repeat(batch), None, None, mean, rstd, True, 0.0, [True] * 3
        )
        return grad_x.view(x.shape), grad_weight.view(batch, -1).sum(0), grad_bias.view(batch, -1).sum(0)
    voxels, shape = x[0, 0].numel(), (batch, channels, 1, 1, 1)
    sums = _sums(grad)
    by_weight = rstd * (_sums_of_products(grad, x) - mean * sums)  # sum of gradient times normalised input
    scale = weight * rstd
    of_x = -scale * rstd * by_weight / voxels
    constant = -scale * sums / voxels - of_x * mean
    grad_x = torch.addcmul(constant.view(shape), x, of_x.view(shape), out=scratch)
    return grad_x.addcmul_(grad, scale.view(shape)), by_weight.sum(0), sums.sum(0)


def _in_rows(x: Tensor) -> Tensor:
    """A channels-last tensor as ``(B, parts, voxels of a part, C)``; sums over parts lose fewer digits."""
    voxels = x[0, 0].numel()
    return x.permute(0, 2, 3, 4, 1).view(x.shape[0], math.gcd(voxels, 256), -1, x.shape[1])


def _sums(x: Tensor) -> Tensor:
    return _in_rows(x).sum(2).sum(1)


def _sums_of_products(x: Tensor, y: Tensor) -> Tensor:
    """By matrix products, of which the diagonal is wanted: PyTorch's sums of this layout take several times as long."""
    return (_in_rows(x).mT @ _in_rows(y)).diagonal(dim1=2, dim2=3).sum(1)
