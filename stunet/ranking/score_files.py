"""Files that hold scores of candidates, and their Dice after fine-tuning."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet.errors import TransferabilityError

__all__ = ["RANKING_FORMAT", "read_dice", "read_scores", "read_summaries"]

#: Value of ``format`` in ``ranking.json``.
RANKING_FORMAT = 1

_SUMMARY = "summary.json"


def read_scores(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Read scores by metric and candidate.

    Args:
        path: A ``ranking.json`` of ``stunet rank``, or a JSON object of scores by candidate, whose metric is then
            called ``score``.

    Returns:
        Metrics in the order of the file. A score that is missing or null is NaN.

    Raises:
        TransferabilityError: The file is missing or holds something else.
    """
    content = _read_json(path)
    if "candidates" not in content:
        return {"score": _numbers(content, path)}
    if content.get("format") != RANKING_FORMAT:
        raise _error(path, f"format {content.get('format')}", f"format {RANKING_FORMAT}", "Write it by `stunet rank`.")
    rows = content["candidates"]
    if not isinstance(rows, list) or not all(_is_candidate(row) for row in rows):
        raise _error(path, "candidates without names and scores", 'a list of {"name": ..., "scores": {...}}')
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise _error(path, f"several candidates called {', '.join(twice)}", "a name for each candidate")
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["scores"]))
    if not metrics:
        raise _error(path, "no scores", "at least one metric")
    return {metric: _numbers({row["name"]: row["scores"].get(metric) for row in rows}, path) for metric in metrics}


def read_dice(path: str | os.PathLike[str]) -> dict[str, float]:
    """Read the Dice by candidate.

    Args:
        path: A JSON object of Dice by candidate; or a folder, in which each folder is called after a candidate and
            holds one ``summary.json`` of nnU-Net at any depth.

    Raises:
        TransferabilityError: The file or folder is missing or holds something else.
    """
    if Path(path).is_dir():
        folders = sorted(entry for entry in Path(path).iterdir() if entry.is_dir())
        found = {folder.name: folder for folder in folders if any(folder.rglob(_SUMMARY))}
        if not found:
            raise _error(path, f"no {_SUMMARY}", f"folders called after the candidates, each with a {_SUMMARY}")
        return read_summaries(found)
    return _numbers(_read_json(path), path)


def read_summaries(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, float]:
    """Read ``foreground_mean`` Dice from nnU-Net's ``summary.json`` files.

    Args:
        paths: File by candidate, or a folder that holds one at any depth.

    Raises:
        TransferabilityError: A file is missing, holds something else, or a folder holds several.
    """
    return {name: _foreground_dice(_find_summary(Path(path))) for name, path in paths.items()}


def _find_summary(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.rglob(_SUMMARY))
    if len(found) != 1:
        got = f"{len(found)}: {', '.join(str(file.relative_to(path)) for file in found[:4])}" if found else "none"
        raise _error(path, got, f"one {_SUMMARY}", f"Name the file: --summary NAME=PATH/{_SUMMARY}.")
    return found[0]


def _foreground_dice(path: Path) -> float:
    mean = _read_json(path).get("foreground_mean")
    if not isinstance(mean, dict) or "Dice" not in mean:
        raise _error(path, "no foreground_mean.Dice", "a summary.json of nnU-Net's evaluation")
    return _numbers({"foreground_mean.Dice": mean["Dice"]}, path)["foreground_mean.Dice"]


def _is_candidate(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("scores"), dict)


def _numbers(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, float]:
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise _error(path, f"{name}: {str(value)[:60]}", "a number for each candidate")
    return {name: float("nan") if value is None else float(value) for name, value in content.items()}


def _read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(path, error.strerror or type(error).__name__, "a readable JSON file") from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise _error(path, f"no JSON: {error}", "a JSON file") from error
    if not isinstance(content, dict):
        raise _error(path, f"a JSON {type(content).__name__}", "a JSON object")
    return content


def _error(
    path: str | os.PathLike[str], got: str, expected: str, remedy: str = "Check the path and what wrote it."
) -> TransferabilityError:
    return TransferabilityError(f"unusable file {os.fspath(path)}", got=got, expected=expected, remedy=remedy)
