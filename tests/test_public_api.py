"""What the packages offer, pinned: a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

API = {
    "stunet": ["__version__"],
    "stunet.network": [
        "ActivationCheckpointing", "Estimate", "Loss", "N_STAGES", "Parallel", "Precision", "Recommendation", "SIZES",
        "STUNet", "STUNetSize", "USABLE_SHARE", "build_stunet", "default_strides", "estimate", "find_size",
        "peak_forward_bytes", "recommend", "shard", "size_of", "total_stride",
    ],
    "stunet.planning": [
        "Mirroring", "ModelDescription", "MomentumDtype", "NETWORK_CLASS_NAME", "PRETRAINING", "Parallel",
        "Preparation",
        "PreprocessedCase", "PreprocessedDataset", "Preset", "Recipe", "SETTINGS", "SETTINGS_KEY", "STRATEGIES",
        "Setting", "Strategy", "apply_recipe", "check_configuration", "check_plans", "check_settings", "describe_model",
        "find_dataset",
        "find_plans", "fine_tuning_configurations", "fine_tuning_settings", "fit_strides", "has_own_architecture",
        "is_stunet", "list_presets", "list_recipes", "load_plans", "load_preset", "load_recipe", "make_plans",
        "missing_preprocessed_cases", "nnunet_folder", "open_preprocessed", "parse_settings", "plan_with_nnunet",
        "plans_size", "preview_transfer", "read_v1_plans", "resolve_configuration", "rewrite_configuration",
        "rewrite_plans", "write_model_folder", "write_plans",
    ],
    "stunet.labels": [
        "AnnotationManifest", "Comparison", "Coverage", "LabelMap", "LabelRelation", "LabelUnion", "MANIFEST_NAME",
        "MapEntry", "MergedMasks", "Outputs", "SourceCoverage", "StructureCoverage", "UnionMapping", "Vocabulary",
        "bind_manifest", "canonical_name", "count_labels", "declared_values", "dump_mapping", "group_cases",
        "list_label_systems", "list_vocabularies", "load_label_system", "load_vocabulary", "manifest_schema",
        "match_names", "measure_coverage", "merge_labels", "merge_masks", "observed_values", "outputs_of",
        "read_label_file", "read_label_map", "read_manifest", "read_mapping", "relate_labels", "structure_values",
        "structures_of", "suggest_label_map", "vocabulary_for", "write_manifest",
    ],
    "stunet.losses": ["PartialDiceCELoss", "WholeBatch", "label_members", "partial_dice_ce_loss"],
    "stunet.datasets": [
        "Contrast", "ImportReport", "KNOWN_BAD_CASES", "PHANTOM_LABELS", "Phantom", "REPORT_NAME", "RawDataset",
        "SPLITS_NAME", "SourceCase", "TotalSegmentatorSource", "UnionReport", "UnionSource", "carry_side_files",
        "case_names", "check_hold_out", "check_sources", "choose_structures", "dataset_folder", "exclusive_labels",
        "has_annotations", "hold_out", "import_cases", "import_union", "make_phantom", "merge_sources",
        "phantom_labels", "plane_names", "read_annotations", "read_image", "read_plane_names", "read_raw_dataset",
        "read_test_dataset",
        "read_totalsegmentator", "read_union_source", "read_validation_dataset", "sampling_weights", "sources_of_cases",
        "write_phantom_dataset", "write_phantom_masks",
    ],
    "stunet.inference": [
        "AxisMap", "Case", "FolderListener", "FolderRequest", "Geometry", "LabelNames", "LabelResampler", "Listener",
        "Model", "OutputOptions", "Prediction", "PreparationJob", "Prepared", "Strategy", "WindowGrid",
        "available_bytes", "axis_maps", "choose_strategy", "find_cases", "label_names", "load_model",
        "mirror_and_predict", "parse_memory", "predict_cases", "predict_folder", "predict_labels", "predict_planes",
        "prepare", "published_model", "read_geometry", "stock_bytes", "window_grid",
    ],
    "stunet.training": [
        "AccumulatingTrainer",
        "BF16MomentumSGD",
        "BaseSTUNetTrainer",
        "CaseAnnotations",
        "Counts",
        "DistributedTrainer",
        "GroupSchedule",
        "LocalLabelTransform",
        "ParameterGroup",
        "PartialLabelTrainer",
        "Ranks",
        "TrainRequest",
        "check_agreement",
        "check_request",
        "check_shared_folder",
        "count_voxels",
        "freeze_others",
        "mask_summary",
        "parameter_groups",
        "process_group",
        "round_to_bfloat16",
        "seed_everything",
        "set_kernel",
        "share_of_batch",
        "train",
    ],
    "stunet.transferability": [
        "Agreement", "CCFV", "CandidateDescription", "CandidateNetwork", "CandidateScores", "CaseFeatures",
        "CasePoints", "Covariance", "Debias", "Estimate", "Evidence", "Failure", "FeatureHooks", "GaussianFactor",
        "LabelledCase", "METRICS", "Metric", "MetricSettings", "Normalise", "PointPredictions", "RANKING_FORMAT",
        "RANK_METRICS", "Ranking", "ResultCache", "STATISTICS", "SourceHead", "Target", "TargetCases", "Window",
        "ZooEntry", "agreement", "assign_windows", "bootstrap_scores", "build_candidate", "ccfv", "check_cases",
        "check_metrics", "coding_rate", "cut_window", "decoder_stages", "draw_cases", "draw_points", "evidence",
        "extract_case", "factor_from_moments", "feature_variety", "finest_head", "gaussian_factor", "gbc",
        "hyperspherical_energy", "leep", "load_candidate", "logme", "mean_over_scales", "name_checkpoints",
        "pairwise_fidelity", "pairwise_wasserstein2", "pool_probabilities", "pool_scale", "prepare_target",
        "rank_candidates", "read_dice", "read_points", "read_scores", "read_summaries", "read_zoo", "score_candidate",
        "scores_of_draws", "source_head", "top_regret", "transrate", "unwrap", "wasserstein2", "weighted_kendall",
        "window_starts", "zero_shot_at_points",
    ],
    "stunet.evaluation": [
        "CaseOrientation", "CaseScores", "EvaluationCase", "EvaluationResults", "LabelVolume", "METRICS", "Sides",
        "StructureScore", "StructureSummary", "check_same_geometry", "collect_results", "orientation_warnings",
        "read_label_volume", "score_case", "surface_scores", "volume_scores",
    ],
    "stunet.reports": ["StructureDice", "draw_scores", "mean_dice", "read_dice", "side_by_side"],
    "stunet.weights": [
        "Listener", "Place", "Verified", "WeightsEntry", "WeightsFile", "cached_weights", "describe_file",
        "entry_folder", "fetch", "find_entry", "load_registry", "verify", "verify_file",
    ],
    "stunet.checkpoints": [
        "Architecture", "HeadPolicy", "SourceWeights", "StemPolicy", "TransferReport", "UNetArchitecture",
        "UNetWeights", "adapt_stem", "check_network", "check_weights", "from_published_key", "infer_architecture",
        "locate_checkpoint", "open_any_weights", "open_weights", "read_checkpoint", "read_pickle", "source_outputs",
        "to_published_key", "transfer_weights", "write_published",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", API)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(API[name])
    assert all(hasattr(module, public) for public in module.__all__)
