"""Picking the checkpoint that will transfer best: features at points of the target's cases, and scores of them."""

from stunet.transferability.agreement import STATISTICS, Agreement, Estimate, agreement, top_regret, weighted_kendall
from stunet.transferability.candidates import (
    CandidateDescription,
    CandidateNetwork,
    Target,
    build_candidate,
    load_candidate,
)
from stunet.transferability.ccfv import CCFV, Normalise, bootstrap_scores, ccfv, draw_cases, scores_of_draws
from stunet.transferability.consistency import Debias
from stunet.transferability.extraction import extract_case, read_points
from stunet.transferability.features import FeatureHooks, decoder_stages, unwrap
from stunet.transferability.gbc import Covariance, gbc
from stunet.transferability.heads import SourceHead, finest_head, source_head
from stunet.transferability.leep import leep
from stunet.transferability.logme import Evidence, evidence, logme
from stunet.transferability.metrics import METRICS, Metric, MetricSettings
from stunet.transferability.ranking import Failure, Ranking, check_metrics, rank_candidates
from stunet.transferability.result_cache import ResultCache
from stunet.transferability.samples import CaseFeatures, check_cases, mean_over_scales, pool_probabilities, pool_scale
from stunet.transferability.sampling import CasePoints, draw_points
from stunet.transferability.score_files import RANKING_FORMAT, read_dice, read_scores, read_summaries
from stunet.transferability.scoring import RANK_METRICS, CandidateScores, score_candidate
from stunet.transferability.target import LabelledCase, TargetCases, prepare_target
from stunet.transferability.transrate import coding_rate, transrate
from stunet.transferability.variety import feature_variety, hyperspherical_energy
from stunet.transferability.wasserstein import (
    GaussianFactor,
    factor_from_moments,
    gaussian_factor,
    pairwise_fidelity,
    pairwise_wasserstein2,
    wasserstein2,
)
from stunet.transferability.windows import Window, assign_windows, cut_window, window_starts
from stunet.transferability.zero_shot import PointPredictions, zero_shot_at_points
from stunet.transferability.zoo import ZooEntry, name_checkpoints, read_zoo

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
