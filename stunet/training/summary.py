"""Evaluation of cases that annotate only some structures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stunet.labels import AnnotationManifest

__all__ = ["mask_summary"]


def mask_summary(summary: Mapping[str, Any], manifest: AnnotationManifest, *, file_ending: str) -> dict[str, Any]:
    """nnU-Net's ``summary.json`` with what the cases annotate.

    nnU-Net scores a structure that is predicted and not in the label map with 0, even where the case does not annotate
    it. Here such entries are None (null in JSON), as are undefined ones, and means are over the others.

    Args:
        summary: Content of ``summary.json``: ``metric_per_case``, with a dictionary of metrics for each label value.
        manifest: What each case annotates; cases are named as the reference files are.
        file_ending: Of these files, for example ``.nii.gz``.

    Returns:
        The same form, with ``mean`` and ``foreground_mean`` computed anew.
    """
    per_case = [_masked_case(entry, manifest, file_ending) for entry in summary["metric_per_case"]]
    labels = list(dict.fromkeys(label for entry in per_case for label in entry["metrics"]))
    mean = {label: _means([entry["metrics"].get(label, {}) for entry in per_case]) for label in labels}
    foreground = [metrics for label, metrics in mean.items() if label != "0"]
    return {**summary, "metric_per_case": per_case, "mean": mean, "foreground_mean": _means(foreground)}


def _masked_case(entry: Mapping[str, Any], manifest: AnnotationManifest, file_ending: str) -> dict[str, Any]:
    case = Path(entry["reference_file"]).name.removesuffix(file_ending)
    annotated = {str(value) for value in (0, *manifest.annotated(case))}
    metrics = {
        label: {
            key: _defined(value) if str(label) in annotated or key in _FACTS else None for key, value in values.items()
        }
        for label, values in entry["metrics"].items()
    }
    return {**entry, "metrics": metrics}


#: What does not depend on the annotation.
_FACTS = {"n_pred"}


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _means(entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    listed = list(entries)
    keys = list(dict.fromkeys(key for entry in listed for key in entry))
    means: dict[str, float | None] = {}
    for key in keys:
        values = [entry[key] for entry in listed if entry.get(key) is not None]
        means[key] = statistics.fmean(values) if values else None
    return means
