"""Scores of all cases: in the form of nnU-Net's ``summary.json``, as a table, and by structure."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stunet.evaluation.cases import CaseScores, EvaluationCase
from stunet.evaluation.orientation import orientation_warnings
from stunet.evaluation.scores import METRICS, StructureScore
from stunet.files import atomic_path
from stunet.labels import Comparison

__all__ = ["EvaluationResults", "StructureSummary", "collect_results"]

_COLUMNS = ("Dice", "IoU", "NSD", "HD95", "TP", "FP", "FN", "TN", "n_pred", "n_ref")


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


@dataclass(frozen=True)
class EvaluationResults:
    """Scores of all cases.

    Attributes:
        structures: By structure, in the order of the dataset's label values.
        cases: By case, in the order of names.
        jobs: What was scored, by case.
        mean: Mean over structures of their means, for each metric; None where no structure has it.
        warnings: What is suspicious about left and right.
    """

    structures: tuple[StructureSummary, ...]
    cases: Mapping[str, CaseScores]
    jobs: Mapping[str, EvaluationCase]
    mean: Mapping[str, float | None]
    warnings: tuple[str, ...]

    def summary(self, **more: Any) -> dict[str, Any]:
        """The content of a ``summary.json`` as nnU-Net's evaluation writes it, with more metrics and more keys.

        Keys of structures are nnU-Net's: a label value, or several in brackets. ``structures`` says what they are.

        Args:
            more: Further entries.
        """
        keys = [_key(structure.comparison) for structure in self.structures]
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
        structures = {key: _describe(structure) for key, structure in zip(keys, self.structures, strict=True)}
        return {
            "foreground_mean": dict(self.mean),
            "mean": {key: dict(structure.mean) for key, structure in zip(keys, self.structures, strict=True)},
            "structures": structures,
            "metric_per_case": per_case,
            "warnings": list(self.warnings),
            **more,
        }

    def values(self, metric: str) -> dict[str, list[float]]:
        """Scores of all cases that have one, by structure."""
        return {
            structure.comparison.name: [
                value for case in self.cases.values() if (value := case.scores[i].metrics[metric]) is not None
            ]
            for i, structure in enumerate(self.structures)
        }

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row for each case and structure, whole or not at all; a score that there is not is left empty."""
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "structure", "status", *(f"{c}_mm" if c == "HD95" else c for c in _COLUMNS)])
            for name, case in self.cases.items():
                for structure, score in zip(self.structures, case.scores, strict=True):
                    values = ["" if (v := score.metrics[c]) is None else v for c in _COLUMNS]
                    writer.writerow([name, structure.comparison.name, score.status, *values])


def collect_results(scores: Mapping[str, CaseScores], jobs: Sequence[EvaluationCase]) -> EvaluationResults:
    """Bring the scores of cases together.

    Args:
        scores: Scores by case, in any order; not empty.
        jobs: What was to be scored; cases without scores have failed and do not count.
    """
    by_name = {job.name: job for job in sorted(jobs, key=lambda job: job.name) if job.name in scores}
    cases = {name: scores[name] for name in by_name}
    comparisons = next(iter(by_name.values())).comparisons
    structures = tuple(
        _summarise(comparison, [case.scores[i] for case in cases.values()]) for i, comparison in enumerate(comparisons)
    )
    mean = {column: _mean(structure.mean[column] for structure in structures) for column in _COLUMNS}
    warnings = orientation_warnings({name: case.orientation for name, case in cases.items()})
    return EvaluationResults(structures, cases, by_name, mean, tuple(warnings))


def _summarise(comparison: Comparison, scores: Sequence[StructureScore]) -> StructureSummary:
    status = Counter(score.status for score in scores)
    return StructureSummary(
        comparison,
        {column: _mean(score.metrics[column] for score in scores) for column in _COLUMNS},
        scored=status["scored"],
        missed=status["missed"],
        spurious=status["spurious"],
        absent=status["absent"],
        not_annotated=status["not annotated"],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _describe(structure: StructureSummary) -> dict[str, Any]:
    content = asdict(structure)
    comparison = content.pop("comparison")
    del content["mean"]
    return {**comparison, **content, f"{METRICS[2]}_infinite": structure.infinite}


def _key(comparison: Comparison) -> str:
    values = comparison.target_values
    return str(values[0]) if len(values) == 1 else str(values)
