"""Jobs spread over processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from stunet.errors import CommandError, LabelError, STUNetError
from stunet.labels.labels import load_vocabulary
from stunet.processes import in_order, run_jobs, worthwhile_processes


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_with_their_jobs(num_processes: int) -> None:
    jobs = [float(n) for n in range(20)]
    assert sorted(run_jobs(math.sqrt, jobs, num_processes=num_processes)) == [(n, math.sqrt(n)) for n in jobs]
    assert list(run_jobs(math.sqrt, [], num_processes=num_processes)) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_our_errors_stop_no_other_job_and_others_end_all(num_processes: int) -> None:
    results = dict(run_jobs(load_vocabulary, ["nothing", "totalsegmentator_v1"], num_processes=num_processes))
    assert isinstance(results["nothing"], LabelError)
    assert not isinstance(results["totalsegmentator_v1"], STUNetError)
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(run_jobs(math.sqrt, [-1.0, 4.0], num_processes=num_processes))


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(CommandError, match=r"one of 2 processes was killed.*-np"):
        list(run_jobs(os._exit, [3, 3], num_processes=2))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "import time\nfrom stunet.processes import run_jobs\n"
        "if __name__ == '__main__': list(run_jobs(time.sleep, [0.1] * 2 + [100.0] * 2, num_processes=2))"
    )
    parent = psutil.Process(subprocess.Popen([sys.executable, "-c", code]).pid)
    deadline = time.monotonic() + 60
    while sum("spawn_main" in " ".join(child.cmdline()) for child in parent.children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2.0)  # until they have begun
    children = parent.children()
    parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_no_more_processes_than_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, size, expected in ((16, 0, 1), (16, 9.9, 1), (16, 35, 3), (2, 35, 2), (1, 1e9, 1), (16, 1e9, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, n=cores: set(range(n)), raising=False)
        assert worthwhile_processes(size, share=10) == expected


def test_importing_masks_loads_neither_torch_nor_nnunet() -> None:
    code = (
        "import sys; from stunet.cli import import_datasets; from stunet.environment import nnunet_folder; "
        "from stunet.datasets.totalsegmentator import import_cases; "
        "assert not {'torch', 'nnunetv2', 'SimpleITK'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["stunet.datasets", "stunet.evaluation"])
def test_workers_load_neither_torch_nor_nnunet(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'nnunetv2', 'SimpleITK'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [9.0, -1.0, 16.0, 25.0]
    for n in (0, 2):
        done = list(in_order(math.sqrt, iter(jobs), num_processes=n))
        assert [job for job, _ in done] == jobs
        assert isinstance(done[1][1], ValueError)
        assert [done[i][1] for i in (0, 2, 3)] == [3, 4, 5]
    assert [pid for _, pid in in_order(os.getenv, ["PATH"], num_processes=1)] == [os.environ["PATH"]]


def test_a_process_that_dies_costs_one_job() -> None:
    done = list(in_order(end_if_negative, [1, -1, 2, 3], num_processes=1))
    assert [result for job, result in done if job > 0] == [1, 2, 3]
    assert isinstance(done[1][1], CommandError)


def end_if_negative(n: int) -> int:
    if n < 0:
        os._exit(3)
    return n


def test_without_processes_each_job_is_done_when_it_is_asked_for() -> None:
    done: list[int] = []
    results = in_order(done.append, iter([1, 2]), num_processes=0)
    assert done == []
    next(results)
    assert done == [1]
