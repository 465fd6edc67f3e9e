"""STU-Net: block, encoder, decoder, network (Huang et al., arXiv 2304.06716). Needs torch alone.

On a page: an encoder of six stages of residual blocks; a decoder that mirrors five of them, in each of which the
upsampled features and the skip connection are concatenated; a 1x1 convolution to logits at each of its levels.

Blocks have a fast path, for stock modules that nothing watches or changes (:func:`_is_plain`). Anything else calls the
modules one after the other. The fast path computes the same function, and differs in three respects:

* Normalization and activation are computed again in the backward pass, so one tensor less is kept for each block.
* The first convolution of a decoder level takes upsampled features before they are interpolated.
* On the CPU, tensors with many voxels are channels-last, as oneDNN likes them.

Of these, the second alone is for compiled networks: what to keep, and in which layout, the compiler decides by itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it
from torch.nn.modules import module as nn_module
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from stunet.errors import ArchitectureError
from stunet.settings import ActivationCheckpointing
from stunet.sizes import N_STAGES, SIZES, STUNetSize, find_size, size_of  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ConvOp = type[nn.Conv2d] | type[nn.Conv3d]
Ints = Sequence[int]
Strides = Sequence[tuple[int, ...]]

#: The convolution for a number of axes.
CONV_OPS: dict[int, ConvOp] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM_OPS: dict[ConvOp, Any] = {nn.Conv2d: nn.InstanceNorm2d, nn.Conv3d: nn.InstanceNorm3d}

#: Strides of the published pre-training, which halves the third axis alone the fifth time.
PUBLISHED_STRIDES = ((1, 1, 1), *((2, 2, 2),) * 4, (1, 1, 2))


#: For PyTorch's checkpointing, as blocks draw no random numbers.
_KEEPS_NO_RANDOM_STATE: Any = {"use_reentrant": False, "preserve_rng_state": False}


# --- Blocks ---


class ResidualBlock(nn.Module):
    """conv-norm-act-conv-norm, plus the input, then act (arXiv 2304.06716, figure 2).

    With ``project``, a strided 1x1 convolution projects the input. The first block of every stage has that even where
    neither resolution nor channels change, as the published weights have it.
    """

    def __init__(
        self, conv_op: ConvOp, input_channels: int, output_channels: int, *, stride: Any = 1, project: bool = False
    ) -> None:
        super().__init__()
        norm_op = _NORM_OPS[conv_op]
        self.conv1 = conv_op(input_channels, output_channels, 3, stride=stride, padding=1)
        self.norm1 = norm_op(output_channels, affine=True)
        self.conv2 = conv_op(output_channels, output_channels, 3, padding=1)
        self.norm2 = norm_op(output_channels, affine=True)
        self.projection = conv_op(input_channels, output_channels, 1, stride=stride) if project else None
        self.act = nn.LeakyReLU()  # not in place, as full backward hooks could not see what it changes

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, X, Y[, Z])`` to ``(B, C_out, X/sx, Y/sy[, Z/sz])``."""
        is_fast = _is_plain(self, x) and not torch.compiler.is_compiling()
        x = _in_fast_layout(x, self.conv1.out_channels) if is_fast else x
        y = self.conv1(x)
        return self._finish(y, x if self.projection is None else self.projection(x), is_fast)

    def _finish(self, y: Tensor, residual: Tensor, is_fast: bool) -> Tensor:
        """All that follows the first convolution."""
        if not is_fast:
            y = self.norm2(self.conv2(self.act(self.norm1(y))))
            return cast(Tensor, self.act(y + residual))
        # Once more after the convolution: of a tensor with one channel PyTorch cannot tell the layout.
        y, slope = _in_fast_layout(y, self.conv1.out_channels), self.act.negative_slope
        weights: Any = (self.norm1.weight, self.norm1.bias, self.conv2.weight, self.conv2.bias)
        if torch.is_grad_enabled():
            versions = [t._version for t in (y, *weights[:3])]
            y = checkpoint(_norm_act_conv, y, weights, self.norm1.eps, slope, versions, **_KEEPS_NO_RANDOM_STATE)
        else:
            y = _norm_act_conv(y, weights, self.norm1.eps, slope)
        y = _instance_norm(y, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        y += residual
        return F.leaky_relu_(y, slope)


class MergingBlock(ResidualBlock):
    """The first block of a decoder level, in which upsampled features and the skip connection meet.

    The published network interpolates the one, concatenates both and convolves. A convolution of a concatenation is the
    sum of two convolutions, and one of nearest-interpolated voxels is a transposed convolution of the voxels
    themselves, whose kernel holds sums of the weights: for a stride of 2, 64 products for 8 voxels instead of 216.
    Neither the interpolated nor the concatenated tensor comes into being. ``channels`` are those of either input and of
    the output; the skip connection is ``scale`` times finer along each axis.
    """

    def __init__(self, conv_op: ConvOp, channels: int, *, scale: tuple[int, ...]) -> None:
        super().__init__(conv_op, 2 * channels, channels, project=True)
        self.scale = scale

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, C, X/sx, Y/sy[, Z/sz])`` and ``(B, C, X, Y[, Z])`` to ``(B, C, X, Y[, Z])``."""
        conv, projection = self.conv1, cast(nn.Conv3d, self.projection)
        is_plain = _is_plain(self, skip) and _keeps_size(conv, 3) and _keeps_size(projection, 1)
        # With few voxels, the summed kernel would cost more than it saves.
        if not is_plain or not _has_many_voxels(skip, skip.shape[1]):
            return super().forward(torch.cat((_interpolate(below, self.scale, half=is_plain), skip), 1))
        if is_fast := not torch.compiler.is_compiling():
            skip = _in_fast_layout(skip, conv.out_channels)
        if _is_channels_last(skip):
            below = below.contiguous(memory_format=torch.channels_last_3d)
        of_below, of_skip = conv.weight.tensor_split(2, dim=1)
        y = _convolve(skip, of_skip, conv.bias, padding=1)
        y += _convolve_interpolated(below, of_below, self.scale)
        of_below, of_skip = projection.weight.tensor_split(2, dim=1)
        residual = _convolve(skip, of_skip, projection.bias)
        residual += _interpolate(_convolve(below, of_below, None), self.scale)
        return self._finish(y, residual, is_fast)


class _Stage(nn.Sequential):
    """Residual blocks of one resolution, optionally checkpointed block by block."""

    checkpointed = False

    def __init__(self, first: ResidualBlock, *, n_blocks: int) -> None:
        conv = first.conv2
        more = (ResidualBlock(type(conv), conv.in_channels, conv.out_channels) for _ in range(n_blocks - 1))
        super().__init__(first, *more)

    def forward(self, *inputs: Tensor) -> Tensor:
        """One tensor, or in the decoder the upsampled one and the skip connection."""
        for block in self:
            if self.checkpointed and torch.is_grad_enabled() and not _is_transformed():
                inputs = (checkpoint(block, *inputs, **_KEEPS_NO_RANDOM_STATE),)
            else:
                inputs = (block(*inputs),)
        return inputs[0]


# --- Network ---


class STUNetEncoder(nn.Module):
    """Six stages of residual blocks; each begins with a strided block.

    Attributes:
        stages: The six stages, finest first.
        strides: Stride of each stage, for each axis.
    """

    def __init__(self, conv_op: ConvOp, input_channels: int, features: Ints, n_blocks: Ints, strides: Strides) -> None:
        super().__init__()
        channels = (input_channels, *features)
        self.strides = tuple(strides)
        self.stages = nn.ModuleList(
            _Stage(ResidualBlock(conv_op, c_in, c_out, stride=stride, project=True), n_blocks=n)
            for (c_in, c_out), n, stride in zip(pairwise(channels), n_blocks, strides, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, C, X, Y[, Z])`` to the outputs of the six stages, finest first."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class STUNetDecoder(nn.Module):
    """Five levels: upsample, concatenate the skip connection, residual blocks, segmentation head.

    Attributes:
        deep_supervision: Whether ``forward`` returns the logits of all five levels or of the finest alone. nnU-Net
            switches it for training and inference.
        supervised_levels: How many levels, the finest first, that list has. All five, unless a trainer knows that its
            loss weighs the coarse ones 0; their heads are not computed then.
        upsamplings: The five upsamplings, coarsest first.
        stages: The five stages of residual blocks, coarsest first.
        seg_layers: The five heads, coarsest first. nnU-Net leaves them out when it loads pre-trained weights.
    """

    def __init__(self, conv_op: ConvOp, num_classes: int, features: Ints, n_blocks: Ints, strides: Strides) -> None:
        super().__init__()
        self.deep_supervision = False
        self.supervised_levels = N_STAGES - 1
        levels = list(enumerate(pairwise(features)))[::-1]  # (level, (channels here, channels below))
        # The published network interpolates before this 1x1 convolution. Either order gives the same function, as
        # nearest interpolation only repeats voxels; here MergingBlock interpolates.
        self.upsamplings = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=conv_op(below, here, 1))) for _, (here, below) in levels
        )
        self.stages = nn.ModuleList(
            _Stage(MergingBlock(conv_op, here, scale=strides[level + 1]), n_blocks=n_blocks[level])
            for level, (here, _) in levels
        )
        self.seg_layers = nn.ModuleList(conv_op(here, num_classes, 1) for _, (here, _) in levels)

    def forward(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Encoder features, finest first, to logits ``(B, num_classes, X, Y[, Z])``; a list with deep supervision."""
        logits: list[Tensor] = []
        for i, (x, seg_layer) in enumerate(zip(self.levels(features), self.seg_layers, strict=True), 1):
            n_finer = len(self.stages) - i
            if n_finer == 0 or (self.deep_supervision and n_finer < self.supervised_levels):
                logits.append(_pointwise(seg_layer, x))
        return logits[::-1] if self.deep_supervision else logits[0]

    def levels(self, features: list[Tensor]) -> Iterator[Tensor]:
        """Encoder features, finest first, to those of the five levels, coarsest first."""
        *skips, x = features
        for upsampling, stage in zip(self.upsamplings, self.stages, strict=True):
            x = stage(upsampling(x), skips.pop())
            yield x

    def finest(self, features: list[Tensor]) -> Tensor:
        """Encoder features, finest first, to those of the finest level, ``(B, C, X, Y[, Z])``."""
        *_, x = self.levels(features)
        return x


