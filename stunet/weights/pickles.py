"""A restricted unpickler: containers, numbers, strings, numpy arrays of numbers, and nothing that could run code.

nnU-Net v1 keeps plans in pickles, and PyTorch what is no tensor of a checkpoint. Python's own unpickler lets a pickle
call whatever it can import, and PyTorch's and numpy's trust the sizes that they read. None of them is used here:
``pickletools`` reads the instructions, the harmless ones are carried out, and each is paid for out of a budget.
"""

from __future__ import annotations

import math
import os
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from stunet.errors import CheckpointError, reading

__all__ = ["MAX_PICKLE_BYTES", "Refused", "read_pickle", "run_pickle", "unpickle"]

MAX_PICKLE_BYTES = 16 * 2**20
"""The published pickles have 2 kB. Those with statistics of a thousand cases stay below this too."""

_BUDGET = 128 * 2**20  # bytes of memory that a pickle may ask for
_COST = 64  # bytes of an instruction and of most values; empty dictionaries and sets take more
_CONTAINER_COST = 256
_MAX_DEPTH = 50
_MAX_ARRAY_BYTES = 2**20  # a spacing or a shape is far smaller
_MARK = object()
_NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


class Refused(Exception):  # noqa: N818 - becomes the error that users see
    """What a file asks for, or has, beyond plain values."""

    def __init__(self, what: str, verb: str = "asks for") -> None:
        super().__init__(f"{verb} {what}")


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of containers, strings, numbers and numpy arrays of numbers.

    Args:
        path: For example ``plans.pkl`` or ``model_final.model.pkl`` of nnU-Net v1.

    Returns:
        Its content; numpy's numbers as Python's own.

    Raises:
        CheckpointError: The file is missing, too large, truncated, or asks for anything else, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("missing pickle", got=path, expected="a file", remedy="Check the path, or leave it out.")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_PICKLE_BYTES:
        raise CheckpointError("a pickle that is too large to be nnU-Net's plans", got=f"{path} ({n_bytes} bytes)",
                              expected=f"at most {MAX_PICKLE_BYTES} bytes",
                              remedy="Give the .model.pkl or plans.pkl that belongs to the weights.")  # fmt: skip
    return unpickle(path.read_bytes(), source=str(path))


def unpickle(data: bytes, *, source: str) -> Any:
    """Read a pickle from memory, see :func:`read_pickle`.

    Args:
        data: The pickle.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: Truncated, not a pickle, or asks for anything else than values.
    """
    try:
        with reading(source, "a pickle that is truncated or damaged"):
            return check_extent(run_pickle(BytesIO(data)), _BUDGET)
    except Refused as refused:
        raise CheckpointError("a pickle that asks for more than values", got=f"{source} {refused}",
                              expected="containers, strings, numbers and numpy arrays of numbers alone",
                              remedy="Do not load files from sources that you do not trust.") from None  # fmt: skip


