"""What the packages offer, pinned: a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

API = {
    "stunet": ["__version__"],
    "stunet.network": [
        "ActivationCheckpointing", "Estimate", "Loss", "N_STAGES", "Precision", "SIZES", "STUNet", "STUNetSize",
        "build_stunet", "default_strides", "estimate", "find_size", "peak_forward_bytes", "size_of", "total_stride",
    ],
    "stunet.planning": [
        "Mirroring", "ModelDescription", "NETWORK_CLASS_NAME", "PRETRAINING", "Preparation", "Preset", "Recipe",
        "SETTINGS", "SETTINGS_KEY", "STRATEGIES", "Setting", "Strategy", "apply_recipe", "check_plans",
        "check_settings", "describe_model", "find_dataset", "find_plans", "fine_tuning_configurations",
        "fine_tuning_settings", "fit_strides", "has_own_architecture", "is_stunet", "list_presets", "list_recipes",
        "load_plans", "load_preset", "load_recipe", "make_plans", "missing_preprocessed_cases", "nnunet_folder",
        "parse_settings", "plan_with_nnunet", "plans_size", "preview_transfer", "read_v1_plans",
        "resolve_configuration", "rewrite_configuration", "rewrite_plans", "write_model_folder", "write_plans",
    ],
    "stunet.labels": [
        "AnnotationManifest", "Coverage", "LabelUnion", "MANIFEST_NAME", "MergedMasks", "Outputs", "StructureCoverage",
        "UnionMapping", "Vocabulary", "bind_manifest", "canonical_name", "count_labels", "dump_mapping", "group_cases",
        "list_vocabularies", "load_vocabulary", "manifest_schema", "match_names", "measure_coverage", "merge_labels",
        "merge_masks", "outputs_of", "read_label_file", "read_manifest", "read_mapping", "structures_of",
        "vocabulary_for", "write_manifest",
    ],
    "stunet.losses": ["PartialDiceCELoss", "label_members", "partial_dice_ce_loss"],
    "stunet.datasets": [
        "ImportReport", "KNOWN_BAD_CASES", "PHANTOM_LABELS", "Phantom", "REPORT_NAME", "RawDataset", "SPLITS_NAME",
        "SourceCase", "TotalSegmentatorSource", "UnionReport", "UnionSource", "carry_side_files", "case_names",
        "check_hold_out", "check_sources", "choose_structures", "dataset_folder", "exclusive_labels",
        "has_annotations", "hold_out", "import_cases", "import_union", "make_phantom", "merge_sources",
        "read_annotations", "read_image", "read_raw_dataset", "read_totalsegmentator", "read_union_source",
        "sampling_weights", "write_phantom_dataset", "write_phantom_masks",
    ],
    "stunet.inference": [
        "AxisMap", "Case", "FolderListener", "FolderRequest", "Geometry", "LabelNames", "LabelResampler", "Listener",
        "Model", "OutputOptions", "Prediction", "PreparationJob", "Prepared", "Strategy", "WindowGrid",
        "available_bytes", "axis_maps", "choose_strategy", "find_cases", "label_names", "load_model",
        "mirror_and_predict", "parse_memory", "predict_cases", "predict_folder", "predict_labels", "predict_planes",
        "prepare", "read_geometry", "stock_bytes", "window_grid",
    ],
    "stunet.training": [
        "BaseSTUNetTrainer", "CaseAnnotations", "Counts", "GroupSchedule", "ParameterGroup", "PartialLabelTrainer",
        "count_voxels", "freeze_others", "mask_summary", "parameter_groups",
    ],
    "stunet.reports": ["StructureDice", "read_dice", "side_by_side"],
    "stunet.weights": [
        "Listener", "Place", "Verified", "WeightsEntry", "WeightsFile", "cached_weights", "describe_file",
        "entry_folder", "fetch", "find_entry", "load_registry", "verify", "verify_file",
    ],
    "stunet.checkpoints": [
        "Architecture", "HeadPolicy", "SourceWeights", "StemPolicy", "TransferReport", "adapt_stem", "check_weights",
        "from_published_key", "infer_architecture", "open_weights", "read_checkpoint", "read_pickle",
        "source_outputs", "to_published_key", "transfer_weights", "write_published",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", API)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(API[name])
    assert all(hasattr(module, public) for public in module.__all__)
