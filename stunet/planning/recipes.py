"""Recipes: how images are prepared, and how long a network is trained, for a pre-training that is to be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from stunet.errors import PlansError
from stunet.planning.model_folder import CONFIGURATION, configuration_for
from stunet.planning.rewrite import check_plans
from stunet.planning.v1_plans import Preparation
from stunet.settings import check_settings

__all__ = ["Recipe", "apply_recipe", "list_recipes", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """What ``stunet plan --preset NAME`` takes in the place of what nnU-Net plans from the data.

    Attributes:
        name: The file's name without its ending.
        preparation: Spacing in mm, patch, batch, strides and normalization, as in the file.
        settings: Settings, see :data:`stunet.planning.SETTINGS`; those given with ``--set`` go before them.
    """

    name: str
    preparation: Mapping[str, Any]
    settings: Mapping[str, Any]


def list_recipes() -> list[str]:
    """Names of all recipes."""
    entries = [entry for entry in files("stunet.plans").iterdir() if entry.name.endswith(".json")]
    contents = {entry.name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8")) for entry in entries}
    return sorted(name for name, content in contents.items() if "preparation" in content)


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        PlansError: There is no such recipe.
    """
    if name not in list_recipes():
        raise PlansError(
            "unknown preset",
            got=name,
            expected=f"one of {', '.join(list_recipes())}",
            remedy="Correct --preset, or leave it out for nnU-Net's own planning.",
        )
    content = json.loads((files("stunet.plans") / f"{name}.json").read_text(encoding="utf-8"))
    check_settings(content["settings"], source=f"preset {name}")
    return Recipe(name, content["preparation"], content["settings"])


def apply_recipe(plans: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A dataset's plans with one configuration, ``3d_fullres``, as the recipe wants it.

    Images are prepared differently from what nnU-Net has planned, so the configuration has a data identifier of its
    own: all sizes of network share it, and nothing that is preprocessed already is touched.

    Args:
        plans: nnU-Net's plans of the dataset; not changed.
        recipe: The recipe.

    Returns:
        Plans whose architecture has strides only; :func:`stunet.planning.rewrite_plans` puts the network there.

    Raises:
        PlansError: Not plans of nnU-Net v2.
    """
    check_plans(plans, source=str(plans.get("plans_name")))
    backward = plans["transpose_backward"]
    spacing = [plans["original_median_spacing_after_transp"][axis] for axis in backward]
    shape = [plans["original_median_shape_after_transp"][axis] for axis in backward]
    target = recipe.preparation["spacing"]
    n_channels = len(plans["foreground_intensity_properties_per_channel"])
    preparation = Preparation(
        spacing=list(target),
        patch_size=list(recipe.preparation["patch_size"]),
        batch_size=recipe.preparation["batch_size"],
        batch_dice=recipe.preparation["batch_dice"],
        median_shape=[float(n * s / t) for n, s, t in zip(shape, spacing, target, strict=True)],
        median_spacing=spacing,
        strides=[list(stride) for stride in recipe.preparation["strides"]],
        normalization_schemes=[recipe.preparation["normalization_scheme"]] * n_channels,
        use_mask_for_norm=[recipe.preparation["use_mask_for_norm"]] * n_channels,
    )
    return {
        **plans,
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": shape,
        "transpose_forward": preparation.transpose_forward,
        "transpose_backward": preparation.transpose_backward,
        "configurations": {CONFIGURATION: configuration_for(preparation, f"STUNetPlans_{recipe.name}_{CONFIGURATION}")},
    }
