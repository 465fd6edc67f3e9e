"""Pickles: what nnU-Net v1 writes is read, anything else is refused by name, and no code in them ever runs."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import v1_plans

from stunet.errors import CheckpointError
from stunet.weights.read import MAX_PICKLE_BYTES, read_pickle, unpickle


def reduced(function: Any, *args: Any) -> Any:
    """An object whose pickle calls a function."""

    class Call:
        def __reduce__(self) -> Any:
            return function, args

    return Call()


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, np.ndarray):
        return a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plans_of_v1_are_read(protocol: int) -> None:
    content = {
        "plans": v1_plans(),
        "values": [None, True, False, 1, -(2**40), 10**30, 1.5, "ä", b"\xff", b"", (), (1, 2, 3, 4)],
        "sets": ({1, 2}, frozenset({3})),
        "arrays": [
            np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array([1, 2], ">i2"),
            np.array([True, False]), np.zeros((0, 3)), np.float16([0.5]),
        ],
        "scalars": [np.float64(0.1), np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True)],
        "ordered": OrderedDict([(1, "CT"), ("b", OrderedDict())]),
    }  # fmt: skip
    got = unpickle(pickle.dumps(content, protocol=protocol), source="x.pkl")
    assert same(got, content)
    assert [type(value) for value in got["scalars"]] == [float, float, int, int, bool]


@pytest.mark.parametrize("core", ["core", "_core"])
def test_both_module_paths_of_numpy(core: str) -> None:
    data = pickle.dumps(np.array([1.5, 2.5]), protocol=3)
    here = b"numpy._core" if b"numpy._core" in data else b"numpy.core"
    got = unpickle(data.replace(here, f"numpy.{core}".encode()), source="x")
    assert got.tolist() == [1.5, 2.5]


def test_published_pickles(shared: Path) -> None:
    folder = shared / "golden" / "published_plan_files"
    assert read_pickle(folder / "plans.pkl")["num_classes"] == 104
    for size in ("small", "base", "large", "huge"):
        content = read_pickle(folder / f"{size}_ep4k.model.pkl")
        assert content["name"] == f"STUNetTrainer_{size}"
        assert content["init"] == ("", 0, "", "", False, 0, True, False, True)
        stage = content["plans"]["plans_per_stage"][0]
        assert stage["current_spacing"].tolist() == [1.5, 1.5, 1.5]
        assert stage["patch_size"].tolist() == [128, 128, 128]
        assert stage["do_dummy_2D_data_aug"] is False


MARKER = "/tmp/stunet_pickle_was_run"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (reduced(os.system, f"touch {MARKER}"), "posix.system"),
        (reduced(eval, f"open({MARKER!r}, 'w')"), "builtins.eval"),
        (reduced(exec, "1"), "builtins.exec"),
        (reduced(getattr, {}, "keys"), "builtins.getattr"),
        (reduced(builtins.bytearray, 10**12), "builtins.bytearray"),
        (reduced(np.zeros, 10**12), "numpy.zeros"),
        (reduced(np.load, "x.npy"), "numpy.load"),
        (reduced(pickle.loads, b"."), "pickle.loads"),
        (Path("x"), "Path"),
        (object(), "copyreg._reconstructor|object"),
        (np.array([None]), r"numpy\.dtype\('O8'\)"),
        (np.array(["text"]), r"numpy\.dtype\('U4'\)"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "numpy.dtype"),
        (np.array(1, dtype="M8[s]"), "numpy.dtype"),
        (1 + 2j, "builtins.complex"),
    ],
)
@pytest.mark.parametrize("where", ["top", "nested"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_anything_else_is_refused_by_name(content: Any, name: str, where: str, protocol: int) -> None:
    bomb = content if where == "top" else OrderedDict(plans={"a": [(1, content)]})
    data = pickle.dumps(bomb, protocol=protocol)
    with pytest.raises(CheckpointError, match=name.replace("builtins.", "(builtins|__builtin__).")):
        unpickle(data, source="evil.pkl")
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),
        (b"(U\x04trueios\nsystem\n.", "INST"),
        (b"\x80\x02(cos\nsystem\no.", "os.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02U\x01aQ.", "BINPERSID"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x02N)R.", "a call of a NoneType"),
        # Attributes of what is admitted cannot be changed.
        (b"\x80\x02ccollections\nOrderedDict\n)R}U\x04keysNsb.", "a change of a OrderedDict"),
        (b"\x80\x02cnumpy\ndtype\n}U\x05dtypeNsb.", "a change of a type"),
    ],
)
def test_instructions_by_hand(data: bytes, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        unpickle(data, source="evil.pkl")


def dtype_with(state: tuple[Any, ...]) -> bytes:
    """A pickle of an array whose dtype has this state."""
    dtype = reduced(np.dtype, "f8", False, True)
    type(dtype).__reduce__ = lambda self: (np.dtype, ("f8", False, True), state)  # type: ignore[method-assign]
    return pickle.dumps(reduced(np.float64(0).__reduce__()[0], dtype, b"\0" * 8), protocol=4)


def test_a_dtype_that_declares_bytes_to_be_pointers() -> None:
    assert unpickle(dtype_with((3, "<", None, None, None, -1, -1, 0)), source="x") == 0.0
    for state in ((3, "<", None, None, None, -1, -1, 63), (3, "<", None, ("a",), {"a": 1}, 8, 8, 0), (3,), ()):
        with pytest.raises(CheckpointError, match=r"numpy\.dtype"):
            unpickle(dtype_with(state), source="x")


@pytest.mark.parametrize("shape", [(10**9,), (2,), (-1,), (2**62, 4), "x"])
def test_an_array_that_is_larger_than_its_bytes(shape: Any) -> None:
    reconstruct, args, state = np.zeros(1).__reduce__()
    lying = reduced(None)
    type(lying).__reduce__ = lambda self: (reconstruct, args, (1, shape, state[2], False, state[4]))  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"numpy\.ndarray"):
        unpickle(pickle.dumps(lying, protocol=4), source="x")
    with pytest.raises(CheckpointError, match=r"numpy\.ndarray"):
        unpickle(pickle.dumps(reduced(reconstruct, np.ndarray, shape, b"b"), protocol=4), source="x")


def laughs(levels: int) -> list[Any]:
    """A list that holds 2^levels values and takes a few bytes."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def nested(depth: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value,)
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


