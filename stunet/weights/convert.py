"""Weights out of any file that holds a STU-Net or one of nnU-Net's own networks, and back to the published format.

STU-Nets come as nnU-Net v1's ``.model`` with its pickles, as checkpoints of the old v2 port, of nnU-Net v2, and as
safetensors; the others as checkpoints of nnU-Net v2, whose plans say what network they belong to.
"""

import math
import os
import pydoc
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stunet.errors import ArchitectureError, CheckpointError, STUNetError, reading
from stunet.files import atomic_path, refuse_existing
from stunet.network import CONV_OPS, N_STAGES, STUNet, STUNetSize, build_stunet, size_of
from stunet.weights import read

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")

# Files


def sort_paths(given: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Return the file with the weights, that of a model folder where one was given, and the pickles."""
    others = [path for path in given if path.suffix != ".pkl"]
    if len(others) != 1:
        problem, names = "more than one" if others else "no", ", ".join(map(str, given)) or "nothing"
        raise CheckpointError(f"{problem} file with weights in {names}: give one file or model folder, and its pickles")
    path = others[0]
    if path.is_dir():
        found = sorted(path.glob("fold_*/checkpoint_final.pth")) or sorted(path.glob("checkpoint_final.pth"))
        if len(found) != 1:
            names = ", ".join(str(p.relative_to(path)) for p in found)
            problem = f"with several checkpoints, {names}" if found else "without a checkpoint_final.pth"
            raise CheckpointError(f"{path} is a folder {problem}: give the file itself")
        path = found[0]
    return path, [path for path in given if path.suffix == ".pkl"]


def locate_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the file with the weights, that of a model folder where one was given.

    Raises:
        CheckpointError: Nothing there, or a folder without a checkpoint or with several.
    """
    return read.require_file(sort_paths([Path(path)])[0])


_File = tuple[Mapping[str, Any], Mapping[Any, Any], str]


def read_state(path: Path) -> _File:
    """Return all that a file holds, the weights in it as they are, and what wrote it."""
    if path.suffix == ".safetensors":
        return {}, _read_safetensors(read.require_file(path)), "safetensors"
    content = read.load_archive(path)
    if isinstance(content, dict):
        if isinstance(content.get("network_weights"), dict):
            return content, content["network_weights"], "nnU-Net v2"
        if isinstance(content.get("state_dict"), dict):
            return content, content["state_dict"], "nnU-Net v1"
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {}, content, "plain tensors"
    raise CheckpointError(f"a file without weights: {path} holds {read.describe_content(content)}; give a checkpoint")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    with reading(path, "a safetensors file that is truncated or damaged"):
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def strip_prefixes(state: Mapping[Any, Any], path: Path, names: int = 1) -> dict[str, Tensor]:
    """Return tensors without the prefixes of ``DataParallel`` and ``torch.compile``; each has at most so many names."""
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"a {type(key).__name__} as a name")
        name = _PREFIX.sub("", key)
        if name in stripped:
            raise ValueError(f"{name} twice, with and without a prefix")
        if getattr(tensor, "dtype", None) not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {getattr(tensor, 'dtype', type(tensor))}, not a tensor of fp32, fp16 or bf16")
        stripped[name] = tensor.detach()
    if (n_bytes := sum(tensor.nbytes for tensor in stripped.values())) > names * path.stat().st_size:
        raise ValueError(f"weights of {n_bytes} bytes that share those of the file")  # which would fill the memory
    return stripped


