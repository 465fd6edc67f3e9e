"""The two building blocks of STU-Net, in 2D and 3D."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["CONV_OPS", "ConvOp", "ResidualBlock", "Upsampling"]

ConvOp = type[nn.Conv2d] | type[nn.Conv3d]

#: The convolution for a number of axes.
CONV_OPS: dict[int, ConvOp] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[type[nn.Module], type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    nn.Conv2d: nn.InstanceNorm2d,
    nn.Conv3d: nn.InstanceNorm3d,
}


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
        self,
        conv_op: ConvOp,
        input_channels: int,
        output_channels: int,
        *,
        stride: tuple[int, ...],
        project: bool,
    ) -> None:
        super().__init__()
        norm_op = _NORMS[conv_op]
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
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # Neither the norm nor the convolution needs its output for its gradient, so both operations may work in place.
        y += x if self.projection is None else self.projection(x)
        return cast(Tensor, self.act(y))


class Upsampling(nn.Module):
    """1x1 convolution, then nearest interpolation.

    The published network interpolates first. Both orders give the same function, since a 1x1 convolution acts on each
    voxel alone and nearest interpolation only repeats voxels; this order convolves and keeps the smaller tensor.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        input_channels: Channels that come in.
        output_channels: Channels that go out.
        scale: Factor for each axis.
    """

    def __init__(
        self,
        conv_op: ConvOp,
        input_channels: int,
        output_channels: int,
        *,
        scale: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.conv = conv_op(input_channels, output_channels, 1)
        self.scale = tuple(float(factor) for factor in scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, X, Y[, Z])`` to ``(B, C_out, X*sx, Y*sy[, Z*sz])``."""
        # A matrix product over the channels. As a convolution PyTorch would sum in another order on the bottleneck's
        # few voxels than on the published code's interpolated ones, and the norms over so few voxels amplify that.
        y = self.conv.weight.flatten(1) @ x.flatten(2)
        y += cast(Tensor, self.conv.bias)[:, None]  # in place, as under autocast y is half and the bias is not
        x = y.unflatten(2, x.shape[2:])  # type: ignore[no-untyped-call]
        if all(factor == 1 for factor in self.scale):
            return x
        return interpolate(x, scale_factor=self.scale, mode="nearest")