class STUNet(nn.Module):
    """Scalable and transferable U-Net (arXiv 2304.06716), as nnU-Net builds it from a plans file.

    Weights fit whatever the patch, the spacing and the strides are, because there are always six stages and all
    kernels are 3x3(x3). Weights are initialised by PyTorch's default; ``network.apply(network.initialize)``, which
    nnU-Net and :func:`create_model` call, initialises them after He.

    Args:
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        n_stages: Always 6; here because plans files give it.
        features_per_stage: Channels of each stage.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``; decides the number of axes.
        strides: Stride of each stage for each axis; the first is the stem's.
        n_blocks_per_stage: Residual blocks of each encoder stage. The decoder mirrors the first five.
        deep_supervision: Whether training gets the logits of all five decoder levels, finest first.
        activation_checkpointing: ``none``, ``encoder`` or ``all``: which residual blocks keep only their input for
            the backward pass and compute the rest again. The function and its gradients stay the same.

    Raises:
        ArchitectureError: An argument that no STU-Net can have.

    >>> sizes = {"features_per_stage": (4, 8, 16, 32, 64, 64), "n_blocks_per_stage": (1, 1, 1, 1, 1, 1)}
    >>> network = STUNet(1, 3, **sizes, strides=[1, 2, 2, 2, 2, 2])
    >>> network(torch.zeros(1, 1, 64, 32, 32)).shape
    torch.Size([1, 3, 64, 32, 32])
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        n_stages: int = N_STAGES,
        features_per_stage: Sequence[int],
        conv_op: ConvOp = nn.Conv3d,
        strides: Sequence[int | Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        deep_supervision: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        n_axes = next(n for n, op in CONV_OPS.items() if op is conv_op)
        full = [(s,) * n_axes if isinstance(s, int) else tuple(s) for s in strides]
        for name, n in (("input channels", input_channels), ("number of classes", num_classes)):
            if not isinstance(n, int) or n < 1:
                raise ArchitectureError(f"{name} {n} is no positive whole number: check channel_names and labels")
        for name, values in (("features_per_stage", features_per_stage), ("n_blocks_per_stage", n_blocks_per_stage)):
            if n_stages != N_STAGES or len(values) != N_STAGES or min(values) < 1:
                raise ArchitectureError(f"{name} {list(values)} with {n_stages=}: STU-Net has {N_STAGES} positive ones")
        if len(full) != N_STAGES or any(len(s) != n_axes or min(s) < 1 for s in full):
            raise ArchitectureError(f"impossible strides {full}: give {N_STAGES}, of {n_axes} positive integers each")
        if activation_checkpointing not in (choices := get_args(ActivationCheckpointing)):
            raise ArchitectureError(f"activation_checkpointing {activation_checkpointing!r} is none of {choices}")
        sizes = (features_per_stage, n_blocks_per_stage, full)
        self.conv_op, self._total_stride = conv_op, total_stride(full)
        self.encoder = STUNetEncoder(conv_op, input_channels, *sizes)
        self.decoder = STUNetDecoder(conv_op, num_classes, *sizes)
        self.decoder.deep_supervision = deep_supervision
        for part, stages in (("encoder", self.encoder.stages), ("decoder", self.decoder.stages)):
            for stage in stages:
                cast(_Stage, stage).checkpointed = activation_checkpointing in ("all", part)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment a patch.

        Args:
            x: Image of shape ``(B, input_channels, X, Y[, Z])``; each axis a multiple of the product of its strides.

        Returns:
            Logits ``(B, num_classes, X, Y[, Z])``; with deep supervision a list of five, finest first.

        Raises:
            ArchitectureError: An axis that the strides do not divide, or one voxel at the coarsest stage.
        """
        _check_input(x, self._total_stride)
        return cast("Tensor | list[Tensor]", self.decoder(self.encoder(x)))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Return the elements of all outputs of convolutions for one image, nnU-Net's measure for memory planning.

        Args:
            input_size: Image size ``(X, Y[, Z])`` in voxels, without batch and channels.
        """
        size, decoder = list(input_size), self.decoder
        voxels: list[int] = []
        for stride in self.encoder.strides:
            size = [n // s for n, s in zip(size, stride, strict=True)]
            voxels.append(math.prod(size))
        # Upsamplings convolve before they interpolate.
        here, below = [*decoder.stages, *decoder.seg_layers], [*self.encoder.stages, *decoder.upsamplings]
        parts = zip([*below, *here], [*voxels, *voxels[:0:-1], *voxels[-2::-1] * 2], strict=True)
        convs = ((m, n) for part, n in parts for m in part.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        return sum(conv.out_channels * n for conv, n in convs)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a convolution after He, for leaky rectifiers, with biases 0; to be given to ``apply``."""
        # Random values on the meta device load torch's compiler, for seconds.
        if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, a=1e-2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def create_model(
    size: str | STUNetSize = "base",
    input_channels: int = 1,
    num_classes: int = 105,
    strides: Sequence[int | Sequence[int]] = PUBLISHED_STRIDES,
    **kwargs: Any,
) -> STUNet:
    """Create a STU-Net of a given size with He initialisation.

    Args:
        size: A published size (``small``, ``base``, ``large``, ``huge``), or a size of your own.
        input_channels: Channels of the image.
        num_classes: Outputs of each head, background included.
        strides: Stride of each of the six stages for each axis; those of the published pre-training by default.
        **kwargs: Further arguments of :class:`STUNet`: ``conv_op``, ``deep_supervision``, ``activation_checkpointing``.

    Raises:
        ArchitectureError: An unknown size, or an argument that no STU-Net can have.

    >>> network = create_model("small", input_channels=2, num_classes=4)
    >>> network(torch.zeros(1, 2, 16, 16, 64)).shape
    torch.Size([1, 4, 16, 16, 64])
    """
    size = find_size(size) if isinstance(size, str) else size
    sizes: Any = {"features_per_stage": size.features, "n_blocks_per_stage": size.depth}
    network = STUNet(input_channels, num_classes, **sizes, strides=strides, **kwargs)
    return network.apply(network.initialize)


