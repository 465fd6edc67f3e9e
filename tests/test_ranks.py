"""Processes that train together: who they are, who is missing, and what they must have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from together import free_port, together

from stunet.errors import STUNetError, UsageError
from stunet.training.distributed import Ranks, check_agreement, check_shared_folder, process_group, share_of_batch

VARIABLES = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_the_environment_of_torchrun() -> None:
    assert Ranks.from_environment({}) == Ranks(0, 1, 0, 1, 0)
    port = {"MASTER_PORT": "29500"}
    assert Ranks.from_environment({**VARIABLES, **port}) == Ranks(3, 8, 1, 2, 0)
    assert Ranks.from_environment({**VARIABLES, **port, "TORCHELASTIC_RESTART_COUNT": "2"}).n_restarts == 2
    with pytest.raises(UsageError, match="MASTER_PORT=missing"):
        Ranks.from_environment(VARIABLES)
    with pytest.raises(UsageError, match="RANK=x"):
        Ranks.from_environment({**VARIABLES, **port, "RANK": "x"})


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (5, 2), (7, 4), (12, 4)])
def test_shares_make_up_the_batch(batch: int, size: int) -> None:
    shares = [share_of_batch(batch, Ranks(rank, size)) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_for_too_many() -> None:
    with pytest.raises(UsageError, match="3 samples for 4 processes"):
        share_of_batch(3, Ranks(0, 4))


def _same(ranks: Ranks, folder: str) -> None:
    check_agreement({"plans": {"b": 1, "a": [2]}, "arguments": None})
    check_shared_folder(Path(folder, "results"), ranks)


def _other_plans(ranks: Ranks, folder: str) -> str:
    plans: dict[str, Any] = {"batch_size": 2 if ranks.rank != 1 else 4}
    with pytest.raises(STUNetError) as caught:
        check_agreement({"plans": plans, "arguments": None})
    return str(caught.value)


def _other_folder(ranks: Ranks, folder: str) -> str:
    with pytest.raises(STUNetError) as caught:
        check_shared_folder(Path(folder, f"node_{ranks.rank // 2}"), ranks)
    return str(caught.value)


def test_what_is_the_same_everywhere_is_fine(tmp_path: Path) -> None:
    together(2, tmp_path, _same)
    assert list((tmp_path / "results").iterdir()) == []


def test_processes_with_other_plans_are_named_in_all(tmp_path: Path) -> None:
    for said in together(3, tmp_path, _other_plans):
        assert "plans of rank 1" in said
        assert "rank 2" not in said
        assert "arguments" not in said


def test_a_folder_that_one_machine_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "node_1").mkdir()
    for said in together(3, tmp_path, _other_folder):
        assert f"{tmp_path / 'node_0'}" in said or f"{tmp_path / 'node_1'}" in said
        assert "is not there for rank 2" in said


JOIN = """
import json, sys
from stunet.errors import UsageError
from stunet.training.distributed import Ranks, process_group
try:
    with process_group(Ranks(*json.loads(sys.argv[1])), "cpu", 3):
        pass
except UsageError as error:
    print(error)
"""


def test_who_does_not_join_is_named() -> None:
    port = str(free_port())
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, json.dumps([rank, 4, rank, 4])], text=True, stdout=subprocess.PIPE,
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in (0, 2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all("2 of 4; missing: rank 1, 3" in each for each in said)
    assert time.monotonic() - started < 100


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UsageError, match="cannot be reached"), process_group(Ranks(1, 2, 1, 2), "cpu", 2):
        pass


def test_no_backend_for_it() -> None:
    with pytest.raises(UsageError, match="mps"), process_group(Ranks(0, 2, 0, 2), "mps", 2):
        pass
