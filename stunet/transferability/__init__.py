"""Picking the checkpoint that will transfer best: features at points, and scores of them."""

from stunet.transferability.agreement import STATISTICS, Agreement, Estimate, agreement, top_regret, weighted_kendall
from stunet.transferability.ccfv import CCFV, Normalise, bootstrap_scores, ccfv, draw_cases, scores_of_draws
from stunet.transferability.consistency import Debias
from stunet.transferability.gbc import Covariance, gbc
from stunet.transferability.leep import leep
from stunet.transferability.logme import Evidence, evidence, logme
from stunet.transferability.metrics import METRICS, Metric, MetricSettings
from stunet.transferability.samples import CaseFeatures, check_cases, mean_over_scales, pool_probabilities, pool_scale
from stunet.transferability.score_files import RANKING_FORMAT, read_dice, read_scores, read_summaries
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
from stunet.transferability.zero_shot import ZeroShotDice, shared_structures, zero_shot_dice

__all__ = [
    "CCFV",
    "METRICS",
    "RANKING_FORMAT",
    "STATISTICS",
    "Agreement",
    "CaseFeatures",
    "Covariance",
    "Debias",
    "Estimate",
    "Evidence",
    "GaussianFactor",
    "Metric",
    "MetricSettings",
    "Normalise",
    "ZeroShotDice",
    "agreement",
    "bootstrap_scores",
    "ccfv",
    "check_cases",
    "coding_rate",
    "draw_cases",
    "evidence",
    "factor_from_moments",
    "feature_variety",
    "gaussian_factor",
    "gbc",
    "hyperspherical_energy",
    "leep",
    "logme",
    "mean_over_scales",
    "pairwise_fidelity",
    "pairwise_wasserstein2",
    "pool_probabilities",
    "pool_scale",
    "read_dice",
    "read_scores",
    "read_summaries",
    "scores_of_draws",
    "shared_structures",
    "top_regret",
    "transrate",
    "wasserstein2",
    "weighted_kendall",
    "zero_shot_dice",
]
