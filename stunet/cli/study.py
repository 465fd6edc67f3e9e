"""``stunet study``: what checkpoints are worth on a user's datasets, and which score would have told."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import typer
from filelock import FileLock, Timeout
from typer import Option

from stunet.cli.console import Group, human_bytes, print_line, print_table, say
from stunet.cli.options import Device, check_disk, choose_device
from stunet.errors import CommandError, UsageError
from stunet.files import read_json, write_json

if TYPE_CHECKING:
    from stunet.study.definition import Cell, Study

app = typer.Typer(
    cls=Group, name="study", no_args_is_help=True, help="Find out what checkpoints are worth on your datasets."
)
_Folder = Annotated[Path, typer.Argument(help="The study's folder.")]
#: Exit status of a process that has found its cell held by another one.
_HELD = 3
#: And of one that the user has stopped with Ctrl-C.
_INTERRUPTED = 130


@app.command("plan")
def plan_command(
    definition: Annotated[Path, typer.Argument(metavar="study.yaml", help="The definition.")],
    output: Annotated[Path, Option("-o", "--output", help="The study's folder.")],
    device: Device = "auto",
) -> None:
    """Check a study, make its folder, and say what would run; nothing is trained."""
    check_disk(output)
    from stunet.study.definition import plan_study

    study = plan_study(definition, output)
    rows = []
    for target in study.targets:
        own = [cell for cell in study.trainings if cell.target is target]
        names = {cell.candidate.name for cell in own if cell.candidate}
        counts = ", ".join(map(str, target.n_cases))
        rows.append((target.dataset, counts, len(target.test), len(names), study.seeds, len(own)))
    columns = ("target", "cases", "test", "candidates", "seeds", "trainings")
    print_table(rows, *columns, numbers=columns[2:])
    hours, size = _estimate(study, choose_device(device))
    kept = "" if study.keep_checkpoints else " for each training at a time, as checkpoints go when it is scored"
    print_line(f"Trainings: {len(study.trainings)}; rankings: {len(study.rankings)}; done: {_done(study)}")
    print_line(
        f"About {hours:.1f} hours one after the other on this machine, by the time of one step; validation not counted"
    )
    print_line(f"About {human_bytes(size)} on disk{kept}")
    print_line(f"Next:\n  stunet study run {output}")


def _done(study: Study) -> int:
    return sum(_status(study, cell) == "done" for cell in study.cells)


def _estimate(study: Study, device: str) -> tuple[float, int]:
    """Hours of all trainings that are not done, and bytes of their checkpoints."""
    from stunet.planning.preprocessed import open_preprocessed
    from stunet.study.measure import step_seconds

    seconds, size = 0.0, 0
    times: dict[str, tuple[float, int]] = {}
    for cell in study.trainings:
        if study.result(cell).is_file() or cell.candidate is None:
            continue
        target, chosen = cell.target, study.settings_of(cell.target, cell.candidate)
        key = f"{target.dataset} {cell.candidate.size} {chosen}"
        if key not in times:
            dataset = open_preprocessed(target.dataset, target.plans, target.configuration)
            times[key] = step_seconds(cell.candidate.size, dataset, chosen, device)
        step, n_parameters = times[key]
        seconds += step * chosen.get("num_epochs", 1000) * chosen.get("num_iterations_per_epoch", 250)
        # Two checkpoints, with momentum.
        size = size + 16 * n_parameters if study.keep_checkpoints else max(size, 16 * n_parameters)
    return seconds / 3600, size


@app.command("run")
def run_command(
    folder: _Folder,
    jobs: Annotated[int, Option(help="Cells at a time; with several GPUs, each has one.", min=1)] = 1,
    device: Device = "auto",
    retry: Annotated[bool, Option("--retry", help="Also repeat cells that have failed.")] = False,
    slurm: Annotated[
        str | None, Option(metavar="NAME=VALUE,...", help="Submit the cells instead, one job each.")
    ] = None,
    cell: Annotated[str | None, Option(hidden=True)] = None,
) -> None:
    """Do what is not done yet of a study. It can be interrupted at any time, and several can work on one study.

    A training that was interrupted goes on from its checkpoint. A cell that fails is listed at the end, with its log,
    and exit status 2; the others go on.
    """
    from stunet.study.definition import Study

    study = Study(folder)
    if cell is not None:
        _run_cell(study, next(each for each in study.cells if each.name == cell), choose_device(device), retry=retry)
        return
    check_disk(folder)
    waiting = [each for each in study.cells if not _is_done(study, each, retry=retry)]
    print_line(f"{_done(study)} of {len(study.cells)} cells are done")
    if slurm is not None:
        _submit(study, waiting, slurm, device, retry=retry)
        return
    outcomes = list(_run_all(study, waiting, jobs, choose_device(device), retry=retry))
    held = sum(outcome == _HELD for outcome in outcomes)
    if held:
        print_line(f"{held} cells are in work elsewhere")
    failed = [each for each in study.cells if _status(study, each) == "failed"]
    for each in failed:
        print_line(f"failed: {each.name}: {_log(study, each)}")
    print_line(f"Next:\n  stunet study report {folder}")
    if failed:
        raise CommandError(f"{len(failed)} cells have failed: see their logs, and repeat them with --retry")


def _status(study: Study, cell: Cell) -> str | None:
    path = study.result(cell)
    return str(read_json(path).get("status")) if path.is_file() else None


def _is_done(study: Study, cell: Cell, *, retry: bool) -> bool:
    status = _status(study, cell)
    return status == "done" or (status == "failed" and not retry)


def _log(study: Study, cell: Cell) -> Path:
    return study.result(cell).with_suffix(".log")


def _run_all(study: Study, cells: list[Cell], jobs: int, device: str, *, retry: bool) -> Iterator[int]:
    """Run each cell in a process of its own, as many at a time as there are jobs; yield their exit statuses."""
    import torch

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    free, lock = list(range(jobs)), Lock()

    def run(cell: Cell) -> int:
        with lock:
            job = free.pop()
        share = str(max(1, len(cores) // jobs))
        shares = {"nnUNet_def_n_proc": share} | ({"OMP_NUM_THREADS": share} if device == "cpu" else {})
        environment = {**shares, **os.environ}
        if device == "cuda" and (n_gpus := torch.cuda.device_count()) > 1:
            given = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
            environment["CUDA_VISIBLE_DEVICES"] = (given or [*map(str, range(n_gpus))])[job % n_gpus]
        status = _logged(_command(study, cell, device, retry=retry), _log(study, cell), environment)
        with lock:
            free.append(job)
        return status

    took: dict[bool, list[float]] = {True: [], False: []}  # seconds of trainings, and of rankings
    with ThreadPoolExecutor(jobs) as pool:
        for done, (cell, status) in enumerate(zip(cells, pool.map(run, cells), strict=True), start=1):
            if status not in (0, _HELD) and _status(study, cell) is None:  # killed, or out of memory
                _fail(study, cell, f"its process has ended with exit status {status}")
            elif status == 0 and _status(study, cell) == "done":
                took[cell.candidate is not None].append(read_json(study.result(cell))["seconds"])
            left = [cell.candidate is not None for cell in cells[done:]]
            known = all(took[kind] for kind in left)
            hours = sum(sum(took[kind]) / len(took[kind]) for kind in left) / jobs / 3600 if known else 0.0
            said = {0: "done", _HELD: "in work elsewhere"}.get(status, "failed")
            about = f", about {hours:.1f} hours left" if known else ""
            say(f"{done} of {len(cells)}{about}: {cell.name} {said}")
            yield status


def _command(study: Study, cell: Cell, device: str, *, retry: bool) -> list[str]:
    own = [sys.executable, "-m", "stunet", "study", "run", str(study.folder)]
    return [*own, "--cell", cell.name, "--device", device, *["--retry"] * retry]


def _logged(line: list[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a command, append what it prints to a file, and return its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.run(line, env=environment, stdout=file, stderr=file).returncode  # noqa: S603 - ourselves


def _submit(study: Study, cells: list[Cell], options: str, device: str, *, retry: bool) -> None:
    """Hand cells to Slurm, or to processes of this machine with ``cluster=local``."""
    try:
        import submitit
    except ImportError:
        raise UsageError("--slurm without submitit: run `pip install submitit`") from None
    given = dict(option.partition("=")[::2] for option in options.split(","))
    try:
        executor = submitit.AutoExecutor(folder=study.folder / "slurm", cluster=given.pop("cluster", None))
        for name, value in given.items():
            own = name if name.startswith(("timeout", "slurm")) else f"slurm_{name}"
            executor.update_parameters(**{own: int(value) if value.isdecimal() else value})
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--slurm {options}: {error}; give options of sbatch, such as partition=gpu") from None
    if cells:
        with executor.batch():
            for cell in cells:
                executor.submit(_logged, _command(study, cell, device, retry=retry), _log(study, cell).absolute())
    print_line(f"Submitted {len(cells)} cells; their logs are beside their results in {study.folder / 'results'}")


def _fail(study: Study, cell: Cell, why: str) -> None:
    write_json({"status": "failed", "error": why}, study.result(cell))


def _run_cell(study: Study, cell: Cell, device: str, *, retry: bool) -> None:
    """Do one cell in this process, which holds it until it ends, however it ends."""
    path = study.result(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"), timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        say(f"{lock.lock_file} is held by another process")
        raise typer.Exit(_HELD) from None
    with held:
        if _is_done(study, cell, retry=retry):  # meanwhile, by another process
            return
        path.unlink(missing_ok=True)  # why it had failed before
        started = time.monotonic()
        for name in ("nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str((study.folder / name).resolve())
        try:
            result = _rank(study, cell, device) if cell.candidate is None else _train(study, cell, device)
        except Exception as error:
            _fail(study, cell, f"{type(error).__name__}: {error}"[:500])
            raise
        write_json({"status": "done", "seconds": round(time.monotonic() - started, 1), **result}, path)
        if cell.candidate is not None and not study.keep_checkpoints:
            for checkpoint in _fold(cell).glob("checkpoint_*.pth"):
                checkpoint.unlink()


def _type(*words: object, accepted: int = 0) -> None:
    """Do what a command does, in this process; an exit status that is not 0 may be accepted."""
    from stunet.cli.main import main

    line = [str(word) for word in words]
    say(f"$ {shlex.join(line)}")
    sys.argv = line
    try:
        main()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            raise  # it is not the cell that has failed
        if end.code not in (None, 0, accepted):
            raise CommandError(f"{shlex.join(line)[:300]} has ended with exit status {end.code}: see the log") from None


def _planned(study: Study, cell: Cell) -> tuple[list[str], list[str]]:
    """Options that say what plans to write, and the values of their settings."""
    target, chosen = cell.target, {"save_every": 5, **study.settings_of(cell.target, cell.candidate)}
    values = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in chosen.items()]
    return ["-d", target.dataset, "-c", target.configuration, "-p", target.plans, "--name", cell.plans], values


def _fold(cell: Cell) -> Path:
    """Where nnU-Net trains."""
    model = f"STUNetTrainer__{cell.plans}__{cell.target.configuration}"
    return Path(os.environ["nnUNet_results"], cell.target.dataset, model, f"fold_{cell.fold}")


def _train(study: Study, cell: Cell, device: str) -> dict[str, Any]:
    assert cell.candidate is not None
    candidate, target = cell.candidate, cell.target
    fold = _fold(cell)
    where, values = _planned(study, cell)
    resumes = ["--c"] * any(fold.glob("checkpoint_*.pth"))
    final = fold / "checkpoint_final.pth"
    if not final.is_file() or not (fold / "validation" / "summary.json").is_file():
        own = ["-f", str(cell.fold), "-device", device, "--seed", str(cell.seed), *resumes]
        if candidate.path is None:
            depth, width = ",".join(map(str, candidate.size.depth)), candidate.size.width
            _type("stunet", "plan", *where, "--depth", depth, "--width", width, "--set", *values)
            own = [str(cell.fold), "-p", cell.plans, "-device", device, "--seed", str(cell.seed), *resumes]
            _type("stunet", "train", target.dataset, target.configuration, *own)
        else:
            own += ["--strategy", str(cell.strategy), "--set", *values]
            _type("stunet", "finetune", *where, "--from", candidate.path, *own)
    from stunet.study.measure import score_fold

    return score_fold(fold, target.dataset, target.test)


def _rank(study: Study, cell: Cell, device: str) -> dict[str, Any]:
    target, output = cell.target, study.result(cell).with_suffix("")
    plan, values = _planned(study, cell)
    _type("stunet", "plan", *plan, "--set", *values)  # the patch of the trainings, on which features depend
    where = ["-d", target.dataset, "-c", target.configuration, "-p", cell.plans, "-f", cell.fold, "-device", device]
    zoo, metrics = study.folder / f"zoo_{target.dataset}.json", ",".join(study.metrics)
    of_cases = ["--cases", cell.n_cases, "--seed", cell.seed]
    rank = ["stunet", "rank", *where, "--zoo", zoo, "--metrics", metrics, *of_cases, "-o", output]
    _type(*rank, accepted=1)  # where a candidate could not be scored, and the others were
    ranking = read_json(output / "ranking.json")
    found = {row["name"]: {"scores": row["scores"], "seconds": row["seconds"]} for row in ranking["candidates"]}
    names = study.zoo(target)  # of checkpoints; several candidates may begin with one
    rows = {c.name: found[names[c.path]] for c in study.candidates if c.path in names and names[c.path] in found}
    return {"candidates": rows, "features": ranking["settings"]["features"]}


@app.command("report")
def report_command(
    folder: _Folder,
    resamples: Annotated[int, Option(help="Bootstrap resamples of test cases and seeds.", min=10)] = 1000,
) -> None:
    """Write the results so far as a page, a table for other programs, and JSON: index.html, cells.csv, results.json."""
    from stunet.reports.study import write_study
    from stunet.study.definition import Study

    page = write_study(Study(folder), n_resamples=resamples)
    print_line(f"Wrote {page}")
