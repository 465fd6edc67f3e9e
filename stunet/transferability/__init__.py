"""Which checkpoint will transfer best: features of each at sampled points of the target's cases."""

from stunet.transferability.candidates import (
    CandidateDescription,
    CandidateNetwork,
    Target,
    build_candidate,
    load_candidate,
)
from stunet.transferability.extraction import extract_case, read_points
from stunet.transferability.features import FeatureHooks, decoder_stages, unwrap
from stunet.transferability.heads import SourceHead, finest_head, source_head
from stunet.transferability.samples import CaseFeatures
from stunet.transferability.sampling import CasePoints, draw_points
from stunet.transferability.windows import Window, assign_windows, cut_window, window_starts

__all__ = [
    "CandidateDescription",
    "CandidateNetwork",
    "CaseFeatures",
    "CasePoints",
    "FeatureHooks",
    "SourceHead",
    "Target",
    "Window",
    "assign_windows",
    "build_candidate",
    "cut_window",
    "decoder_stages",
    "draw_points",
    "extract_case",
    "finest_head",
    "load_candidate",
    "read_points",
    "source_head",
    "unwrap",
    "window_starts",
]
