"""Prediction of many cases: the next is prepared and the last is written while the network works on one."""

from __future__ import annotations

import errno
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from stunet.errors import CommandError, STUNetError
from stunet.files import move_into_place, write_json
from stunet.inference.images import Case
from stunet.inference.label_names import LabelNames
from stunet.inference.labels import predict_labels
from stunet.inference.memory import Strategy
from stunet.inference.model import Model
from stunet.inference.outputs import OutputOptions, WritingJob, Written, coarse_grid, write_outputs
from stunet.inference.preparation import PreparationJob, Prepared, prepare, save_array
from stunet.inference.windows import average, mirror_and_predict
from stunet.processes import Worker

__all__ = [
    "Listener",
    "Prediction",
    "describe",
    "describe_outputs",
    "predict_cases",
    "raise_failures",
    "report_written",
]


class Listener(Protocol):
    """What is told of the progress."""

    def window(self, case: Case, n_windows: int) -> None:
        """One window of a case, of so many, was predicted."""

    def finished(self, case: Case, found: dict[str, dict[str, Any]]) -> None:
        """All files of a case are written; these structures were found in it."""

    def failed(self, case: Case, problem: str) -> None:
        """A case was given up."""

    def note(self, text: str) -> None:
        """Something worth knowing."""


@dataclass(frozen=True)
class Prediction:
    """How cases are predicted.

    Attributes:
        model: The model.
        names: The structures that are wanted.
        output: Folder of the predictions, which exists.
        strategy: How memory is used.
        device: Where the network is.
        results_on_device: Whether logits are added up there too.
        step_size: Distance between windows as a fraction of the patch.
        mirroring: Whether the model's mirroring axes are used.
        lowres: Whether labels are written on the network's grid instead of the image's.
        options: What is written beside the labels.
    """

    model: Model
    names: LabelNames
    output: Path
    strategy: Strategy = field(default_factory=Strategy)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    results_on_device: bool = True
    step_size: float = 0.5
    mirroring: bool = True
    lowres: bool = False
    options: OutputOptions = field(default_factory=OutputOptions)


def predict_cases(cases: Sequence[Case], prediction: Prediction, scratch: Path, listener: Listener) -> dict[str, str]:
    """Predict cases. One that fails stops no other.

    Args:
        cases: The cases.
        prediction: How.
        scratch: Folder for unfinished files, on the file system of the predictions.
        listener: Told of the progress.

    Returns:
        What went wrong, by the name of each case that failed.

    Raises:
        CheckpointError: The weights do not fit.
    """
    failures: dict[str, str] = {}

    def fail(case: Case, error: BaseException) -> None:
        shutil.rmtree(scratch / case.name, ignore_errors=True)
        failures[case.name] = describe(error)
        listener.failed(case, failures[case.name])

    preparing = _Preparation(cases, prediction, scratch, fail)
    writing = _Writing(len(cases), prediction, fail, listener)
    try:
        preparing.start_next()
        networks = _networks(prediction)
        for prepared in preparing:
            try:
                writing.add(prepared, _predict(prepared, prediction, networks, listener))
            except Exception as error:  # whatever it is, the other cases can do without this one
                fail(prepared.case, error)
        writing.finish()
    finally:
        preparing.close()
        writing.close()
    return failures


