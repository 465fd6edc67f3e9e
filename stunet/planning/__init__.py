"""Plans files: rewriting, settings, presets, and the preprocessed data that belong to them."""

from stunet.environment import find_dataset, find_plans, nnunet_folder
from stunet.planning.model_folder import ModelDescription, describe_model, make_plans, write_model_folder
from stunet.planning.plans import (
    apply_preset,
    fine_tuning_configurations,
    fine_tuning_settings,
    list_presets,
    load_plans,
    load_preset,
    missing_preprocessed_cases,
    plan_with_nnunet,
    preview_transfer,
    write_plans,
)
from stunet.planning.preprocessed import PreprocessedCase, PreprocessedDataset, open_preprocessed
from stunet.planning.rewrite import (
    check_configuration,
    check_plans,
    fit_strides,
    is_stunet,
    plans_size,
    resolve_configuration,
    rewrite_configuration,
    rewrite_plans,
)
from stunet.planning.v1_plans import PRETRAINING, Preparation, read_v1_plans
from stunet.settings import STRATEGIES, Strategy, check_settings, parse_settings

__all__ = [
    "PRETRAINING",
    "STRATEGIES",
    "ModelDescription",
    "Preparation",
    "PreprocessedCase",
    "PreprocessedDataset",
    "Strategy",
    "apply_preset",
    "check_configuration",
    "check_plans",
    "check_settings",
    "describe_model",
    "find_dataset",
    "find_plans",
    "fine_tuning_configurations",
    "fine_tuning_settings",
    "fit_strides",
    "is_stunet",
    "list_presets",
    "load_plans",
    "load_preset",
    "make_plans",
    "missing_preprocessed_cases",
    "nnunet_folder",
    "open_preprocessed",
    "parse_settings",
    "plan_with_nnunet",
    "plans_size",
    "preview_transfer",
    "read_v1_plans",
    "resolve_configuration",
    "rewrite_configuration",
    "rewrite_plans",
    "write_model_folder",
    "write_plans",
]
