"""Picking the checkpoint that will transfer best: features at points of the target's cases, and scores of them."""

from stunet.ranking.agreement import STATISTICS, Agreement, Estimate, agreement, top_regret, weighted_kendall
from stunet.ranking.candidates import CandidateDescription, CandidateNetwork, Target, build_candidate, load_candidate
from stunet.ranking.ccfv import CCFV, Normalise, bootstrap_scores, ccfv, draw_cases, scores_of_draws
from stunet.ranking.consistency import Debias
from stunet.ranking.extraction import extract_case, read_points
from stunet.ranking.features import FeatureHooks, decoder_stages, unwrap
from stunet.ranking.gbc import Covariance, gbc
from stunet.ranking.heads import SourceHead, finest_head, source_head
from stunet.ranking.leep import leep
from stunet.ranking.logme import Evidence, evidence, logme
from stunet.ranking.metrics import METRICS, Metric, MetricSettings
from stunet.ranking.ranking import Failure, Ranking, check_metrics, rank_candidates
from stunet.ranking.result_cache import ResultCache
from stunet.ranking.samples import CaseFeatures, check_cases, mean_over_scales, pool_probabilities, pool_scale
from stunet.ranking.sampling import CasePoints, draw_points
from stunet.ranking.score_files import RANKING_FORMAT, read_dice, read_scores, read_summaries
from stunet.ranking.scoring import RANK_METRICS, CandidateScores, score_candidate
from stunet.ranking.target import LabelledCase, TargetCases, prepare_target
from stunet.ranking.transrate import coding_rate, transrate
from stunet.ranking.variety import feature_variety, hyperspherical_energy
from stunet.ranking.wasserstein import (
    GaussianFactor,
    factor_from_moments,
    gaussian_factor,
    pairwise_fidelity,
    pairwise_wasserstein2,
    wasserstein2,
)
from stunet.ranking.windows import Window, assign_windows, cut_window, window_starts
from stunet.ranking.zero_shot import PointPredictions, zero_shot_at_points
from stunet.ranking.zoo import ZooEntry, name_checkpoints, read_zoo

__all__ = [
    "CCFV",
    "METRICS",
    "RANKING_FORMAT",
    "RANK_METRICS",
    "STATISTICS",
    "Agreement",
    "CandidateDescription",
    "CandidateNetwork",
    "CandidateScores",
    "CaseFeatures",
    "CasePoints",
    "Covariance",
    "Debias",
    "Estimate",
    "Evidence",
    "Failure",
    "FeatureHooks",
    "GaussianFactor",
    "LabelledCase",
    "Metric",
    "MetricSettings",
    "Normalise",
    "PointPredictions",
    "Ranking",
    "ResultCache",
    "SourceHead",
    "Target",
    "TargetCases",
    "Window",
    "ZooEntry",
    "agreement",
    "assign_windows",
    "bootstrap_scores",
    "build_candidate",
    "ccfv",
    "check_cases",
    "check_metrics",
    "coding_rate",
    "cut_window",
    "decoder_stages",
    "draw_cases",
    "draw_points",
    "evidence",
    "extract_case",
    "factor_from_moments",
    "feature_variety",
    "finest_head",
    "gaussian_factor",
    "gbc",
    "hyperspherical_energy",
    "leep",
    "load_candidate",
    "logme",
    "mean_over_scales",
    "name_checkpoints",
    "pairwise_fidelity",
    "pairwise_wasserstein2",
    "pool_probabilities",
    "pool_scale",
    "prepare_target",
    "rank_candidates",
    "read_dice",
    "read_points",
    "read_scores",
    "read_summaries",
    "read_zoo",
    "score_candidate",
    "scores_of_draws",
    "source_head",
    "top_regret",
    "transrate",
    "unwrap",
    "wasserstein2",
    "weighted_kendall",
    "window_starts",
    "zero_shot_at_points",
]
