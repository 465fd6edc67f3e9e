"""What the packages offer, pinned: a change here is a change for users."""

from __future__ import annotations

import importlib

import pytest

API = {
    "stunet": ["__version__"],
    "stunet.network": [
        "ActivationCheckpointing", "Estimate", "N_STAGES", "Precision", "SIZES", "STUNet", "STUNetSize",
        "build_stunet", "default_strides", "estimate", "find_size", "size_of", "total_stride",
    ],
    "stunet.planning": [
        "NETWORK_CLASS_NAME", "Preset", "SETTINGS", "SETTINGS_KEY", "Setting", "check_plans", "check_settings",
        "find_dataset", "find_plans", "fit_strides", "has_own_architecture", "is_stunet", "list_presets", "load_plans",
        "load_preset", "nnunet_folder", "parse_settings", "plan_with_nnunet", "plans_size", "resolve_configuration",
        "rewrite_configuration", "rewrite_plans", "write_plans",
    ],
    "stunet.datasets": [
        "PHANTOM_LABELS", "Phantom", "RawDataset", "check_hold_out", "exclusive_labels", "hold_out", "make_phantom",
        "read_image", "read_raw_dataset", "write_phantom_dataset",
    ],
    "stunet.training": ["BaseSTUNetTrainer"],
    "stunet.reports": ["StructureDice", "read_dice", "side_by_side"],
    "stunet.checkpoints": ["check_weights", "from_published_key", "read_checkpoint", "to_published_key"],
}  # fmt: skip


@pytest.mark.parametrize("name", API)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(API[name])
    assert all(hasattr(module, public) for public in module.__all__)
