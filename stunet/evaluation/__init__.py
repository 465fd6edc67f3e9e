"""Scores of segmentations against the labels of another dataset than the model's. Without torch and nnU-Net."""

from stunet.evaluation.cases import CaseScores, EvaluationCase, score_case
from stunet.evaluation.orientation import CaseOrientation, Sides, orientation_warnings
from stunet.evaluation.results import EvaluationResults, StructureSummary, collect_results
from stunet.evaluation.scores import METRICS, StructureScore, surface_scores, volume_scores
from stunet.evaluation.volumes import LabelVolume, check_same_geometry, read_label_volume

__all__ = [
    "METRICS",
    "CaseOrientation",
    "CaseScores",
    "EvaluationCase",
    "EvaluationResults",
    "LabelVolume",
    "Sides",
    "StructureScore",
    "StructureSummary",
    "check_same_geometry",
    "collect_results",
    "orientation_warnings",
    "read_label_volume",
    "score_case",
    "surface_scores",
    "volume_scores",
]
