"""``manifest.json``: what the predictions of a folder were made with and of, and what is in them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stunet.errors import DatasetError, UsageError
from stunet.files import file_sha256, fingerprint, read_json, write_json
from stunet.inference.images import Case, readable
from stunet.inference.pipeline import Listener, Prediction
from stunet.inference.statistics import find_structures

__all__ = ["MANIFEST_NAME", "Manifest", "check_output", "remove_predictions"]

MANIFEST_NAME = "manifest.json"
"""Beside the predictions; under ``settings`` and ``images`` is what later predictions must agree with."""


class Manifest(Listener):
    """The manifest of a folder, written again after each case.

    Where several commands share the folder, ``manifest.json`` has only what they agree on, and each of them writes a
    ``manifest.PART.json`` like that of a command that is alone.

    Args:
        prediction: How cases are predicted.
        record: From :func:`check_output`.
        waiting: Cases that will be predicted. What the manifest says of others is kept where the settings are equal.
        listener: Told of the progress in turn.
        part: Which of several commands this is; None where it is alone.
    """

    def __init__(
        self,
        prediction: Prediction,
        record: Mapping[str, Any],
        waiting: Sequence[Case],
        listener: Listener,
        part: int | None = None,
    ) -> None:
        self._prediction, self._listener, self._clock = prediction, listener, time.monotonic()
        self._path = prediction.output / MANIFEST_NAME
        if part is not None:
            write_json(record, self._path)
            self._path = prediction.output / f"manifest.{part}.json"
        else:
            for other in prediction.output.glob("manifest.[0-9]*.json"):  # this one describes all cases
                other.unlink()
        before, names = _read_manifest(self._path), {case.name for case in waiting}
        if before.get("settings") != record["settings"]:
            before = {}
        model, card = prediction.model, {}
        with suppress(OSError, ValueError):
            card = read_json(model.folder / "model_card.json")
        self._content: dict[str, Any] = {
            **record,
            "versions": {name: version(name) for name in ("stunet", "nnunetv2", "torch")},
            "model": {
                "name": model.folder.resolve().name,
                "folder": str(model.folder.resolve()),
                "licence": card.get("licence"),
                "sources": card.get("sources", []),
                "checkpoints": {
                    fold: {"file": path.name, "sha256": record["settings"][f"fold_{fold}"]}
                    for fold, path in model.checkpoints.items()
                },
            },
            "device": str(prediction.device),
            "started": _now(),
            "finished": None,
            "seconds": None,
            **{key: {n: v for n, v in before.get(key, {}).items() if n not in names} for key in ("cases", "failures")},
        }
        self._write()

    def window(self, case: Case, n_windows: int) -> None:
        """Pass it on."""
        self._listener.window(case, n_windows)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._listener.note(text)

    def failed(self, case: Case, problem: str) -> None:
        """Pass it on; :meth:`close` takes all failures together."""
        self._listener.failed(case, problem)

    def finished(self, case: Case, found: dict[str, dict[str, Any]]) -> None:
        """Add the structures of a case."""
        self._add(case, found)
        self._listener.finished(case, found)

    def keep(self, case: Case) -> None:
        """Add a case that was predicted before, where it is missing: a process was killed, or other commands shared."""
        path = self._prediction.output / f"{case.name}{self._prediction.model.file_ending}"
        if case.name not in self._content["cases"]:
            with suppress(DatasetError), readable(path):
                reader = self._prediction.model.plans_manager.image_reader_writer_class()
                labels, properties = reader.read_seg(str(path))
                spacing = properties["spacing"] if len(labels[0]) > 1 else None
                self._add(case, find_structures(labels[0].astype(np.uint16), self._prediction.names, spacing))

    def close(self, failures: Mapping[str, str]) -> None:
        """Note the end."""
        seconds = round(time.monotonic() - self._clock, 1)
        self._content |= {"finished": _now(), "seconds": seconds}
        self._content["failures"] |= failures
        self._write()

    def _add(self, case: Case, found: dict[str, dict[str, Any]]) -> None:
        self._content["cases"][case.name] = {"structures": found}
        self._write()

    def _write(self) -> None:
        write_json(self._content, self._path)


def check_output(
    prediction: Prediction, cases: Sequence[Case], own: Sequence[Case], *, previous_stage: Path | None, keep: bool
) -> tuple[dict[str, Any], set[str]]:
    """What a manifest must say, and the cases whose predictions it will not describe; they are to be predicted again.

    Args:
        prediction: How cases are predicted.
        cases: All cases of the input.
        own: Those of this command, where several share them.
        previous_stage: Predictions of a cascade's first stage.
        keep: Whether predictions that are there stay.

    Returns:
        ``settings`` and ``images``; and the names of the cases.

    Raises:
        UsageError: The folder has predictions that the manifest would not describe and that would stay.
    """
    output, ending = prediction.output, prediction.model.file_ending
    inputs = {file.resolve() for case in cases for file in case.files}
    files = output.glob(f"*{ending}") if output.is_dir() else ()
    present = {file.name.removesuffix(ending) for file in files if file.name[0] != "." and file.resolve() not in inputs}
    settings, images = _settings(prediction, previous_stage), {case.name: _image_digest(case) for case in cases}
    manifest = _read_manifest(output / MANIFEST_NAME)
    known, of = manifest.get("settings", {}), manifest.get("images", {})
    changed = sorted(key for key in {*settings, *known} if settings.get(key) != known.get(key))
    outdated = {case for case in present if changed or of.get(case) != images.get(case, of.get(case))}
    again = {case.name for case in own} if changed else set(images)  # the other commands may have other settings
    staying = sorted(outdated if keep or not known else outdated - again)
    if staying:
        differing = changed[:3] if known else ()
        got, expected = (
            "; ".join(f"{key}: {_show(content.get(key))}" for key in differing) for content in (settings, known)
        )
        raise UsageError(
            f"an output folder with predictions of other {'settings' if changed else 'images'}",
            got=f"{output} with {staying[0]}{ending}; {got or 'no record of it'}",
            expected=f"{expected}, as {MANIFEST_NAME} has it" if expected else f"those that {MANIFEST_NAME} describes",
            remedy="Choose another -o, give what was given before, or remove the predictions that are there.",
        )
    return {"settings": settings, "images": images if changed else {**of, **images}}, outdated


def remove_predictions(prediction: Prediction, cases: Iterable[str]) -> None:
    """Remove all files of these cases."""
    output, ending = prediction.output, prediction.model.file_ending
    masks = _read_manifest(output / MANIFEST_NAME).get("settings", {}).get("masks")
    names = ("{}.npz", "{}.pkl", "statistics/{}.json", "previews/{}.png", f"{{}}{ending}")
    for case in cases:
        if masks:
            shutil.rmtree(output / case / "segmentations", ignore_errors=True)
        for name in names:
            (output / name.format(case)).unlink(missing_ok=True)


def _settings(prediction: Prediction, previous_stage: Path | None) -> dict[str, Any]:
    """All that changes the files of a case, as JSON has it; the model by its content, so that it may be moved."""

    def digest(content: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    model = prediction.model
    settings = {
        "plans": digest(model.plans),
        "dataset": digest(model.dataset_json),
        "configuration": model.configuration,
        "trainer": model.trainer_name,
        **{f"fold_{fold}": file_sha256(path) for fold, path in model.checkpoints.items()},
        "structures": list(prediction.names.structures),
        "mirroring": prediction.mirroring,
        "step_size": prediction.step_size,
        "lowres": prediction.lowres,
        "previous_stage": None if previous_stage is None else str(previous_stage.resolve()),
        **asdict(prediction.options),
    }
    return dict(json.loads(json.dumps(settings)))


def _show(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:60]}…"  # of a digest enough to tell two apart


def _image_digest(case: Case) -> str:
    try:
        return fingerprint([*case.files, *case.slices])  # of another series of a folder it is another one
    except DatasetError:  # which reading it will say, and that stops no other case
        return ""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = [{**content.get(key, {})} for key in ("settings", "images", "cases", "failures")]
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return content


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