BOMBS = {
    "memo index of 2^32": b"\x80\x02K\x01r\xff\xff\xff\xff0",
    "text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "bytearray of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
    "number of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "2^40 values": pickle.dumps(laughs(40)),
    "a list in itself": pickle.dumps(endless()),
    "deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a deep key, whose hash would exhaust the stack": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "one list made into a set again and again": b"\x80\x04]\x94("
    + b"".join(b"J" + struct.pack("<i", i) for i in range(10_000))
    + b"e\x8c\x08builtins\x8c\x03set\x93\x94("
    + b"h\x01h\x00\x85R" * 50_000
    + b"l.",
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by what Linux says is used")
@pytest.mark.parametrize("name", BOMBS)
def test_memory_bombs(name: str) -> None:
    """In a process of its own, which may take 2 GB of address space for its imports and 300 MB beyond."""
    code = (
        "import resource, sys\n"
        "from stunet.weights.read import unpickle\n"
        "from stunet.errors import CheckpointError\n"
        "data = sys.stdin.buffer.read()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)\n"
        "try:\n    unpickle(data, source='bomb.pkl')\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    got = subprocess.run([sys.executable, "-c", code], input=BOMBS[name], capture_output=True, check=False, timeout=60)
    assert got.returncode == 0, got.stderr[-500:]
    assert b"bomb.pkl" in got.stdout


def test_which_bombs_are_refused() -> None:
    for content in (laughs(40), endless(), nested(60)):
        with pytest.raises(CheckpointError, match=r"containers (nested|with)"):
            unpickle(pickle.dumps(content), source="x")
    assert unpickle(pickle.dumps(laughs(10)), source="x") == laughs(10)


def test_truncated_anywhere() -> None:
    whole = pickle.dumps(v1_plans(), protocol=4)
    for n in range(0, len(whole), 3):
        with pytest.raises(CheckpointError, match=r"x\.pkl is .*truncated"):
            unpickle(whole[:n], source="x.pkl")


def test_damaged_anywhere() -> None:
    """A flipped bit gives other values or an error of ours, never anything else."""
    whole = bytearray(pickle.dumps(v1_plans(), protocol=4))
    for n in range(len(whole)):
        whole[n] ^= 0x55
        with contextlib.suppress(CheckpointError):
            unpickle(bytes(whole), source="x.pkl")
        whole[n] ^= 0x55


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing pickle[\s\S]*none\.pkl"):
        read_pickle(tmp_path / "none.pkl")
    with (tmp_path / "big.pkl").open("wb") as file:
        file.truncate(MAX_PICKLE_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"big\.pkl has \d+ bytes, too large"):
        read_pickle(tmp_path / "big.pkl")


def test_one_tuple_made_into_sets_again_and_again_is_refused() -> None:
    numbers = b"".join(b"J" + i.to_bytes(4, "little") for i in range(20_000))
    one_set = b"h\x00h\x01\x85R"  # the memo's set, called with the memo's tuple
    data = b"\x80\x04(cbuiltins\nset\n\x94(" + numbers + b"t\x94" + one_set * 1000 + b"l."
    with pytest.raises(CheckpointError, match="asks for more than"):
        unpickle(data, source="x.pkl")
