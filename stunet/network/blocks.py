"""The building blocks of STU-Net, in 2D and 3D."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, conv_transpose3d, interpolate, pad

from stunet.network.normalization import (
    NORMS,
    add_and_activate,
    in_layout_for,
    is_channels_last,
    normalize_and_convolve,
    outweighs_weights,
)

__all__ = ["CONV_OPS", "ConvOp", "MergingBlock", "ResidualBlock", "Upsampling"]

ConvOp = type[nn.Conv2d] | type[nn.Conv3d]

#: The convolution for a number of axes.
CONV_OPS: dict[int, ConvOp] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {2: conv_transpose2d, 3: conv_transpose3d}


class ResidualBlock(nn.Module):
    """conv-norm-act-conv-norm, plus the input, then act (arXiv 2304.06716, figure 2).

    Where resolution or channels change, a strided 1x1 convolution projects the input. The first block of every stage
    has that projection even where nothing changes, as the published weights have it.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        input_channels: Channels that come in.
        output_channels: Channels that go out.
        stride: Stride of the first convolution, for each axis.
        project: Whether the input goes through a 1x1 convolution.
    """

    def __init__(
        self, conv_op: ConvOp, input_channels: int, output_channels: int, *, stride: tuple[int, ...], project: bool
    ) -> None:
        super().__init__()
        norm_op = NORMS[conv_op]
        # The stride's length is right for either operator, which the types cannot say.
        strided: Any = stride
        self.conv1 = conv_op(input_channels, output_channels, 3, stride=strided, padding=1)
        self.norm1 = norm_op(output_channels, affine=True)
        self.conv2 = conv_op(output_channels, output_channels, 3, padding=1)
        self.norm2 = norm_op(output_channels, affine=True)
        self.projection = conv_op(input_channels, output_channels, 1, stride=strided) if project else None
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, X, Y[, Z])`` to ``(B, C_out, X/sx, Y/sy[, Z/sz])``."""
        x = in_layout_for(x, self.conv1.out_channels)
        # Once more after it: of a tensor with one channel PyTorch cannot tell the layout.
        y = in_layout_for(self.conv1(x), self.conv1.out_channels)
        return self._finish(y, x if self.projection is None else self.projection(x))

    def _finish(self, y: Tensor, residual: Tensor) -> Tensor:
        """All that follows the first convolution."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            slope = self.act.negative_slope
            y = normalize_and_convolve(y, self.norm1, slope, self.conv2)
            return add_and_activate(y, self.norm2, residual, slope)
        # The same in plain words: the compiler decides by itself what to keep, and without gradients nothing is kept.
        y = self.norm2(self.conv2(self.act(self.norm1(y))))
        return cast(Tensor, self.act(y.add_(residual)))


class MergingBlock(ResidualBlock):
    """The first block of a decoder level, in which the way up and the skip connection meet.

    The published network interpolates the one, concatenates both and convolves. A convolution of a concatenation is the
    sum of two convolutions, and one of nearest-interpolated voxels is a transposed convolution of the voxels
    themselves, whose kernel holds sums of the weights: for a stride of 2, 64 products for 8 voxels instead of 216.
    Neither the interpolated nor the concatenated tensor comes into being.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: Channels of either input and of the output.
        scale: How much finer the skip connection is, for each axis.
    """

    def __init__(self, conv_op: ConvOp, channels: int, *, scale: tuple[int, ...]) -> None:
        super().__init__(conv_op, 2 * channels, channels, stride=(1,) * len(scale), project=True)
        self.scale = tuple(scale)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, C, X/sx, Y/sy[, Z/sz])`` and ``(B, C, X, Y[, Z])`` to ``(B, C, X, Y[, Z])``."""
        skip = in_layout_for(skip, self.conv1.out_channels)
        factors = [float(factor) for factor in self.scale]
        if not outweighs_weights(skip, skip.shape[1]):
            # The summed kernel would be larger than what it saves.
            x = torch.cat((interpolate(below, scale_factor=factors, mode="nearest"), skip), dim=1)
            return super().forward(x)
        if is_channels_last(skip):
            below = below.contiguous(memory_format=torch.channels_last_3d)
        conv, projection = self.conv1, cast(nn.Conv3d, self.projection)
        of_below, of_skip = conv.weight.tensor_split(2, dim=1)
        y = conv._conv_forward(skip, of_skip, conv.bias)
        y += _convolve_interpolated(below, of_below, self.scale)
        of_below, of_skip = projection.weight.tensor_split(2, dim=1)
        residual = projection._conv_forward(skip, of_skip, projection.bias)
        residual += interpolate(projection._conv_forward(below, of_below, None), scale_factor=factors, mode="nearest")
        return self._finish(y, residual)


def _convolve_interpolated(x: Tensor, weight: Tensor, scale: tuple[int, ...]) -> Tensor:
    """Convolve, with padding 1, what nearest interpolation would make of a tensor.

    Args:
        x: ``(B, C_in, X, Y[, Z])``.
        weight: ``(C_out, C_in, 3, 3[, 3])``.
        scale: Factors of the interpolation.
    """
    for axis, factor in enumerate(scale, start=2):
        flipped, unpadded = weight.flip(axis), [0, 0] * (weight.ndim - 1 - axis)
        shifted = [pad(flipped, [*unpadded, i, factor - 1 - i]) for i in range(factor)]
        weight = torch.stack(shifted).sum(0) if factor > 1 else flipped
    return cast(Tensor, _TRANSPOSED[len(scale)](x, weight.transpose(0, 1), stride=scale, padding=1))


class Upsampling(nn.Module):
    """The 1x1 convolution on the way up, at the coarser resolution.

    The published network interpolates first. Both orders give the same function, since a 1x1 convolution acts on each
    voxel alone and nearest interpolation only repeats voxels. Here :class:`MergingBlock` interpolates.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        input_channels: Channels that come in.
        output_channels: Channels that go out.
    """

    def __init__(self, conv_op: ConvOp, input_channels: int, output_channels: int) -> None:
        super().__init__()
        self.conv = conv_op(input_channels, output_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, X, Y[, Z])`` to ``(B, C_out, X, Y[, Z])``."""
        if is_channels_last(x):
            return cast(Tensor, self.conv(x))
        # A matrix product over the channels. As a convolution PyTorch would sum in another order on the bottleneck's
        # few voxels than on the published code's interpolated ones, and the norms over so few voxels amplify that.
        y = self.conv.weight.flatten(1) @ x.flatten(2)
        y += cast(Tensor, self.conv.bias)[:, None]  # in place, as under autocast y is half and the bias is not
        return y.view(*y.shape[:2], *x.shape[2:])


def pointwise(x: Tensor, conv: nn.Module) -> Tensor:
    """A 1x1 convolution of a channels-last tensor to one in PyTorch's usual layout, by a matrix product.

    Args:
        x: ``(B, C_in, X, Y[, Z])``.
        conv: The convolution.
    """
    # Not by @, which would fold the images into rows, and copy the result back.
    weight, bias = cast(Tensor, conv.weight), cast(Tensor, conv.bias)
    y = torch.bmm(weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2))
    y += bias[:, None]
    return y.view(*y.shape[:2], *x.shape[2:])
