"""Scores of all cases: in the form of nnU-Net's ``summary.json``, as a table, and by structure."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stunet.errors import STUNetError
from stunet.evaluation.scores import CaseOrientation, CaseScores, EvaluationCase, score_case
from stunet.files import atomic_path
from stunet.labels import Comparison
from stunet.processes import run_jobs

_COLUMNS = ("Dice", "IoU", "NSD", "HD95", "TP", "FP", "FN", "TN", "n_pred", "n_ref")
_STATES = ("scored", "missed", "spurious", "absent", "not_annotated")
#: How much higher the mean Dice of sided structures must be with left and right swapped before a case is suspicious.
_MUCH_BETTER = 0.2
_SHOWN = 8
_OF_PREDICTIONS = ("predictions", "The model was trained on images with another orientation")


@dataclass(frozen=True)
class StructureSummary:
    """Scores of one structure over all cases.

    Attributes:
        comparison: What is compared.
        mean: Mean of each metric over the cases that have it; None where none has.
        scored: Cases that have the structure in label map and prediction.
        missed: Cases that have it in the label map alone.
        spurious: Cases that have it in the prediction alone.
        absent: Cases that have it in neither; they have no scores.
        not_annotated: Cases that do not annotate it; they have no scores.
    """

    comparison: Comparison
    mean: Mapping[str, float | None]
    scored: int
    missed: int
    spurious: int
    absent: int
    not_annotated: int

    @property
    def infinite(self) -> int:
        """Cases whose Hausdorff distance is infinite and not part of its mean."""
        return self.missed + self.spurious

    @property
    def key(self) -> str:
        """nnU-Net's key in ``summary.json``: a label value, or several in brackets."""
        values = self.comparison.target_values
        return str(values[0]) if len(values) == 1 else str(values)


@dataclass(frozen=True)
class EvaluationResults:
    """Scores of all cases.

    Attributes:
        structures: By structure, in the order of the dataset's label values.
        cases: By case, in the order of names.
        jobs: What was scored, by case.
        mean: Mean over structures of their means, for each metric; None where no structure has it.
        warnings: What is suspicious about left and right.
        failed: Why cases could not be scored, by case.
    """

    structures: tuple[StructureSummary, ...]
    cases: Mapping[str, CaseScores]
    jobs: Mapping[str, EvaluationCase]
    mean: Mapping[str, float | None]
    warnings: tuple[str, ...]
    failed: Mapping[str, STUNetError] = field(default_factory=dict)

    def summary(self, **more: Any) -> dict[str, Any]:
        """Return the content of a ``summary.json`` as nnU-Net's evaluation writes it, with more metrics and entries."""
        keys = [structure.key for structure in self.structures]
        per_case = [
            {
                "reference_file": str(self.jobs[name].reference),
                "prediction_file": str(self.jobs[name].prediction),
                "case": name,
                "metrics": {key: score.metrics for key, score in zip(keys, case.scores, strict=True)},
                "status": {key: score.status for key, score in zip(keys, case.scores, strict=True)},
            }
            for name, case in self.cases.items()
        ]
        described = {}
        for structure in self.structures:
            counts = {state: getattr(structure, state) for state in _STATES}
            described[structure.key] = {**asdict(structure.comparison), **counts, "HD95_infinite": structure.infinite}
        return {
            "foreground_mean": dict(self.mean),
            "mean": {structure.key: dict(structure.mean) for structure in self.structures},
            "structures": described,
            "metric_per_case": per_case,
            "warnings": list(self.warnings),
            **more,
        }

    def values(self, metric: str) -> dict[str, list[float]]:
        """Scores of all cases that have one, by structure."""
        found = {structure.comparison.name: list[float]() for structure in self.structures}
        for case in self.cases.values():
            for values, score in zip(found.values(), case.scores, strict=True):
                if (value := score.metrics[metric]) is not None:
                    values.append(value)
        return found

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row for each case and structure, atomically; a score that there is not is left empty."""
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "structure", "status", *(f"{c}_mm" if c == "HD95" else c for c in _COLUMNS)])
            for name, case in self.cases.items():
                for structure, score in zip(self.structures, case.scores, strict=True):
                    values = ["" if (v := score.metrics[c]) is None else v for c in _COLUMNS]
                    writer.writerow([name, structure.comparison.name, score.status, *values])


def score_cases(
    jobs: Sequence[EvaluationCase], *, num_processes: int = 1, on_case: Callable[[], None] = lambda: None
) -> EvaluationResults:
    """Score cases, several at a time. One that fails stops no other.

    Args:
        jobs: The cases.
        num_processes: Cases at a time.
        on_case: Called after each case.
    """
    scores: dict[str, CaseScores] = {}
    failed: dict[str, STUNetError] = {}
    for job, result in run_jobs(score_case, jobs, num_processes=num_processes):
        if isinstance(result, STUNetError):
            failed[job.name] = result
        else:
            scores[job.name] = result
        on_case()
    return collect_results(scores, jobs, failed)


def collect_results(
    scores: Mapping[str, CaseScores], jobs: Sequence[EvaluationCase], failed: Mapping[str, STUNetError] | None = None
) -> EvaluationResults:
    """Bring the scores of cases together.

    Args:
        scores: Scores by case, in any order.
        jobs: What was to be scored; not empty. Cases without scores do not count.
        failed: Why cases have no scores.
    """
    by_name = {job.name: job for job in sorted(jobs, key=lambda job: job.name) if job.name in scores}
    cases, structures = {name: scores[name] for name in by_name}, []
    for i, comparison in enumerate(jobs[0].comparisons):
        own = [case.scores[i] for case in cases.values()]
        states = Counter(score.status.replace(" ", "_") for score in own)
        mean = {column: _mean(score.metrics[column] for score in own) for column in _COLUMNS}
        structures.append(StructureSummary(comparison, mean, **{state: states[state] for state in _STATES}))
    mean = {column: _mean(structure.mean[column] for structure in structures) for column in _COLUMNS}
    warnings = orientation_warnings({name: case.orientation for name, case in cases.items()})
    return EvaluationResults(tuple(structures), cases, by_name, mean, tuple(warnings), failed or {})


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def orientation_warnings(cases: Mapping[str, CaseOrientation]) -> list[str]:
    """Say what the cases of a dataset, by name, tell about left and right; nothing where all is well."""
    warnings = []
    for what in ("reference", "prediction"):
        sides = {name: getattr(case, what) for name, case in cases.items()}
        wrong, n = [name for name, of in sides.items() if of.suspicious], sum(of.pairs > 0 for of in sides.values())
        if wrong and (what == "reference" or 2 * len(wrong) > n):
            place, reason = ("label maps", "Their names are swapped") if what == "reference" else _OF_PREDICTIONS
            warnings.append(
                f"left and right are swapped in the {place} of {len(wrong)} of {n} cases: by the image's own axes, "
                f"what is left in them lies to the patient's right ({_shortened(wrong)}). {reason}, or the image's "
                "direction is wrong."
            )
    scored = {n: np.array([c.dice, c.swapped_dice], float) for n, c in cases.items() if c.dice is not None}
    better = [name for name, (dice, swapped) in scored.items() if swapped > dice + _MUCH_BETTER]
    if 2 * len(better) > len(scored):
        dice, swapped = np.mean(list(scored.values()), axis=0)
        warnings.append(
            f"with left and right of the predictions swapped, sided structures would score a Dice of {swapped:.3f} "
            f"instead of {dice:.3f}; {len(better)} of {len(scored)} cases would score much better "
            f"({_shortened(better)})."
        )
    return warnings


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
