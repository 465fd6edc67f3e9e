"""Files with weights, read without running code out of them and without believing the sizes that they state.

Plans come with a model, and nnU-Net imports whatever class and layers they name: :func:`check_network` compares the
names with a short list, and the numbers with what a network can have, before anything is imported or built.

Python's own unpickler calls whatever a pickle names. PyTorch's restricted one (``weights_only=True``) calls little, but
it allocates what a file claims to hold, knows no numpy, and compares no checksums. Here a pickle may name a few small
constructors, every instruction is charged to a budget, and tensors are views of the bytes of the file.
"""

import json
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from stunet.errors import CheckpointError, reading
from stunet.files import file_sha256

MODEL_CARD = "model_card.json"
"""In a model folder: the checksums of its checkpoints, among others."""
MAX_PICKLE_BYTES = 16 * 2**20
"""The published pickles have 2 kB. Those with statistics of a thousand cases stay below this too."""

_MAX_METADATA_BYTES = 64 * 2**20  # of a checkpoint beside its tensors
_BUDGET = 128 * 2**20  # bytes of memory that a pickle may ask for
_COST, _CONTAINER_COST = 64, 256  # bytes of an instruction; empty dictionaries and sets take more
_MAX_DEPTH = 50
_MAX_ARRAY_BYTES = 2**20  # a spacing or a shape is far smaller
_SHARING = 4  # nnU-Net names a weight up to four times: decoders own the encoder, blocks list their layers twice
_DAMAGED = "a checkpoint that is truncated or damaged, or not a checkpoint"


class Refused(Exception):  # noqa: N818 - becomes the error that users see
    """What a file asks for, or has, beyond plain values."""


# Pickles


