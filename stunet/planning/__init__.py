"""Plans files: rewriting, settings, presets, and where nnU-Net keeps them."""

from stunet.planning.fine_tuning import fine_tuning_configurations, fine_tuning_settings, preview_transfer
from stunet.planning.locations import (
    find_dataset,
    find_plans,
    load_plans,
    missing_preprocessed_cases,
    nnunet_folder,
    plan_with_nnunet,
    write_plans,
)
from stunet.planning.model_folder import ModelDescription, describe_model, make_plans, write_model_folder
from stunet.planning.preprocessed import PreprocessedCase, PreprocessedDataset, open_preprocessed
from stunet.planning.presets import Preset, list_presets, load_preset
from stunet.planning.recipes import Recipe, apply_recipe, list_recipes, load_recipe
from stunet.planning.rewrite import (
    NETWORK_CLASS_NAME,
    check_plans,
    fit_strides,
    has_own_architecture,
    is_stunet,
    plans_size,
    resolve_configuration,
    rewrite_configuration,
    rewrite_plans,
)
from stunet.planning.v1_plans import PRETRAINING, Preparation, read_v1_plans
from stunet.settings import (
    SETTINGS,
    SETTINGS_KEY,
    STRATEGIES,
    Mirroring,
    MomentumDtype,
    Parallel,
    Setting,
    Strategy,
    check_settings,
    parse_settings,
)

__all__ = [
    "NETWORK_CLASS_NAME",
    "PRETRAINING",
    "SETTINGS",
    "SETTINGS_KEY",
    "STRATEGIES",
    "Mirroring",
    "ModelDescription",
    "MomentumDtype",
    "Parallel",
    "Preparation",
    "PreprocessedCase",
    "PreprocessedDataset",
    "Preset",
    "Recipe",
    "Setting",
    "Strategy",
    "apply_recipe",
    "check_plans",
    "check_settings",
    "describe_model",
    "find_dataset",
    "find_plans",
    "fine_tuning_configurations",
    "fine_tuning_settings",
    "fit_strides",
    "has_own_architecture",
    "is_stunet",
    "list_presets",
    "list_recipes",
    "load_plans",
    "load_preset",
    "load_recipe",
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
