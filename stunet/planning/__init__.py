"""Plans files: rewriting, presets, and the model folders and preprocessed data that belong to them."""

from stunet.planning.model_folder import describe_model, write_model_folder
from stunet.planning.plans import (
    apply_preset,
    fine_tuning_configurations,
    fine_tuning_settings,
    load_plans,
    load_preset,
    missing_preprocessed_cases,
    plan_with_nnunet,
    preview_transfer,
    write_plans,
)
from stunet.planning.preprocessed import PreprocessedDataset, open_preprocessed
from stunet.planning.rewrite import fit_strides, is_stunet, plans_size, resolve_configuration, rewrite_plans