class _Dtype:
    """A number's type; a pickle states its byte order afterwards."""

    def __init__(self, kind: Any, align: Any = False, copy: Any = False) -> None:
        name = kind[:40] if isinstance(kind, str) else type(kind).__name__
        if not re.fullmatch("[<>=|]?(b1|[iu][1248]|f[248])", name) or align not in (False, 0):
            raise Refused(f"asks for numpy.dtype({name!r})")
        self.dtype = np.dtype(kind)

    def set_state(self, state: Any) -> None:
        # numpy itself takes more than a byte order: a state may declare plain bytes to be pointers.
        if type(state) is not tuple or state[2:] != (None, None, None, -1, -1, 0) or state[0] != 3:
            raise Refused("asks for a numpy.dtype with an unknown state")
        if state[1] in ("<", ">"):
            self.dtype = np.dtype(f"{state[1]}{self.dtype.str[1:]}")


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    """An array of exactly these bytes."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray) or order not in ("C", "F"):
        raise Refused("asks for a numpy.ndarray of objects")
    if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise Refused("asks for a numpy.ndarray with an impossible shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw) or len(raw) > _MAX_ARRAY_BYTES:
        raise Refused(f"asks for a numpy.ndarray of shape {shape} out of {len(raw)} bytes")
    return np.frombuffer(bytes(raw), dtype=dtype.dtype).reshape(shape, order=order)


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if shape != (0,):
        raise Refused("asks for a numpy.ndarray that is not empty before it gets its content")
    return np.empty(0, np.uint8)


def _checked(keys: Iterable[Any]) -> list[Any]:
    """Check what is hashed: nested tuples take for ever, as numbers that are chosen to collide may."""
    if type(keys) not in (list, tuple, set):
        raise ValueError(f"the elements of a {type(keys).__name__}")
    keys = list(keys)
    for key in keys:
        for part in key if type(key) is tuple else (key,):
            if not isinstance(part, str | bytes | float | int | None) or (isinstance(part, int) and abs(part) >= 2**32):
                raise ValueError(f"a {type(key).__name__} as a key")
    return keys


#: What a pickle may name, and what is called in its place.
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": lambda: OrderedDict(),  # its items are set afterwards
    # Bytes in pickles of protocol 2.
    "_codecs.encode": lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
    "numpy.dtype": _Dtype,
    "numpy.ndarray": None,
}
for _module in ("builtins", "__builtin__"):
    _NAMES |= {f"{_module}.set": lambda items=(): set(_checked(items)), f"{_module}.bytes": lambda: b""}
    _NAMES[f"{_module}.frozenset"] = lambda items=(): frozenset(_checked(items))
for _module in ("numpy.core", "numpy._core"):  # files carry either, depending on the numpy of their time
    _NAMES[f"{_module}.multiarray.scalar"] = lambda dtype, raw: _array(raw, dtype, ()).item()
    _NAMES |= {f"{_module}.multiarray._reconstruct": _empty_array, f"{_module}.numeric._frombuffer": _array}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler in Python: lengths cost nothing beyond the data, and its memo is a dictionary."""

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes], names: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(stream, encoding="latin1")
        self.names, self.persistent, self.budget = names, persistent, _BUDGET

    def spend(self, n_bytes: int) -> None:
        self.budget -= n_bytes
        if self.budget < 0:
            raise Refused(f"asks for more than {_BUDGET} bytes of memory")

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in self.names:
            raise Refused(f"asks for {full[:200]}")
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise Refused("asks for the instruction BINPERSID")
        return self.persistent(pid)

    def bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(length)))

    def setitems(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) not in (dict, OrderedDict):
            raise ValueError(f"items of a {type(target).__name__}")
        target.update(zip(_checked(items[::2]), items[1::2], strict=True))

    def additems(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not set:
            raise ValueError(f"elements of a {type(target).__name__}")
        target.update(_checked(items))

    def frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(_checked(items)))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        known = callable(function) and any(function is name for name in self.names.values())
        if type(args) is not tuple or not known:
            raise Refused(f"asks for a call of a {type(function).__name__}")
        self.spend(sum(len(arg) for arg in args if isinstance(arg, str | bytes | bytearray)))
        self.spend(sum(_COST * len(arg) for arg in args if isinstance(arg, list | set | frozenset | dict | tuple)))
        self.stack.append(function(*args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Dtype:
            target.set_state(state)
        elif type(target) is np.ndarray and target.dtype == np.uint8 and target.shape == (0,):
            _, shape, dtype, fortran, raw = state
            full = _array(raw, dtype, shape, "F" if fortran else "C")
            self.spend(full.nbytes)
            # All is checked, and the dtype is numpy's own object: nothing of the file reaches numpy unseen.
            target.__setstate__((1, full.shape, full.dtype, bool(fortran), bytes(raw)))  # type: ignore[arg-type]
        elif self.persistent is None or type(target) is not OrderedDict:  # PyTorch's have notes of versions: dropped
            raise Refused(f"asks for a change of a {type(target).__name__}")


_OWN: dict[str, Callable[[Any], None]] = {
    "BYTEARRAY8": _Unpickler.bytearray8, "REDUCE": _Unpickler.reduce, "BUILD": _Unpickler.build,
    "SETITEM": lambda self: self.setitems([self.stack.pop(), self.stack.pop()][::-1]),
    "SETITEMS": lambda self: self.setitems(self.pop_mark()),
    "ADDITEMS": lambda self: self.additems(self.pop_mark()),
    "FROZENSET": _Unpickler.frozenset,
}  # fmt: skip
_ADMITTED = re.compile(
    r"PROTO|FRAME|MARK|STOP|NONE|NEWTRUE|NEWFALSE|LONG1|BININT[12]?|BINFLOAT|(SHORT_)?BIN(UNICODE|BYTES|STRING)"
    r"|BIN(UNICODE|BYTES)8|EMPTY_\w+|MEMOIZE|(LONG_)?BIN(PUT|GET)|TUPLE[123]?|APPENDS?|(STACK_)?GLOBAL|BINPERSID"
)


def _instruction(code: int, name: str) -> Callable[[Any], None]:
    run: Callable[[Any], None] | None = _OWN.get(name) or pickle._Unpickler.dispatch.get(code)
    cost = _CONTAINER_COST if name.startswith(("EMPTY", "TUPLE", "FROZENSET", "REDUCE", "BINPERSID")) else _COST

    def charged(unpickler: _Unpickler) -> None:
        if run is None or not (name in _OWN or _ADMITTED.fullmatch(name)):
            raise Refused(f"asks for the instruction {name}")
        unpickler.spend(cost)
        run(unpickler)

    return charged


_Unpickler.dispatch = {ord(op.code): _instruction(ord(op.code), op.name) for op in pickletools.opcodes}


def _run(stream: IO[bytes], names: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read the next pickle of a stream in memory."""
    try:
        return _Unpickler(stream, names, persistent).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error


def _check_extent(value: Any, max_bytes: int) -> Any:
    """Check that a value, written out, stays of a bearable size: lists that hold each other are small, and endless."""
    budget, open_values = _BUDGET, [(value, 0)]
    while open_values:
        value_, depth = open_values.pop()
        if isinstance(value_, Tensor | np.ndarray):
            max_bytes -= value_.nbytes
        elif isinstance(value_, str | bytes):
            budget -= len(value_)
        elif isinstance(value_, dict | list | tuple | set | frozenset):
            budget -= _COST * len(value_) * (1 + isinstance(value_, dict))
            items = [*value_, *(value_.values() if isinstance(value_, dict) else ())] if budget >= 0 else []
            open_values += [(item, depth + 1) for item in items]
        if depth > _MAX_DEPTH:
            raise Refused(f"has containers nested more than {_MAX_DEPTH} deep")
        if min(budget, max_bytes) < 0:
            raise Refused("has containers with more than the file can hold")
    return value


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of containers, strings, numbers and numpy arrays of numbers, as nnU-Net v1 keeps its plans in.

    Raises:
        CheckpointError: The file is missing, too large, truncated, or asks for anything else, which is named.
    """
    path = require_file(Path(path), "pickle")
    if (n_bytes := path.stat().st_size) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path} has {n_bytes} bytes, too large for nnU-Net's plans ({MAX_PICKLE_BYTES} bytes)")
    return unpickle(path.read_bytes(), source=str(path))


def unpickle(data: bytes, *, source: str) -> Any:
    """Read a pickle from memory, see :func:`read_pickle`."""
    try:
        with reading(source, "a pickle that is truncated or damaged"):
            return _check_extent(_run(BytesIO(data), _NAMES), _BUDGET)
    except Refused as refused:
        raise CheckpointError(f"{source} {refused}, not for values alone: do not load what you do not trust") from None


# Files of torch.save


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    if type(storage) is not Tensor or any(isinstance(value, dict) and value for value in more):
        raise Refused("asks for a tensor of another kind than numbers out of the file")
    if len(size) > 16 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("has a tensor of an impossible shape")
    if math.prod(size) > storage.numel():  # a small file that would fill the memory
        raise Refused(f"has a tensor {tuple(size)}, more than its {storage.nbytes} B")
    return storage.as_strided(tuple(size), tuple(stride), offset)


_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_TORCH_NAMES: dict[str, Any] = {
    **_NAMES,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.device": lambda *which: torch.device(*which),
    "torch.Size": lambda sizes: tuple(_checked(sizes)),
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
}
#: What a file of PyTorch < 1.6 begins with: its magic number as a pickle.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def load_archive(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote: tensors, mapped from the file, and plain values, numpy's numbers as Python's own.

    The checksum of each member is compared, and where a model folder's card notes a checkpoint's SHA-256, that one.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, of another format, or asks for code to be run.
    """
    path = require_file(Path(path))
    card = path.absolute().parent.parent / MODEL_CARD
    if card.is_file():
        with reading(card):
            noted = json.loads(card.read_text(encoding="utf-8")).get("files", {}).get(f"{path.parent.name}/{path.name}")
        if noted is not None and file_sha256(path) != noted:
            raise CheckpointError(f"{path} is not the file that was converted: {card} notes SHA-256 {noted}")
    with path.open("rb") as file:
        with reading(path, _DAMAGED):  # an empty file cannot be mapped
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return load_tensors(file, buffer, path)


def load_tensors(file: IO[bytes], buffer: Any, path: Path) -> Any:
    """Read an open file of ``torch.save``, see :func:`load_archive`; tensors will be views of the buffer."""
    legacy = buffer[: len(_LEGACY_START)] == _LEGACY_START
    try:
        with reading(path, _DAMAGED):
            return _check_extent((_read_legacy if legacy else _read_zip)(file, buffer), _SHARING * len(buffer) + 2**26)
    except Refused as refused:
        raise CheckpointError(f"{path} cannot be read safely, as it {str(refused)[:300]}: do not trust it") from None


def _read_zip(file: IO[bytes], buffer: Any) -> Any:
    if not zipfile.is_zipfile(file):
        raise EOFError(f"{len(buffer)} bytes without the directory that torch.save writes last")
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        if any(e.compress_type or e.flag_bits & 1 or e.compress_size != e.file_size for e in members.values()):
            raise Refused("has compressed entries, which torch.save never writes")
        if len(members) < len(archive.infolist()) or sum(e.file_size for e in members.values()) > len(buffer):
            raise Refused("has members that share their names or bytes")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged[:100]} does not have its checksum (CRC-32)")

    def record(name: str) -> tuple[int, int]:
        entry = members[name]
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", buffer, entry.header_offset + 26))
        return start, start + entry.file_size

    content = [name for name in members if name.endswith("/data.pkl")]
    if len(content) != 1:
        raise Refused("is a zip file that torch.save did not write")
    folder, (start, end) = content[0].removesuffix("data.pkl"), record(content[0])
    if f"{folder}byteorder" in members and buffer[slice(*record(f"{folder}byteorder"))] != sys.byteorder.encode():
        raise Refused("has another byte order than this machine")
    if end - start > _MAX_METADATA_BYTES:
        raise Refused(f"has {end - start} bytes beside its tensors")
    storages = _storages(buffer, lambda key: record(f"{folder}data/{key}"))
    return _run(BytesIO(buffer[start:end]), _TORCH_NAMES, storages)


def _read_legacy(file: IO[bytes], buffer: Any) -> Any:
    """Magic number, version and system, the content, the storages' keys, and for each its length and numbers."""
    stream = BytesIO(buffer[:_MAX_METADATA_BYTES])
    for _ in range(3):
        _run(stream, _NAMES)
    start = stream.tell()
    sizes: dict[str, int] = {}

    def note(identity: Any) -> Tensor:
        dtype, key, n = _identity(identity)
        if sizes.setdefault(key, n * dtype.itemsize) != n * dtype.itemsize:
            raise ValueError("one storage of two sizes")
        return torch.empty(n, dtype=dtype, device="meta")

    _run(stream, _TORCH_NAMES, note)
    ranges: dict[str, tuple[int, int]] = {}
    keys, position = _run(stream, _NAMES), stream.tell()
    for key in keys:
        ranges[key] = position + 8, position + 8 + sizes[key]
        position += 8 + sizes[key]
    stream.seek(start)
    return _run(stream, _TORCH_NAMES, _storages(buffer, ranges.__getitem__))


def _identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and length of a storage, as PyTorch's persistent ids say them."""
    kind, dtype, key, _, n, *view = identity
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or any(view):
        raise Refused("asks for something else than storages of numbers")
    if type(n) is not int or not 0 <= n < 2**48:
        raise Refused("has a storage of an impossible size")
    return dtype, key, n


def _storages(buffer: Any, find: Callable[[str], tuple[int, int]]) -> Callable[[Any], Tensor]:
    """What makes the numbers that tensors are views of out of ranges of the file; ``find`` says where they are."""
    known: dict[str, Tensor] = {}

    def storage(identity: Any) -> Tensor:
        dtype, key, n = _identity(identity)
        if key not in known:
            start, end = find(key)
            if end - start != n * dtype.itemsize:
                raise Refused(f"has {end - start} bytes for a storage of {n * dtype.itemsize}")
            if end > len(buffer):
                raise EOFError(f"{len(buffer)} bytes")
            numbers = torch.frombuffer(buffer, dtype=dtype, count=n, offset=start) if n else torch.empty(0, dtype=dtype)
            known[key] = numbers.clone() if start % dtype.itemsize else numbers
        if known[key].dtype != dtype:
            raise Refused("has one storage of two types")
        return known[key]

    return storage


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that nnU-Net v2 wrote, admitting tensors, mapped from the file, and plain values alone.

    Raises:
        CheckpointError: The file is missing, truncated, no checkpoint, or asks for code to be run.
    """
    checkpoint = load_archive(path)
    needed = {"network_weights": dict, "current_epoch": int}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), t) for k, t in needed.items()):
        raise CheckpointError(f"{path} holds {describe_content(checkpoint)}: give one that nnUNetv2_train wrote")
    return checkpoint


def describe_content(content: Any) -> str:
    """Return what a file holds, for errors."""
    if isinstance(content, dict):
        return f"a dictionary with {', '.join(str(key)[:60] for key in list(content)[:5]) or 'nothing in it'}"
    return f"a {type(content).__name__}"


def require_file(path: Path, what: str = "checkpoint") -> Path:
    """Return the path of a file that must be there."""
    if not path.is_file():
        raise CheckpointError(f"missing {what}: {path} is no file; check the path")
    return path


def check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str | os.PathLike[str]
) -> None:
    """Check that weights fit a network's ``state_dict()``, name by name and shape by shape.

    Raises:
        CheckpointError: Names the first parameters that are missing, surplus or of another shape.
    """
    if mismatch := describe_mismatch(weights, expected):
        raise CheckpointError(f"{source} does not fit the network: {mismatch}; use the plans that it was trained with")


def describe_mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Name the first parameters that are missing, surplus or of another shape; nothing where all fit."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in the network" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


# Networks that plans may name

#: What the plans of models that were trained without labels name.
PRETEXT_ONLY = "stunet.pretexts.PretextOnly"
STUNET = "stunet.network.STUNet"
#: The other networks, by the names that nnU-Net's plans give them.
UNETS = {
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": "PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    "PlainConvUNet": "PlainConvUNet",  # as plans of nnU-Net < 2.2 name them
    "ResidualEncoderUNet": "ResidualEncoderUNet",
}
#: The layers that plans may name.
_LAYERS = re.compile(
    r"torch\.nn\.(?:modules\.(?:conv|instancenorm|batchnorm|activation|dropout)\.)?"
    r"(Conv[23]d|InstanceNorm[23]d|BatchNorm[23]d|LeakyReLU|ReLU|PReLU|ELU|GELU|SiLU|Mish|Dropout[23]?d?)"
)
_LAYER_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")
UNUSABLE = "plans that do not say what network the weights belong to"
# Far beyond every network that was ever planned, and still soon built.
_MAX_STAGES, _MAX_NUMBER, _MAX_CONVOLUTIONS = 32, 8192, 1000


def check_network(architecture: Any, *, source: str, trust: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Check what plans say of a network, before anything that they name is imported.

    Args:
        architecture: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import`` of a configuration.
        source: Where it comes from, for messages.
        trust: Full names of further classes and layers, which the user trusts. The arguments of such a class are not
            checked but for the names that they import.

    Returns:
        The name of the class, and its arguments with layers as classes; those of a trusted class as they are.

    Raises:
        CheckpointError: An unknown class or layer, or numbers that no network has.
    """
    with reading(source, UNUSABLE):
        name, arguments = architecture["network_class_name"], dict(architecture["arch_kwargs"])
        imported = list(architecture.get("_kw_requires_import", ()))
        if name == PRETEXT_ONLY:
            raise CheckpointError(f"no labels have trained {source}, so it predicts none: fine-tune it first")
        if name not in (STUNET, *UNETS, *trust):
            text = f"{source} asks for code which is not trusted, the network {str(name)[:100]}"
            raise CheckpointError(f"{text}: only if you know this class and trust the model, --trust {str(name)[:100]}")
        checked = {key: value for key, value in arguments.items() if key != "deep_supervision"}  # nnU-Net decides on it
        for key, value in arguments.items():
            if key in imported or (key in _LAYER_ARGUMENTS and name not in trust):
                match = _LAYERS.fullmatch(value) if isinstance(value, str) else None
                if match is not None and hasattr(nn, match[1]):
                    checked[key] = getattr(nn, match[1])
                elif value is not None and value not in trust:
                    raise ValueError(f"{key} {str(value)[:100]}, which is none of PyTorch's usual layers")
            elif name not in trust and key != "activation_checkpointing" and not _is_plain(value):
                raise ValueError(f"{key} {str(value)[:100]}")
        if name not in trust:
            n_stages = arguments.get("n_stages", 1)
            blocks = [value for key, value in arguments.items() if key.startswith(("n_conv", "n_blocks"))]
            if sum(sum(n) if isinstance(n, list | tuple) else n * n_stages for n in blocks) > _MAX_CONVOLUTIONS:
                raise ValueError(f"a network of more than {_MAX_CONVOLUTIONS} convolutions or blocks")
        return name, checked


def described_network(init_args: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the architecture in the plans of a checkpoint, also of nnU-Net < 2.2; None where there is none."""
    with reading(path, UNUSABLE):
        configurations = dict(init_args.get("plans") or {}).get("configurations", {})
        name = init_args.get("configuration")
        for _ in range(len(configurations)):
            configuration = configurations.get(name)
            if configuration is None:
                return None
            if "UNet_class_name" in configuration:
                return _translate(configuration)
            if "architecture" in configuration:
                return dict(configuration["architecture"])
            name = configuration.get("inherits_from")
        if name in configurations:
            raise ValueError(f"configuration {name} inherits from itself")
    return None


def _translate(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in plans of nnU-Net < 2.2, whose other arguments were always the same."""
    name, blocks = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
    n_axes, strides = len(configuration["patch_size"]), configuration["pool_op_kernel_sizes"]
    base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    arguments = {
        "n_stages": len(strides),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(min(len(strides), _MAX_STAGES))],
        "conv_op": f"torch.nn.Conv{n_axes}d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": strides,
        "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage": blocks,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{n_axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {"network_class_name": name, "arch_kwargs": arguments}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_STAGES and all(map(_is_plain, value))
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= _MAX_NUMBER)
