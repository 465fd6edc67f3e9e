"""Checkpoints: whole ones are read, anything else is refused, and no code in them ever runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stunet.errors import CheckpointError
from stunet.weights.read import check_weights, read_checkpoint


def checkpoint(**more: Any) -> dict[str, Any]:
    return {
        "network_weights": {"a": torch.arange(6.0).reshape(2, 3)},
        "logging": {"lrs": [0.01], "ema_fg_dice": [np.float64(0.5), np.float32(0.25)], "steps": [np.int64(3)]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 3,
        "init_args": {"plans": {"patch_size": [8, 8]}, "device": torch.device("cuda", 0)},
        **more,
    }


def test_what_nnunet_writes_is_read(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "c.pth")
    got = read_checkpoint(tmp_path / "c.pth")
    assert torch.equal(got["network_weights"]["a"], torch.arange(6.0).reshape(2, 3))
    assert got["logging"]["ema_fg_dice"] == [0.5, 0.25]
    assert got["init_args"]["device"] == torch.device("cuda", 0)


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


class _EvilEval(_Evil):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("evil", [_Evil, _EvilEval])
@pytest.mark.parametrize("where", ["top", "nested"])
def test_code_is_refused_and_named(tmp_path: Path, evil: type[_Evil], where: str) -> None:
    bomb = evil(tmp_path / "was_here")
    content: Any = checkpoint(extra=[{"x": bomb}]) if where == "nested" else bomb
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"asks for (posix\.system|\S*eval)"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    torch.save(checkpoint(big=torch.randn(10_000)), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pth is .*truncated"):
        read_checkpoint(tmp_path / "cut.pth")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"network_weights": {}}))
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text", "pickle", "zip", "other", "list", "missing"):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing checkpoint"):
        read_checkpoint(tmp_path)


def test_weights_that_do_not_fit_are_named() -> None:
    network = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    check_weights(network, network, source="x")
    with pytest.raises(CheckpointError) as caught:
        check_weights({"a": torch.zeros(2, 4), "b": torch.zeros(4), "d": torch.zeros(1)}, network, source="x.pth")
    for part in ("x.pth", "c is missing", "d is not in the network", "a is (2, 4) instead of (2, 3)"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="and 2 more"):
        check_weights({}, {k: torch.zeros(1) for k in "abcde"}, source="x")


@pytest.mark.parametrize("content", [bytearray(10), Path("x"), np.array([None]), np.array(["a"]), {1: (2, os.getpid)}])
@pytest.mark.parametrize("legacy", [False, True])
def test_anything_but_values_is_refused(tmp_path: Path, content: Any, legacy: bool) -> None:
    torch.save(checkpoint(extra=content), tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"c\.pth cannot be read safely"):
        read_checkpoint(tmp_path / "c.pth")


def test_the_format_of_old_pytorch(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    got = read_checkpoint(tmp_path / "c.pth")
    assert torch.equal(got["network_weights"]["a"], torch.arange(6.0).reshape(2, 3))
    assert got["_best_ema"] == 0.5


def test_numpy_arrays(tmp_path: Path) -> None:
    torch.save(checkpoint(spacing=np.array([1.5, 2.0])), tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth")["spacing"].tolist() == [1.5, 2.0]


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as source,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="compressed entries"):
        read_checkpoint(tmp_path / "z.pth")


def test_a_changed_weight_does_not_have_the_archives_checksum(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    values = torch.arange(6.0).numpy().tobytes()
    assert content.count(values) == 1
    (tmp_path / "c.pth").write_bytes(content.replace(values, values[::-1]))
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_anywhere(tmp_path: Path, legacy: bool) -> None:
    """Whatever bit is flipped: other values or an error of ours, never anything else."""
    torch.save(checkpoint(), tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    whole = bytearray((tmp_path / "c.pth").read_bytes())
    for n in (*range(0, len(whole) - 150, 7), *range(len(whole) - 150, len(whole))):
        whole[n] ^= 0x41
        (tmp_path / "c.pth").write_bytes(whole)
        with contextlib.suppress(CheckpointError):
            read_checkpoint(tmp_path / "c.pth")
        whole[n] ^= 0x41