build_stunet = create_model  # its first name


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return how much coarser the coarsest stage is than the image, for each axis."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def default_strides(patch_size: Sequence[int]) -> list[list[int]]:
    """Return strides that halve each axis as long as it stays at 4 voxels or more, at most five times.

    For a patch of 128 that is 2, five times. (The published pre-training strides halve only one axis the fifth time.)
    """
    size, strides = list(patch_size), [[1] * len(patch_size)]
    for _ in range(N_STAGES - 1):
        strides.append([2 if n % 2 == 0 and n // 2 >= 4 else 1 for n in size])
        size = [n // s for n, s in zip(size, strides[-1], strict=True)]
    return strides


def sharded_units(network: STUNet) -> list[nn.Module]:
    """Return the parts of a network that are gathered and freed as one: each stage and each upsampling."""
    return [*network.encoder.stages, *network.decoder.upsamplings, *network.decoder.stages]


def shard(network: STUNet, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Shard parameters, gradients and optimizer states over the processes, in place (PyTorch's FSDP2).

    Each stage and each upsampling is gathered when it is about to compute, and freed afterwards, and so are the heads.
    Nothing may change in place what a stage or an upsampling returns: gathering for the backward pass hangs on it. An
    optimizer made before does not know the new parameters.

    Args:
        network: The same weights on each process.
        mesh: The processes, along one axis.
        dtype: What stages compute in; gradients are summed in fp32 all the same. The parameters' own by default.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second or two

    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=dtype is not None
    )
    for part in sharded_units(network):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # What is left, the heads, is small. Freed as well, as otherwise it would stay gathered where no backward pass
    # follows, and whoever asks the network for its parameters after a validation would get others than the optimizer's.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@torch.fx.wrap
def _check_input(x: Tensor, strides: tuple[int, ...]) -> None:
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return  # sizes are tensors then
    size = tuple(x.shape[2:])
    if any(n % stride for n, stride in zip(size, strides, strict=True)):
        raise ArchitectureError(f"input {size} must have multiples of {strides}: pad it, or change strides")
    if size == strides:
        raise ArchitectureError(f"input {size} needs more than one voxel at the coarsest stage: enlarge the patch")


# --- The fast path ---


# PyTorch has no public names for some of this. Where it drops those that it has, everything takes the plain path.
_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_HAS_ONEDNN: bool = getattr(torch._C, "_has_mkldnn", False)
_get_transform: Any = getattr(_FUNCTORCH, "peek_interpreter_stack", lambda: True)
_GLOBAL_HOOKS: list[Any] = [
    getattr(nn_module, f"_global_{which}_hooks", (None,))
    for which in ("forward_pre", "forward", "backward_pre", "backward")
]  # full where hooks of all modules are set
_is_batched: Any = getattr(_FUNCTORCH, "is_legacy_batchedtensor", lambda _: True)


def _is_transformed() -> bool:
    """Whether something else than autograd differentiates or records what is computed."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0 or _get_transform() is not None


def _is_observed(x: Tensor) -> bool:
    """Whether operations count one by one."""
    return bool(_is_transformed() or has_torch_function((x,)) or any(_GLOBAL_HOOKS))


def _is_plain(block: ResidualBlock, x: Tensor) -> bool:
    """Whether nothing can tell the fast path from calling the block's modules, which are all stock and unwatched."""
    if _is_observed(x) or x.ndim not in (4, 5):
        return False
    conv_op, norms = CONV_OPS[x.ndim - 2], (block.norm1, block.norm2)
    convs = [module for module in (block.conv1, block.conv2, block.projection) if module is not None]
    return (
        all(_is_stock(conv, conv_op) for conv in convs)
        and all(_is_stock(norm, _NORM_OPS[conv_op]) for norm in norms)
        and _is_stock(block.act, nn.LeakyReLU)
        and all(norm.weight is not None and not norm.track_running_stats for norm in norms)
        and _keeps_size(block.conv2, 3)
        and block.act.negative_slope > 0
    )


def _is_stock(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether a module is of exactly this type, with plain parameters, and calling it runs its ``forward`` alone."""
    hooks = (value for name, value in vars(module).items() if name.endswith("hooks") and "state_dict" not in name)
    has_hooks = any(hooks)  # of calls; sharding adds some for weights
    weights = [*module.parameters()]  # whose hooks PyTorch 2.7 does not run where a function is recomputed
    is_watched = has_hooks or any(weight._backward_hooks for weight in weights)
    is_changed = is_watched or "forward" in vars(module) or has_torch_function(weights)
    return type(module) is expected and not is_changed


def _keeps_size(conv: Any, kernel: int) -> bool:
    """Whether a stock convolution has this kernel, as much padding as that takes, and nothing else."""
    if conv is None:
        return False
    n = len(conv.kernel_size)
    expected = ((kernel,) * n, (kernel // 2,) * n, (1,) * n, (1,) * n, 1, "zeros")
    settings = (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return settings == expected and conv.bias is not None


def _has_many_voxels(x: Tensor, channels: int) -> bool:
    """Whether a batch is larger than the weights of a 3x3x3 convolution of it, so that work on it counts for more."""
    return x.shape[0] * x[0, 0].numel() >= 32 * channels


def _is_channels_last(x: Tensor) -> bool:
    """Whether this is the layout of the CPU's fast path. A GPU may compute its matrix products in TF32, too coarse."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.ndim != 5:
        return False
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def _in_fast_layout(x: Tensor, channels: int) -> Tensor:
    """Return the layout in which convolutions with so many channels are fastest.

    On the CPU that is channels-last: the finest stages then take about half to three quarters of the time.
    """
    if not _computes_in_fp32_on_cpu(x):
        return x
    is_fast = _has_many_voxels(x, channels) and not _is_alone_and_small(x, channels)
    return x.contiguous(memory_format=torch.channels_last_3d if is_fast else torch.contiguous_format)


def _computes_in_fp32_on_cpu(x: Tensor) -> bool:
    is_fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_fp32 and x.ndim == 5 and x.device.type == "cpu"


def _is_alone_and_small(x: Tensor, channels: int) -> bool:
    """Whether this is one image with so few elements in a slice that PyTorch does not use oneDNN, which is faster."""
    return x.shape[0] == 1 and channels * x.shape[2] * x.shape[3] <= 20480


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a head. To channels-last by a matrix product, as the loss wants logits in PyTorch's usual layout."""
    if _is_observed(x) or not (_is_channels_last(x) and _is_stock(conv, nn.Conv3d) and _keeps_size(conv, 1)):
        return cast(Tensor, conv(x))
    weight, bias = cast(Tensor, conv.weight), cast(Tensor, conv.bias)
    y = torch.baddbmm(bias[:, None], weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2))
    return y.view(*y.shape[:2], *x.shape[2:])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    is_plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_plain and _computes_in_fp32_on_cpu(x) and _is_alone_and_small(x, x.shape[1]) and _HAS_ONEDNN:
        return torch.mkldnn_convolution(x, weight, bias, [padding] * 3, [1] * 3, [1] * 3, 1)
    convolve: Any = F.conv2d if x.ndim == 4 else F.conv3d
    return cast(Tensor, convolve(x, weight, bias, padding=padding))


def _interpolate(x: Tensor, scale: tuple[int, ...], *, half: bool = True) -> Tensor:
    """Repeat voxels, where they are half in half precision; autocast on CUDA would make them fp32."""
    with torch.autocast("cuda" if half and x.is_cuda else "cpu", enabled=False):
        return F.interpolate(x, scale_factor=[float(factor) for factor in scale], mode="nearest")


def _convolve_interpolated(x: Tensor, weight: Tensor, scale: tuple[int, ...]) -> Tensor:
    """Convolve, with padding 1 and weight ``(C_out, C_in, 3, 3[, 3])``, what nearest interpolation would make of x."""
    for axis, factor in enumerate(scale, start=2):
        flipped, unpadded = weight.flip(axis), [0, 0] * (weight.ndim - 1 - axis)
        shifted = [F.pad(flipped, [*unpadded, i, factor - 1 - i]) for i in range(factor)]
        weight = torch.stack(shifted).sum(0) if factor > 1 else flipped
    convolve: Any = F.conv_transpose2d if len(scale) == 2 else F.conv_transpose3d
    return cast(Tensor, convolve(x, weight.transpose(0, 1), stride=scale, padding=1))


def _norm_act_conv(x: Tensor, weights: tuple[Tensor, ...], eps: float, slope: float, versions: Any = None) -> Tensor:
    """``conv(leaky_relu(instance_norm(x)))``; with versions, of tensors that still have them."""
    weight, bias, kernel, conv_bias = weights
    if versions is not None and versions != [t._version for t in (x, weight, bias, kernel)]:
        raise RuntimeError("weights or features have been modified by an inplace operation before the backward pass")
    return _convolve(F.leaky_relu_(_instance_norm(x, weight, bias, eps), slope), kernel, conv_bias, padding=1)


def _instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's, which would turn channels-last into another layout and back."""
    if _is_channels_last(x):
        return cast(Tensor, _ChannelsLastNorm.apply(x, weight, bias, eps))
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


class _ChannelsLastNorm(torch.autograd.Function):
    """Instance normalization of ``(B, C, X, Y, Z)`` in the channels-last layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        shape, voxels = (*x.shape[:2], 1, 1, 1), x[0, 0].numel()
        mean = _rows(x).sum(2).sum(1) / voxels
        y = x - mean.view(shape)  # first, as a mean of squares would lose digits
        rstd = (_sum_products(y, y) / voxels + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return torch.addcmul(bias.view(1, -1, 1, 1, 1), y, (weight * rstd).view(shape), out=y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_transformed() or _is_batched(grad):  # one gradient is not all that is wanted
            norm = partial(F.instance_norm, eps=ctx.eps)
            differentiate = torch.func.vjp(lambda x, *wb: norm(x, None, None, *wb), x, weight, bias)[1]
            return *differentiate(grad), None
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        shape, voxels = (*x.shape[:2], 1, 1, 1), x[0, 0].numel()
        sums, scale = _rows(grad).sum(2).sum(1), weight * rstd
        by_weight = rstd * (_sum_products(grad, x) - mean * sums)  # sum of gradient times normalized input
        of_x = -scale * rstd * by_weight / voxels
        constant = -scale * sums / voxels - of_x * mean
        grad_x = torch.addcmul(constant.view(shape), x, of_x.view(shape)).addcmul_(grad, scale.view(shape))
        return grad_x, by_weight.sum(0), sums.sum(0), None


def _rows(x: Tensor) -> Tensor:
    """View a channels-last tensor as ``(B, parts, voxels of a part, C)``; sums over parts lose fewer digits."""
    return x.permute(0, 2, 3, 4, 1).view(x.shape[0], math.gcd(x[0, 0].numel(), 256), -1, x.shape[1])


def _sum_products(x: Tensor, y: Tensor) -> Tensor:
    """By matrix products, of which the diagonal is wanted: PyTorch's sums of this layout take several times as long."""
    return (_rows(x).mT @ _rows(y)).diagonal(dim1=2, dim2=3).sum(1)
