"""Plans files: rewriting, settings, presets, and where nnU-Net keeps them."""

from stunet.planning.locations import (
    find_dataset,
    find_plans,
    load_plans,
    nnunet_folder,
    plan_with_nnunet,
    write_plans,
)
from stunet.planning.presets import Preset, list_presets, load_preset
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
from stunet.planning.settings import SETTINGS, SETTINGS_KEY, Setting, check_settings, parse_settings

__all__ = [
    "NETWORK_CLASS_NAME",
    "SETTINGS",
    "SETTINGS_KEY",
    "Preset",
    "Setting",
    "check_plans",
    "check_settings",
    "find_dataset",
    "find_plans",
    "fit_strides",
    "has_own_architecture",
    "is_stunet",
    "list_presets",
    "load_plans",
    "load_preset",
    "nnunet_folder",
    "parse_settings",
    "plan_with_nnunet",
    "plans_size",
    "resolve_configuration",
    "rewrite_configuration",
    "rewrite_plans",
    "write_plans",
]
