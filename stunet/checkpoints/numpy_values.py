"""Numpy values in pickles, rebuilt from their bytes by checked functions instead of by numpy's own.

numpy's unpickling trusts what it gets: the state of a dtype may declare plain bytes to be pointers. So nothing of it is
called here with anything out of a file. Only numbers and booleans are admitted; object arrays, structures and strings
are not.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

__all__ = ["MAX_ARRAY_BYTES", "NUMPY_GLOBALS", "PickledArray", "PickledDtype"]

MAX_ARRAY_BYTES = 2**20
"""An array in a checkpoint's metadata is a spacing or a shape; this is far more than any of them needs."""

_KINDS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


class PickledDtype:
    """A number's type as pickles describe it.

    Args:
        kind: Kind and bytes, for example ``f8``; a byte order in front is admitted.
        align: Always False in pickles.
        copy: Ignored.

    Raises:
        ValueError: Not the type of a number or boolean.
    """

    def __init__(self, kind: str, align: bool = False, copy: bool = False) -> None:
        plain = kind.lstrip("<>=|") if isinstance(kind, str) else kind
        if plain not in _KINDS or align not in (False, 0):
            raise ValueError(f"numpy.dtype({str(kind)[:40]!r})")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: Any) -> None:
        """Take over the byte order; anything else that a state can say has no place in a number.

        Raises:
            ValueError: The state says more than a byte order.
        """
        if not isinstance(state, tuple) or len(state) != 8 or state[1] not in ("<", ">", "=", "|"):
            raise ValueError("a numpy.dtype with an unknown state")
        if state[0] != 3 or state[2:] != (None, None, None, -1, -1, 0):
            raise ValueError("a numpy.dtype with fields or flags")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray(np.ndarray):
    """An array that takes its content from checked bytes; empty until then."""

    def __new__(cls) -> PickledArray:
        """Make an empty array. Without arguments, so that a pickle cannot ask for memory."""
        return cast(PickledArray, super().__new__(cls, (0,), dtype=np.uint8))

    def __setstate__(self, state: Any) -> None:
        """Take shape, type and bytes.

        Args:
            state: Version, shape, :class:`PickledDtype`, whether the first axis varies fastest, and the bytes.

        Raises:
            ValueError: The parts do not fit each other, or the array is too large.
        """
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a numpy.ndarray with an unknown state")
        _, shape, dtype, fortran, raw = state
        array = _from_bytes(raw, dtype, shape)
        # All values are checked, and the dtype is numpy's own object: its setstate gets nothing out of the file.
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.tobytes()))  # type: ignore[arg-type]


def _from_bytes(raw: Any, dtype: Any, shape: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes | bytearray):
        raise ValueError("a numpy.ndarray of objects")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("a numpy.ndarray with an impossible shape")
    n_bytes = math.prod(shape) * dtype.dtype.itemsize
    if n_bytes != len(raw) or n_bytes > MAX_ARRAY_BYTES:
        raise ValueError(f"a numpy.ndarray of {n_bytes} bytes out of {len(raw)}")
    return np.frombuffer(bytes(raw), dtype=dtype.dtype).reshape(shape)


def _scalar(dtype: Any, raw: Any = None) -> bool | int | float:
    """What ``numpy.core.multiarray.scalar`` is called for; the number as Python's own."""
    value: bool | int | float = _from_bytes(raw, dtype, ()).item()
    return value


def _reconstruct(kind: Any, shape: Any, code: Any) -> PickledArray:
    """What ``numpy.core.multiarray._reconstruct`` is called for: an empty array that gets its state afterwards."""
    if kind is not PickledArray or shape != (0,):
        raise ValueError("a numpy.ndarray that is not empty before it gets its content")
    return PickledArray()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """What ``numpy.core.numeric._frombuffer`` is called for in pickles of protocol 5."""
    if order not in ("C", "F"):
        raise ValueError("a numpy.ndarray with an unknown order")
    flat = _from_bytes(raw, dtype, shape).reshape(-1)
    return cast("np.ndarray[Any, Any]", flat.reshape(shape, order=order))


NUMPY_GLOBALS: dict[str, Any] = {
    "numpy.dtype": PickledDtype,
    "numpy.ndarray": PickledArray,
    # Files carry either module path, depending on the numpy of their time.
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}
"""What is given to a pickle that asks for one of these names."""
