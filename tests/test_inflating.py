"""Unpacking piece by piece: against the standard library."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from isal.isal_zlib import IsalError

from stunet.labels.inflating import Inflater

#: More than is read at a time, packed too.
NOISE = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()
CONTENTS = {"empty": b"", "short": b"voxels", "zeros": bytes(3_000_000), "noise": NOISE}


def read_all(path: Path, n: int) -> list[bytes]:
    with Inflater(path) as stream:
        pieces = []
        while piece := stream.read(n):
            pieces.append(piece)
        assert stream.read(n) == b""
    return pieces


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("n", [1000, 2**18, 2**20])
def test_pieces_of_the_size_asked_for(tmp_path: Path, name: str, packed: bool, n: int) -> None:
    content = CONTENTS[name]
    (tmp_path / "a").write_bytes(gzip.compress(content) if packed else content)
    pieces = read_all(tmp_path / "a", n)
    assert b"".join(pieces) == content
    assert all(len(piece) == n for piece in pieces[:-1])


def test_members_one_after_the_other_and_zeros_between(tmp_path: Path) -> None:
    parts = [NOISE, b"", b"voxels", bytes(300_000)]
    packed = b"".join(gzip.compress(part) + bytes(300_000 * i) for i, part in enumerate(parts))
    (tmp_path / "a").write_bytes(packed)
    assert gzip.decompress(packed) == b"".join(parts)
    assert b"".join(read_all(tmp_path / "a", 100_000)) == b"".join(parts)


@pytest.mark.parametrize("n", [6, 7, 2**18])
def test_damage_is_found_by_the_end(tmp_path: Path, n: int) -> None:
    packed = gzip.compress(b"voxels" * 100)
    for kept in range(2, len(packed)):  # of less nobody could tell what it was
        (tmp_path / "a").write_bytes(packed[:kept])
        with pytest.raises(EOFError):
            read_all(tmp_path / "a", n)
    for i in range(2, len(packed)):
        if 3 <= i < 10:  # a flag that says text, time and system: nothing hangs on them
            continue
        (tmp_path / "a").write_bytes(packed[:i] + bytes([packed[i] ^ 1]) + packed[i + 1 :])
        with pytest.raises((EOFError, IsalError)):
            read_all(tmp_path / "a", n)
    for garbage in (b"no gzip", b"not even nearly gzip"):
        (tmp_path / "a").write_bytes(packed + garbage)
        with pytest.raises((EOFError, IsalError)):
            read_all(tmp_path / "a", n)


def test_payloads_leave_out_name_and_time(tmp_path: Path) -> None:
    def payload(content: bytes, name: str = "", mtime: int = 0) -> bytes | None:
        packed = io.BytesIO()
        with gzip.GzipFile(name, "wb", 9, packed, mtime) as file:
            file.write(content)
        (tmp_path / "a").write_bytes(packed.getvalue())
        with Inflater(tmp_path / "a") as stream:
            return stream.payload

    plain = payload(bytes(1000))
    assert plain is not None
    assert payload(bytes(1000), "liver.nii") == payload(bytes(1000), "heart.nii", 7) == plain
    assert payload(bytes(999) + b"\1") != plain
    assert payload(bytes(1001)) != plain
    assert payload(NOISE) is None  # not read as a whole
    (tmp_path / "a").write_bytes(b"plain")
    with Inflater(tmp_path / "a") as stream:
        assert stream.payload is None
    packed = bytearray(gzip.compress(bytes(1000)))
    packed[3] = 4  # an extra field, which nobody writes
    (tmp_path / "a").write_bytes(packed)
    with Inflater(tmp_path / "a") as stream:
        assert stream.payload is None


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Inflater(tmp_path / "a")
    with pytest.raises(IsADirectoryError):
        Inflater(tmp_path)
