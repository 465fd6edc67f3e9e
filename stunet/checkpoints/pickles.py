"""Pickles read by a machine that knows containers, numbers and strings, and nothing that could run code.

nnU-Net v1 keeps plans in pickles, and Python's own unpickler lets a pickle call whatever it can import. This module
does not use it: it walks over the instructions with ``pickletools`` and carries out the harmless ones itself.
"""

from __future__ import annotations

import os
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from stunet.checkpoints.extent import check_extent
from stunet.checkpoints.numpy_values import NUMPY_GLOBALS, PickledArray, PickledDtype
from stunet.errors import CheckpointError

__all__ = ["MAX_PICKLE_BYTES", "read_pickle", "unpickle"]

MAX_PICKLE_BYTES = 16 * 2**20
"""The published pickles have 2 kB. Those with statistics of a thousand cases stay below this too."""

_BUDGET = 4 * MAX_PICKLE_BYTES  # bytes that calls may make in all, as they can be given one value many times
_MARK = object()


def _latin1(text: Any, encoding: Any) -> bytes:
    """What ``_codecs.encode`` is called for: bytes in pickles of protocol 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("_codecs.encode")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """What ``bytes`` is called for in pickles of protocol 2: nothing at all."""
    return b""


def _make_set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


def _make_frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_make_set(items))


def _ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()  # its items are set afterwards


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _latin1,
    **{f"{module}.bytes": _no_bytes for module in ("builtins", "__builtin__")},
    **{f"{module}.set": _make_set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": _make_frozenset for module in ("builtins", "__builtin__")},
    **NUMPY_GLOBALS,
}


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
        raise CheckpointError(
            "a pickle that is too large to be nnU-Net's plans",
            got=f"{path} ({n_bytes} bytes)",
            expected=f"at most {MAX_PICKLE_BYTES} bytes",
            remedy="Give the .model.pkl or plans.pkl that belongs to the weights.",
        )
    return unpickle(path.read_bytes(), source=str(path))


def unpickle(data: bytes, *, source: str) -> Any:
    """Read a pickle from memory, see :func:`read_pickle`.

    Args:
        data: The pickle.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: Truncated, not a pickle, or asks for anything else than values.
    """
    machine = _Machine()
    try:
        for opcode, arg, _ in _instructions(data):
            machine.run(opcode, arg)
        return machine.result()
    except _Refused as refused:
        raise CheckpointError(
            "a pickle that asks for more than values",
            got=f"{source} asks for {refused}",
            expected="containers, strings, numbers and numpy arrays of numbers alone",
            remedy="Do not load files from sources that you do not trust.",
        ) from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            "a pickle that is truncated or damaged",
            got=f"{source} ({str(error)[:200] or type(error).__name__})",
            expected="a whole pickle, as nnU-Net v1 writes it",
            remedy="Copy the file again.",
        ) from None


class _Refused(Exception):  # noqa: N818 - not an error that users see
    """Carries the name of what a pickle asked for."""


def _instructions(data: bytes) -> Iterator[tuple[str, Any, int | None]]:
    # Declared lengths cost nothing here: they are read from the bytes that are there, or fail.
    for opcode, arg, position in pickletools.genops(BytesIO(data)):
        yield opcode.name, arg, position


def _key(key: Any) -> Any:
    """Check what becomes a key: hashing deeply nested tuples would exhaust the interpreter's stack."""
    parts = key if type(key) is tuple else (key,)
    if not all(part is None or isinstance(part, str | bytes | int | float) for part in parts):
        raise ValueError(f"a {type(key).__name__} as a key")
    return key


class _Machine:
    """The stack, the memo, and one small function for each instruction."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        # A dictionary: an index of 2^32 costs one entry, where Python's unpickler makes room for all below.
        self.memo: dict[int, Any] = {}
        self.finished = False
        self.budget = _BUDGET

    def run(self, opcode: str, arg: Any) -> None:
        """Carry out one instruction.

        Raises:
            _Refused: It is not among those that only make values.
        """
        if opcode in _PUSH:
            self.stack.append(arg)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, arg)
        elif opcode not in ("PROTO", "FRAME"):
            raise _Refused(f"the instruction {opcode}")

    def result(self) -> Any:
        """The one value that is left at the end."""
        if not self.finished or len(self.stack) != 1:
            raise ValueError("it ends too early")
        try:
            check_extent(self.stack[0])
        except ValueError as error:
            raise _Refused(str(error)) from None
        return self.stack[0]

    def stop(self, _: Any) -> None:
        self.finished = True

    def pop_mark(self) -> list[Any]:
        """All values above the last mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark")

    def pop(self, n: int) -> list[Any]:
        """The last n values, deepest first."""
        if len(self.stack) < n:
            raise ValueError("an empty stack")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        if any(item is _MARK for item in items):
            raise ValueError("a mark instead of a value")
        return items

    def top(self, *types: type) -> Any:
        """The last value, which must be of one of these types."""
        if not self.stack or type(self.stack[-1]) not in types:
            raise ValueError("a container of another type")
        return self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def tuple_of(self, n: int) -> None:
        self.stack.append(tuple(self.pop(n)))

    def add_to_list(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add_to_set(self, items: list[Any]) -> None:
        self.top(set).update(_key(item) for item in items)

    def add_to_dict(self, items: list[Any]) -> None:
        target = self.top(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def name(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.find(module, name)

    def name_from_stack(self, _: Any) -> None:
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str:
            raise _Refused("a name that is not text")
        self.find(module, name)

    def find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            raise _Refused(full[:200])
        self.stack.append(_GLOBALS[full])

    def reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        if not any(function is known for known in _GLOBALS.values()) or type(args) is not tuple:
            raise _Refused(f"a call of a {type(function).__name__}")
        try:
            made = function(*args)
        except (ValueError, TypeError) as error:
            raise _Refused(str(error)[:200]) from None
        self.stack.append(made)
        self.spend(made)

    def build(self, _: Any) -> None:
        target, state = self.pop(2)
        if type(target) not in (PickledDtype, PickledArray):
            raise _Refused(f"a change of a {type(target).__name__}")
        try:
            target.__setstate__(state)
        except (ValueError, TypeError) as error:
            raise _Refused(str(error)[:200]) from None
        self.stack.append(target)
        self.spend(target)

    def spend(self, made: Any) -> None:
        """Keep account of what calls make, which may be much more than the pickle's bytes."""
        n_items = len(made) if isinstance(made, set | frozenset | bytes) else 1
        self.budget -= made.nbytes if isinstance(made, np.ndarray) else 64 * n_items
        if self.budget < 0:
            raise _Refused(f"more than {_BUDGET} bytes of memory")


# fmt: off
_PUSH = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING",
})
# fmt: on
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "STOP": _Machine.stop,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "FROZENSET": lambda m, _: m.stack.append(_make_frozenset(m.pop_mark())),
    "APPEND": lambda m, _: m.add_to_list(m.pop(1)),
    "APPENDS": lambda m, _: m.add_to_list(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add_to_set(m.pop_mark()),
    "SETITEM": lambda m, _: m.add_to_dict(m.pop(2)),
    "SETITEMS": lambda m, _: m.add_to_dict(m.pop_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
