"""Scores of segmentations against the labels of another dataset than the model's. Without torch and nnU-Net."""

from stunet.evaluation.evaluate import EvaluationResults, StructureSummary, collect_results, evaluate, score_cases
from stunet.evaluation.scores import METRICS, CaseScores, EvaluationCase, StructureScore, score_case
