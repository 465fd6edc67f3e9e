"""Plans files: rewriting, settings, presets, and where nnU-Net keeps them."""

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
    "Setting",
    "check_plans",
    "check_settings",
    "fit_strides",
    "has_own_architecture",
    "is_stunet",
    "parse_settings",
    "plans_size",
    "resolve_configuration",
    "rewrite_configuration",
    "rewrite_plans",
]