class _Preparation:
    """Prepares cases ahead of the network, as many at a time as there are processes."""

    def __init__(
        self, cases: Sequence[Case], prediction: Prediction, scratch: Path, fail: Callable[[Case, BaseException], None]
    ) -> None:
        self._waiting = deque(cases)
        self._running: deque[tuple[Case, Worker]] = deque()
        n_processes = min(prediction.strategy.n_preparing, len(cases) - 1)  # a single case has nothing to overlap with
        self._workers = [Worker(spawned=n_processes > 0) for _ in range(max(1, n_processes))]
        self._model, self._scratch, self._fail = prediction.model, scratch, fail

    def start_next(self) -> None:
        """Give each process that is free a case."""
        for worker in self._workers:
            if self._waiting and not worker.busy:
                case, model = self._waiting.popleft(), self._model
                folder = self._scratch / case.name
                job = PreparationJob(case, model.plans, model.configuration, model.dataset_json, folder)
                worker.start(prepare, job)
                self._running.append((case, worker))

    def __iter__(self) -> Iterator[Prepared]:
        while self._running or self._waiting:
            self.start_next()
            case, worker = self._running.popleft()
            try:
                prepared: Prepared = worker.result()
            except Exception as error:  # a broken file makes readers raise anything
                self._fail(case, error)
            else:
                self.start_next()
                yield prepared

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Writing:
    """Writes cases behind the network."""

    def __init__(
        self, n_cases: int, prediction: Prediction, fail: Callable[[Case, BaseException], None], listener: Listener
    ) -> None:
        n_processes = min(prediction.strategy.n_writing, n_cases - 1)
        self._workers = deque(Worker(spawned=n_processes > 0) for _ in range(max(1, n_processes)))
        self._running: deque[tuple[WritingJob, Worker]] = deque()
        self._prediction = prediction
        self._fail, self._listener = fail, listener
        self._overlaps = n_processes > 0

    def add(self, prepared: Prepared, labels: Any) -> None:
        """Hand over a case; waits while all processes are busy."""
        if len(self._running) == len(self._workers):
            self._collect()
        path = prepared.image.with_name("labels.npy")
        save_array(path, labels)
        prediction, properties, crop = self._prediction, prepared.properties, None
        if prediction.lowres:
            back = prediction.model.plans_manager.transpose_backward
            properties, crop = coarse_grid(properties, labels.shape, back)
        job = WritingJob(
            prepared.case,
            path,
            properties,
            prediction.model.plans,
            prediction.model.file_ending,
            prediction.names,
            prediction.output,
            path.parent,
            prediction.options,
            crop,
        )
        worker = next(worker for worker in self._workers if not worker.busy)
        worker.start(write_outputs, job)
        self._running.append((job, worker))
        if not self._overlaps:
            self._collect()

    def _collect(self) -> None:
        job, worker = self._running.popleft()
        try:
            report_written(job.case, worker.result(), self._listener)
        except Exception as error:  # the other cases can do without this one
            self._fail(job.case, error)
        finally:
            shutil.rmtree(job.scratch, ignore_errors=True)

    def finish(self) -> None:
        """Wait until all is written."""
        while self._running:
            self._collect()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def report_written(case: Case, written: Written, listener: Listener) -> None:
    """Tell of a case that :func:`write_outputs` has written, and of what it did without."""
    if written.problem is not None:
        listener.note(f"warning: {case.name}: {written.problem}")
    listener.finished(case, written.found)


def _networks(prediction: Prediction) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    axes = prediction.model.mirroring_axes if prediction.mirroring else None
    networks = [mirror_and_predict(network, axes) for network in prediction.model.networks(prediction.device)]
    return [average(networks)] if prediction.strategy.average_folds else networks


def _predict(
    prepared: Prepared,
    prediction: Prediction,
    networks: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    listener: Listener,
) -> Any:
    model = prediction.model
    run = partial(
        predict_labels,
        np.load(prepared.image, mmap_mode="r"),
        prepared.properties,
        networks,
        plans=model.plans_manager,
        configuration=model.configuration_manager,
        label_manager=model.label_manager,
        step_size=prediction.step_size,
        axis=prediction.strategy.axis,
        device=prediction.device,
        lowres=prediction.lowres,
        on_window=lambda n_windows: listener.window(prepared.case, n_windows),
    )
    if not prediction.results_on_device or prediction.device.type == "cpu":
        return run(results_device=torch.device("cpu"))
    with suppress(torch.OutOfMemoryError):
        return run(results_device=prediction.device)
    torch.cuda.empty_cache()
    return run(results_device=torch.device("cpu"))


def describe(error: BaseException) -> str:
    """What went wrong with a case, in words."""
    if isinstance(error, STUNetError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"the disk is full: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def describe_outputs(prediction: Prediction, scratch: Path, arguments: dict[str, Any]) -> None:
    """Write what nnU-Net writes beside predictions, and ``labels.json``.

    Args:
        prediction: How cases are predicted.
        scratch: Folder for unfinished files, on the file system of the predictions.
        arguments: Content of ``predict_from_raw_data_args.json``.
    """
    for name, content in {
        "predict_from_raw_data_args.json": arguments,
        "dataset.json": prediction.model.dataset_json,
        "plans.json": prediction.model.plans,
        "labels.json": prediction.names.by_value(),
    }.items():
        write_json(content, scratch / name)
        move_into_place(scratch / name, prediction.output / name)


def raise_failures(failures: dict[str, str], n_cases: int) -> None:
    """Say which cases failed.

    Raises:
        CommandError: Any did.
    """
    if not failures:
        return
    listed = "".join(f"\n    {name}: {problem.splitlines()[0]}" for name, problem in sorted(failures.items()))
    raise CommandError(
        "cases that were not predicted",
        got=f"{len(failures)} of {n_cases} failed:{listed}",
        expected="all cases",
        remedy="Mend or remove them, and run the command again with --continue, which keeps what is finished.",
    )
