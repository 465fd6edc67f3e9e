"""Plans that start a training from the weights of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.errors import PlansError
from stunet.labels import outputs_of
from stunet.planning.rewrite import has_own_architecture, resolve_configuration
from stunet.settings import SETTINGS_KEY, Strategy
from stunet.weights import HeadPolicy, SourceWeights, StemPolicy, TransferReport, transfer_weights

__all__ = ["fine_tuning_configurations", "fine_tuning_settings", "preview_transfer"]

#: The published recipe's learning rate for fine-tuning, all layers alike (arXiv 2304.06716).
_INITIAL_LR = 1e-3


def fine_tuning_settings(weights: SourceWeights, strategy: Strategy) -> dict[str, Any]:
    """Settings with which a trainer of this package starts from weights.

    Args:
        weights: The weights; the plans will name their file.
        strategy: How to fine-tune.
    """
    return {"pretrained_weights": str(weights.path.resolve()), "fine_tune": strategy, "initial_lr": _INITIAL_LR}


def fine_tuning_configurations(plans: Mapping[str, Any], weights: SourceWeights) -> list[str]:
    """Configurations that have an architecture of their own with as many axes as the weights.

    Raises:
        PlansError: There is none.
    """
    n_axes = weights.architecture.n_axes
    own = [name for name, configuration in plans["configurations"].items() if has_own_architecture(configuration)]
    fitting = [name for name in own if len(resolve_configuration(dict(plans), name)["patch_size"]) == n_axes]
    if not fitting:
        raise PlansError(
            f"no configuration for {n_axes}D weights",
            got=f"{weights.path}, and plans with {', '.join(own) or 'no network'}",
            expected=f"a {n_axes}D configuration",
            remedy="Give other weights, or other plans with --plans.",
        )
    return fitting


def preview_transfer(
    weights: SourceWeights, plans: Mapping[str, Any], configurations: Sequence[str], dataset_json: Mapping[str, Any]
) -> TransferReport:
    """What a training with these plans will take from the weights, without building a network in memory.

    Args:
        weights: The weights.
        plans: Plans with a STU-Net and the settings of :func:`fine_tuning_settings`.
        configurations: Configurations to check; the report is of the first one.
        dataset_json: The target's ``dataset.json``.

    Raises:
        CheckpointError: The weights do not fit a configuration: other axes, or another size.
    """
    manager = PlansManager(dict(plans))
    outputs = outputs_of(dataset_json)
    reports = []
    for name in configurations:
        configuration = resolve_configuration(dict(plans), name)
        settings = configuration.get(SETTINGS_KEY, {})
        target = replace(
            weights.architecture,
            input_channels=determine_num_input_channels(manager, manager.get_configuration(name), dict(dataset_json)),
            num_classes=len(outputs.names),
            n_axes=len(configuration["patch_size"]),
        )
        reports.append(
            transfer_weights(
                weights,
                target.build_on_meta(),
                outputs,
                stem=cast(StemPolicy, settings.get("stem", "repeat-scaled")),
                head=cast(HeadPolicy, settings.get("head", "by-name")),
            )
        )
    return reports[0]
