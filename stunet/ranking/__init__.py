"""Picking the checkpoint that will transfer best: features at points of the target's cases, and scores of them."""

from stunet.ranking.agreement import (
    RANKING_FORMAT,
    agreement,
    leave_one_target_out,
    mean_agreement,
    read_dice,
    read_scores,
    read_summaries,
)
from stunet.ranking.ccfv import bootstrap_scores, ccfv, ccfv_variants
from stunet.ranking.points import CaseFeatures, draw_points, extract_case
from stunet.ranking.ranking import CandidateScores, Ranking, build_candidate, prepare_target, rank, score_candidate
from stunet.ranking.rivals import gbc, leep, linear_probe, logme, transrate