def run_pickle(
    stream: IO[bytes], names: Mapping[str, Any] | None = None, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Read the next pickle of a stream.

    Args:
        stream: In memory: declared lengths cost nothing there.
        names: What a pickle may name beyond plain values and numpy's numbers; functions are called with its arguments.
        persistent: What makes values of persistent ids, which PyTorch uses for storages.

    Raises:
        Refused: It asks for anything else.
        Exception: Whatever else damaged content leads to; callers wrap this in :func:`stunet.errors.reading`.
    """
    machine = _Machine({**_NAMES, **(names or {})}, persistent)
    for opcode, arg, _ in pickletools.genops(stream):
        machine.run(opcode.name, arg)
    if len(machine.stack) != 1:
        raise ValueError("it ends too early")
    return machine.stack[0]


def check_extent(value: Any, max_bytes: int) -> Any:
    """Check that a value, written out, stays of a bearable size: lists that hold each other are small, and endless.

    Returns:
        The value.

    Raises:
        Refused: Nested too deeply or within itself, or too large, each value counted as often as it is named.
    """
    known: dict[int, tuple[int, int]] = {}

    def extent(value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, Tensor | np.ndarray | str | bytes):
            return _COST + (value.nbytes if isinstance(value, Tensor | np.ndarray) else len(value)), 0
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return _COST, 0
        if depth > _MAX_DEPTH:
            raise Refused(f"containers nested more than {_MAX_DEPTH} deep", "has")
        if id(value) not in known:
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            inner = [extent(item, depth + 1) for item in items]
            known[id(value)] = _COST + sum(n for n, _ in inner), 1 + max((h for _, h in inner), default=0)
        n_bytes, height = known[id(value)]
        if depth + height > _MAX_DEPTH:
            raise Refused(f"containers nested more than {_MAX_DEPTH} deep", "has")
        if n_bytes > max_bytes:
            raise Refused(f"containers with more than {max_bytes} bytes", "has")
        return n_bytes, height

    extent(value, 0)
    return value


class _Dtype:
    """A number's type; a pickle of one says its byte order afterwards."""

    def __init__(self, kind: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(kind, str) or kind.lstrip("<>=|") not in _NUMBERS or align not in (False, 0):
            raise Refused(f"numpy.dtype({str(kind)[:40]!r})")
        self.dtype = np.dtype(kind)

    def set_state(self, state: Any) -> None:
        # numpy itself takes more than a byte order: a state may declare plain bytes to be pointers.
        if type(state) is not tuple or state[2:] != (None, None, None, -1, -1, 0) or state[0] != 3:
            raise Refused("a numpy.dtype with an unknown state")
        if state[1] in ("<", ">"):
            self.dtype = np.dtype(f"{state[1]}{self.dtype.str[1:]}")


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    """An array of exactly these bytes."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise Refused("a numpy.ndarray of objects")
    if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**32 for n in shape):
        raise Refused("a numpy.ndarray with an impossible shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw) or len(raw) > _MAX_ARRAY_BYTES or order not in ("C", "F"):
        raise Refused(f"a numpy.ndarray of shape {shape} out of {len(raw)} bytes")
    return np.frombuffer(bytes(raw), dtype=dtype.dtype).reshape(shape, order=order)


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if kind is not _ARRAY_TYPE or shape != (0,):
        raise Refused("a numpy.ndarray that is not empty before it gets its content")
    return np.empty(0, np.uint8)


def _fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    _, shape, dtype, fortran, raw = state
    full = _array(raw, dtype, shape, "F" if fortran else "C")
    # All is checked, and the dtype is numpy's own object: nothing of the file reaches numpy unseen.
    array.__setstate__((1, full.shape, full.dtype, bool(fortran), bytes(raw)))  # type: ignore[arg-type]


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes in pickles of protocol 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise Refused("_codecs.encode")
    return text.encode("latin1")


def _key(key: Any) -> Any:
    """Check what becomes a key: the hash of nested tuples takes for ever, as that of chosen numbers may."""
    for part in key if type(key) is tuple else (key,):
        if not (part is None or isinstance(part, str | bytes | float) or (isinstance(part, int) and abs(part) < 2**32)):
            raise ValueError(f"a {type(key).__name__} as a key")
    return key


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


_ARRAY_TYPE = object()
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": lambda: OrderedDict(),  # its items are set afterwards
    "_codecs.encode": _latin1,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _ARRAY_TYPE,
}
for _builtins in ("builtins", "__builtin__"):
    _NAMES |= {f"{_builtins}.set": _set, f"{_builtins}.frozenset": lambda items=(): frozenset(_set(items))}
    _NAMES[f"{_builtins}.bytes"] = lambda: b""  # pickles of protocol 2 call it for no bytes at all
for _core in ("numpy.core", "numpy._core"):  # files carry either, depending on the numpy of their time
    _NAMES[f"{_core}.multiarray.scalar"] = lambda dtype, raw: _array(raw, dtype, ()).item()
    _NAMES[f"{_core}.multiarray._reconstruct"] = _empty_array
    _NAMES[f"{_core}.numeric._frombuffer"] = _array


class _Machine:
    """The stack, the memo, and one small function for each instruction."""

    def __init__(self, names: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        # A dictionary: an index of 2^32 costs one entry, where Python's unpickler makes room for all below.
        self.memo: dict[int, Any] = {}
        self.budget = _BUDGET

    def run(self, opcode: str, arg: Any) -> None:
        self.spend(_COST)
        if opcode in _PUSH:
            if type(arg) is int and abs(arg) >= 2**128:
                raise Refused("an endless number")
            self.spend(len(arg) if isinstance(arg, str | bytes | bytearray) else 0)
            self.stack.append(arg)
        elif opcode in _CONSTANTS:
            self.spend(_CONTAINER_COST if opcode.startswith("EMPTY") else 0)
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, arg)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"the instruction {opcode}")

    def spend(self, n_bytes: int) -> None:
        self.budget -= n_bytes
        if self.budget < 0:
            raise Refused(f"more than {_BUDGET} bytes of memory")

    def pop_mark(self) -> list[Any]:
        """All values above the last mark."""
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("no mark")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def pop(self, n: int) -> list[Any]:
        """The last n values, deepest first."""
        items = self.stack[-n:]
        if len(items) < n or any(item is _MARK for item in items):
            raise ValueError("an empty stack")
        del self.stack[-n:]
        return items

    def top(self, *types: type) -> Any:
        """The last value, which must be of one of these types."""
        if type(self.stack[-1]) not in types:
            raise ValueError("a container of another type")
        return self.stack[-1]

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def make(self, value: Any) -> None:
        self.stack.append(value)
        self.spend(_CONTAINER_COST)

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.top(set).update(_set(items))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def find(self, name: str) -> None:
        if name not in self.names:
            raise Refused(name[:200])
        self.stack.append(self.names[name])

    def find_on_stack(self, _: Any) -> None:
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is not text")
        self.find(f"{module}.{name}")

    def reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        if not callable(function) or not any(function is known for known in self.names.values()):
            raise Refused(f"a call of a {type(function).__name__}")
        if type(args) is not tuple:
            raise Refused(f"a call with a {type(args).__name__}")
        self.spend(sum(len(arg) for arg in args if isinstance(arg, list | set | dict | str | bytes | bytearray)))
        self.make(function(*args))

    def build(self, _: Any) -> None:
        target, state = self.pop(2)
        if type(target) is _Dtype:
            target.set_state(state)
        elif type(target) is np.ndarray and target.dtype == np.uint8 and target.shape == (0,):
            _fill_array(target, state)
            self.spend(target.nbytes)
        elif self.persistent is None or type(target) is not OrderedDict:  # PyTorch's have notes of versions: dropped
            raise Refused(f"a change of a {type(target).__name__}")
        self.stack.append(target)

    def find_persistent(self, _: Any) -> None:
        if self.persistent is None:
            raise Refused("the instruction BINPERSID")
        self.make(self.persistent(*self.pop(1)))


# fmt: off
_PUSH = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING",
})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}
# fmt: on
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda m, _: m.make(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.make(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.make(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.make(tuple(m.pop(3))),
    "FROZENSET": lambda m, _: m.make(frozenset(_set(m.pop_mark()))),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, arg: m.find(arg.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.find_persistent,
}