def finite_float32(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as fp32, without what it may be a view of."""
    converted = tensor.float()
    # Smallest and largest value say it all, as NaN is both; unlike isfinite this needs no memory.
    if not all(math.isfinite(value.item()) for value in torch.aminmax(converted)):
        n_bad = int((~torch.isfinite(converted)).sum())
        text = f"weights that are not finite: {name} has {n_bad} NaN or infinite values of {converted.numel()}"
        raise ValueError(f"{text}; an earlier checkpoint may have none")
    is_view = converted.untyped_storage().nbytes() != converted.nbytes  # saving it would save all that it is a view of
    return converted.clone(memory_format=torch.contiguous_format) if is_view else converted


# Names of parameters

_MODULES = {
    "conv_blocks_context": "encoder.stages", "conv_blocks_localization": "decoder.stages",
    "upsample_layers": "decoder.upsamplings", "seg_outputs": "decoder.seg_layers",
}  # fmt: skip
_OURS = re.compile(
    r"((en|de)coder\.stages\.\d+\.\d+\.(conv[12]|norm[12]|projection)"
    r"|decoder\.upsamplings\.\d+\.conv|decoder\.seg_layers\.\d+)\.(weight|bias)"
)


def from_published_key(key: str) -> str:
    """Return our name of a parameter of the published network code.

    >>> from_published_key("conv_blocks_context.0.0.conv3.weight")
    'encoder.stages.0.0.projection.weight'
    """
    module, _, rest = key.partition(".")
    ours = f"{_MODULES.get(module, '')}.{rest}".replace(".conv3.", ".projection.")
    if ".projection." in key or not _OURS.fullmatch(ours):
        raise CheckpointError(f"{key[:200]} has no counterpart: it is no parameter of the published STU-Net code")
    return ours


def to_published_key(key: str) -> str:
    """Return the published name of a parameter of :class:`stunet.network.STUNet`.

    >>> to_published_key("decoder.seg_layers.0.bias")
    'seg_outputs.0.bias'
    """
    if not _OURS.fullmatch(key):
        raise CheckpointError(f"{key[:200]} has no counterpart: it is no parameter of stunet.network.STUNet")
    published, ours = next((p, o) for p, o in _MODULES.items() if key.startswith(f"{o}."))
    return f"{published}{key.removeprefix(ours)}".replace(".projection.", ".conv3.")


# STU-Nets


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a STU-Net's weights say; the strides are not among it."""

    size: STUNetSize  # depth and width
    input_channels: int  # channels of the image
    num_classes: int  # outputs of each head, background included
    n_axes: int  # 2 or 3

    def build_on_meta(self) -> STUNet:
        """Build the network without memory for its weights; all strides are 1, which no shape depends on."""
        with torch.device("meta"):
            strides, conv_op = [1] * N_STAGES, CONV_OPS[self.n_axes]
            return build_stunet(self.size, self.input_channels, self.num_classes, strides, conv_op=conv_op)


def infer_architecture(weights: Mapping[str, Tensor], *, source: str) -> Architecture:
    """Infer the STU-Net that weights belong to; a network of that size takes all of them with ``strict=True``.

    Args:
        weights: Tensors by our names, see :func:`from_published_key`.
        source: Where they come from, for messages.

    Raises:
        CheckpointError: A parameter is missing, surplus or of a shape that no STU-Net has; names the first ones.
    """
    firsts = [f"encoder.stages.{i}.0.conv1.weight" for i in range(N_STAGES)]
    heads = [f"decoder.seg_layers.{i}.weight" for i in range(N_STAGES - 1)]
    if missing := [key for key in (*firsts, *heads) if key not in weights]:
        raise _other_network(source, "; ".join(f"{key} is missing" for key in missing[:3]))
    stem = weights[firsts[0]]
    for key in (*firsts, *heads):
        if weights[key].ndim != stem.ndim or stem.ndim - 2 not in CONV_OPS:
            shape = tuple(weights[key].shape)
            raise _other_network(source, f"{key} is {shape}, not the weight of a 2D or 3D convolution")
    blocks = [re.fullmatch(r"encoder\.stages\.(\d+)\.(\d+)\.conv1\.weight", key) for key in weights]
    depth = [len({m[2] for m in blocks if m and int(m[1]) == stage}) for stage in range(N_STAGES)]
    try:
        size = size_of([weights[key].shape[0] for key in firsts], depth)
        architecture = Architecture(size, stem.shape[1], weights[heads[-1]].shape[0], stem.ndim - 2)
        expected = architecture.build_on_meta().state_dict()
    except ArchitectureError as error:
        raise _other_network(source, str(error)) from error
    if mismatch := read.describe_mismatch(weights, expected):
        raise _other_network(source, f"closest to STU-Net {size.name}, but {mismatch}")
    return architecture


def _other_network(source: object, problem: str) -> CheckpointError:
    return CheckpointError(f"{source} has weights of another network than STU-Net or nnU-Net's own: {problem}")


_PARTS = ("encoder", "decoder")


@dataclass(frozen=True)
class SourceWeights:
    """Weights of a STU-Net and all that their files say about them.

    Attributes:
        path: The file with the weights.
        kind: What wrote it: nnU-Net v1 or v2, its old port, safetensors, or plain tensors.
        tensors: By our names, fp32, on the CPU; mapped from the file where possible.
        architecture: What their shapes say.
        precision: The precision in the file, for example ``float16``.
        v1_plans: Plans of nnU-Net v1, where pickles have them.
        v1_init: The positional arguments of the v1 trainer; empty likewise.
        pickles: The pickles that these come from.
        init_args: What nnU-Net v2 keeps in its checkpoints: ``plans``, ``configuration``, ``dataset_json``.
        mirroring_axes: The axes that nnU-Net v2 may mirror in prediction.
        epoch: Epochs that the weights were trained for, where the file says it.
        pretext: Self-supervised task that they were trained by; None where labels trained them.
        trained: Parts of the network that were trained: ``encoder`` and ``decoder``.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    architecture: Architecture
    precision: str
    v1_plans: dict[str, Any] = field(default_factory=dict)
    v1_init: tuple[Any, ...] = ()
    pickles: tuple[Path, ...] = ()
    init_args: dict[str, Any] = field(default_factory=dict)
    mirroring_axes: tuple[int, ...] | None = None
    epoch: int | None = None
    pretext: str | None = None
    trained: tuple[str, ...] = _PARTS


def open_weights(paths: Sequence[str | os.PathLike[str]], *, trust: Sequence[str] | None = None) -> SourceWeights:
    """Read a STU-Net's weights without running code out of any file.

    Args:
        paths: One file with weights, or one model folder, and any number of nnU-Net v1 pickles (``.pkl``), in any
            order. Where ``X.model`` is given, ``X.model.pkl`` and ``plans.pkl`` beside it are read too.
        trust: Check the network that the plans in the checkpoint name, too, and admit these classes beyond the known
            ones; see :func:`stunet.weights.read.check_network`. None where nothing will be built of these plans.

    Returns:
        The weights under our names, without the prefixes of ``DataParallel`` and ``torch.compile``, as fp32.

    Raises:
        CheckpointError: A file is missing, truncated or unsafe, the weights are not finite, or not a STU-Net's.
    """
    path, pickles = sort_paths([Path(path) for path in paths])
    return _stunet_weights(path, read_state(path), pickles, trust)


def _stunet_weights(path: Path, file: _File, pickles: list[Path], trust: Sequence[str] | None) -> SourceWeights:
    content, state, kind = file
    init_args = _init_args(content)
    if trust is not None and (described := read.described_network(init_args, path)) is not None:
        read.check_network(described, source=str(path), trust=trust)
    if kind == "nnU-Net v1" or path.suffix == ".model":
        beside = [p for p in (path.with_name(f"{path.name}.pkl"), path.with_name("plans.pkl")) if p.is_file()]
        pickles = pickles + [p for p in beside if p.resolve() not in {given.resolve() for given in pickles}]
    v1_plans, v1_init = _read_v1(pickles)
    with reading(path, "a checkpoint that cannot be used"):
        stripped = strip_prefixes(state, path)
        published = any(name.startswith(("conv_blocks_", "upsample_layers.", "seg_outputs.")) for name in stripped)
        try:
            names = {(from_published_key(name) if published else name): name for name in stripped}
        except CheckpointError as error:
            raise _other_network(path, f"{error}, and {len(stripped) - 1} more parameters") from None
        architecture = infer_architecture({key: stripped[name] for key, name in names.items()}, source=str(path))
        axes = content.get("inference_allowed_mirroring_axes")
        known = isinstance(axes, list | tuple) and all(isinstance(axis, int) and 0 <= axis < 3 for axis in axes)
        if axes is not None and not known:
            raise ValueError(f"inference_allowed_mirroring_axes {str(axes)[:60]} that are no axes")
        axes = None if axes is None else tuple(axes)
        epoch = content.get("epoch", content.get("current_epoch"))
        kind = "old nnU-Net v2 port" if kind == "nnU-Net v2" and published else kind
        tensors = {key: finite_float32(name, stripped[name]) for key, name in names.items()}
        precision = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in stripped.values()}))
        pretext = content.get("pretext") or {}
        pretext = {"name": None, "trains": _PARTS} if pretext.get("labels", True) else pretext
        if not pretext["trains"] or not set(pretext["trains"]) <= set(_PARTS):
            raise ValueError(f"pretext that trains {str(pretext['trains'])[:60]}")
        return SourceWeights(
            path, kind, tensors, architecture, precision, v1_plans, v1_init, tuple(pickles), init_args,
            mirroring_axes=axes,
            epoch=epoch if isinstance(epoch, int) else None,
            pretext=pretext["name"],
            trained=tuple(pretext["trains"]),
        )  # fmt: skip


def trained_parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return which of ``encoder`` and ``decoder`` a checkpoint has trained; both where it cannot be read."""
    with suppress(STUNetError, KeyError, TypeError, AttributeError):
        content = read_state(sort_paths([Path(path)])[0])[0]
        return ("encoder",) if _NNSSL in content else tuple(content["pretext"]["trains"])
    return _PARTS


def _init_args(content: Mapping[str, Any]) -> dict[str, Any]:
    return init_args if isinstance(init_args := content.get("init_args"), dict) else {}


def _read_v1(pickles: Sequence[Path]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Plans and trainer arguments out of ``.model.pkl`` and ``plans.pkl``, which must not contradict each other."""
    plans: dict[str, Any] = {}
    init: tuple[Any, ...] = ()
    for path in pickles:
        content = read.read_pickle(path)
        inner = content.get("plans", content) if isinstance(content, dict) else None
        if not isinstance(inner, dict) or not {"normalization_schemes", "plans_per_stage"} & set(inner):
            raise CheckpointError(f"{path} is a pickle without plans: give the .model.pkl or plans.pkl of the weights")
        for key in ("normalization_schemes", "use_mask_for_norm", "num_classes", "num_modalities", "transpose_forward"):
            if key in plans and key in inner and _plain(plans[key]) != _plain(inner[key]):
                values = f"{str(plans[key])[:80]} and, in {path.name}, {str(inner[key])[:80]}"
                raise CheckpointError(f"pickles that contradict each other, {key}: {values}; give those of one model")
        if isinstance(content.get("init"), tuple):
            init = content["init"]
        # Only plans that were in use name each stage, so those go first whatever the order on the command line.
        plans = {**plans, **inner} if "plans_per_stage" in inner else {**inner, **plans}
    return plans, init


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def write_published(weights: SourceWeights, path: str | os.PathLike[str]) -> None:
    """Write a ``.model`` file, atomically, as the published nnU-Net v1 code reads it.

    Raises:
        CheckpointError: The file cannot be written, or the network is 2D, which the published code has not.
        UsageError: The file exists.
    """
    path = Path(path)
    refuse_existing(path)
    if weights.architecture.n_axes != 3:
        raise CheckpointError(f"{weights.path} is a 2D network, which the published code does not have")
    state = OrderedDict((to_published_key(key), tensor) for key, tensor in weights.tensors.items())
    content: dict[str, Any] = {"epoch": weights.epoch or 0, "state_dict": state, "plot_stuff": ([], [], [], [])}
    content |= {"optimizer_state_dict": None, "lr_scheduler_state_dict": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        gigabytes = sum(tensor.nbytes for tensor in weights.tensors.values()) / 2**30
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"{path} cannot be written ({reason}): it takes {gigabytes:.1f} GB") from error


# nnU-Net's own networks

# Their decoders own the encoder too, so that its parameters are saved under a second name.
_STEMS = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.weight")
_MARK = "decoder.transpconvs.0.weight"
_NNSSL = "nnssl_adaptation_plan"
#: What nnssl calls ResEncL (arXiv 2412.17041); NoSkipResEncL has the same encoder.
_RES_ENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.Conv3d",
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, 2],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1, 1, 1, 1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


@dataclass(frozen=True)
class UNetArchitecture:
    """One of nnU-Net's own networks."""

    name: str  # PlainConvUNet or ResidualEncoderUNet; the full name of a class that the user trusts
    arguments: Mapping[str, Any]  # its arguments but for channels and classes; layers as classes
    input_channels: int  # channels of the image
    num_classes: int  # outputs of each head, background included
    n_axes: int  # 2 or 3

    def build(self, input_channels: int, num_classes: int) -> nn.Module:
        """Build it without deep supervision and as PyTorch initialises it; raises what its class does."""
        from dynamic_network_architectures.architectures import unet

        # The name is one of two, or of a class that the user trusts.
        network_class: Any = getattr(unet, self.name) if self.name in read.UNETS.values() else pydoc.locate(self.name)
        outer = {"input_channels": input_channels, "num_classes": num_classes, "deep_supervision": False}
        network: nn.Module = network_class(**outer, **self.arguments)
        return network


@dataclass(frozen=True)
class UNetWeights:
    """Weights of one of nnU-Net's own networks and what their checkpoint says about them."""

    path: Path  # the checkpoint
    tensors: dict[str, Tensor]  # by nnU-Net's names, fp32, on the CPU; mapped from the file where possible
    architecture: UNetArchitecture  # the network that they belong to
    init_args: dict[str, Any] = field(default_factory=dict)  # plans, configuration, dataset_json
    epoch: int | None = None  # epochs that the weights were trained for
    pretext: str | None = None  # as of SourceWeights
    trained: tuple[str, ...] = _PARTS  # likewise


def open_any_weights(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> SourceWeights | UNetWeights:
    """Read the weights of a STU-Net, or of one of nnU-Net's own networks, without running code out of the file.

    Args:
        path: A file as for :func:`open_weights`, a checkpoint of nnU-Net v2 or of nnssl with a ``PlainConvUNet`` or a
            ``ResidualEncoderUNet``, or a model folder with one fold.
        trust: Further classes that the plans may name, see :func:`stunet.weights.read.check_network`.

    Raises:
        CheckpointError: The file is missing, truncated or unsafe, the weights are not finite, of another network, or
            not those of the network that the plans in the checkpoint describe.
    """
    path, _ = sort_paths([Path(path)])
    content, state, kind = read_state(path)
    if _NNSSL in content:
        with reading(path, "a checkpoint of nnssl that cannot be used"):
            return _nnssl_weights(path, content, strip_prefixes(state, path, names=4), trust)
    if not any(isinstance(key, str) and key.endswith(_MARK) for key in state):
        return _stunet_weights(path, (content, state, kind), [], trust)
    with reading(path, "a checkpoint that cannot be used"):
        stripped, init_args = strip_prefixes(state, path, names=4), _init_args(content)
        architecture = _unet_architecture(stripped, init_args, path, trust)
        tensors = {name: finite_float32(name, tensor) for name, tensor in stripped.items()}
    epoch = content.get("current_epoch")
    return UNetWeights(path, tensors, architecture, init_args, epoch if isinstance(epoch, int) else None)


def _unet_architecture(
    state: Mapping[str, Tensor], init_args: Mapping[str, Any], path: Path, trust: Sequence[str]
) -> UNetArchitecture:
    """The architecture in the checkpoint's plans, which its tensors must fit to the last."""
    stem = next((state[key] for key in _STEMS if key in state), None)
    heads = {int(match[1]): state[key] for key in state if (match := _HEAD.fullmatch(key))}
    if stem is None or stem.ndim not in (4, 5) or not heads or heads[max(heads)].ndim != stem.ndim:
        raise ValueError("weights without the stem or the heads of nnU-Net's networks")
    described = read.described_network(init_args, path)
    if described is None:
        raise ValueError(f"{read.UNUSABLE}: no configuration with an architecture")
    name, arguments = read.check_network(described, source=str(path), trust=trust)
    if name == read.STUNET:
        raise ValueError("weights of another network than the STU-Net in the plans")
    channels, outputs = stem.shape[1], heads[max(heads)].shape[0]
    architecture = UNetArchitecture(read.UNETS.get(name, name), arguments, channels, outputs, stem.ndim - 2)
    try:
        with torch.device("meta"):
            expected = architecture.build(channels, outputs).state_dict()
    except Exception as error:  # whatever constructors raise at arguments that only a foreign file can have
        raise ValueError(f"{read.UNUSABLE}: {type(error).__name__}: {str(error)[:200]}") from error
    if mismatch := read.describe_mismatch(state, expected):
        raise CheckpointError(f"{path}: {read.UNUSABLE}: of a {name} that they describe, {mismatch}")
    return architecture


def _nnssl_weights(
    path: Path, content: Mapping[str, Any], state: Mapping[str, Tensor], trust: Sequence[str]
) -> UNetWeights:
    """The encoder of a network that nnssl pre-trained: its adaptation plan hands over nothing else."""
    plan = content[_NNSSL]
    described = plan["architecture_plans"]
    name, arguments = described["arch_class_name"], described.get("arch_kwargs")
    if name in ("ResEncL", "NoSkipResEncL"):
        name, arguments = "ResidualEncoderUNet", _RES_ENC_L
    elif name not in (*read.UNETS, *trust):
        raise ValueError(f"a {str(name)[:60]}, which is no U-Net with stages")
    imported = described.get("arch_kwargs_requiring_import") or ()
    network = {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": imported}
    name, checked = read.check_network(network, source=str(path), trust=trust)
    prefix = f"{plan['key_to_encoder'].removesuffix('.stages')}."
    encoder = {f"encoder.{key.removeprefix(prefix)}": state[key] for key in state if key.startswith(prefix)}
    stem = next((encoder[key] for key in _STEMS if key in encoder), None)
    if stem is None or stem.ndim not in (4, 5):
        raise ValueError(f"weights without the stem of nnU-Net's networks under {prefix}")
    architecture = UNetArchitecture(read.UNETS.get(name, name), checked, stem.shape[1], 1, stem.ndim - 2)
    with torch.device("meta"):
        expected = architecture.build(stem.shape[1], 1).state_dict()
    if mismatch := read.describe_mismatch(encoder, {k: t for k, t in expected.items() if k.startswith("encoder.")}):
        raise ValueError(f"of a {name}, {mismatch}")
    tensors = {key: finite_float32(key, tensor) for key, tensor in encoder.items()}
    tensors |= {f"decoder.{key}": tensor for key, tensor in tensors.items() if f"decoder.{key}" in expected}
    by = str(content.get("trainer_name") or "nnssl")
    return UNetWeights(path, tensors, architecture, pretext=by, trained=("encoder",))
