"""From the options of ``stunet plan`` and ``stunet finetune`` to a plans file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stunet.cli.console import PlainTable, stdout
from stunet.cli.convert import find_fetched
from stunet.cli.options import choose_size
from stunet.environment import find_dataset, find_plans
from stunet.errors import UsageError
from stunet.network import STUNetSize
from stunet.planning import (
    apply_preset,
    fine_tuning_configurations,
    fine_tuning_settings,
    list_presets,
    load_plans,
    load_preset,
    plan_with_nnunet,
    preview_transfer,
    rewrite_plans,
    write_plans,
)
from stunet.settings import Strategy, parse_settings
from stunet.weights import SourceWeights, TransferReport, open_weights

__all__ = ["MadePlans", "PlanRequest", "make_plans_file", "plans_identifier", "print_transfer"]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What was typed; see the options of ``stunet plan``."""

    dataset: str
    size: str | None = None
    depth: str | None = None
    width: int | None = None
    configurations: list[str] | None = None
    plans: str = "nnUNetPlans"
    settings: list[str] = field(default_factory=list)
    source: Path | None = None
    strategy: str | None = None
    preset: str | None = None
    name: str | None = None
    overwrite: bool = False
    num_processes: int = 8
    trust: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MadePlans:
    """What came of it.

    Attributes:
        dataset_name: For example ``Dataset004_Hippocampus``.
        path: The plans file.
        plans: Its content.
        written: Whether it is new, and not the same as before.
        transfer: What a training will take from the weights; None where it starts from none.
    """

    dataset_name: str
    path: Path
    plans: dict[str, Any]
    written: bool
    transfer: TransferReport | None


def make_plans_file(request: PlanRequest) -> MadePlans:
    """Write the plans; nnU-Net's planner runs first where it has not planned the dataset yet."""
    weights = None
    if request.source is not None:
        weights = open_weights(find_fetched([request.source])[1], trust=request.trust)
    size = _choose_size(request, weights)
    chosen = None if request.preset is None else load_preset(request.preset)
    settings = {**(chosen.settings if chosen else {}), **_settings(request, size, weights)}
    dataset_name = find_dataset(request.dataset)
    source = find_plans(dataset_name, request.plans)
    target = find_plans(dataset_name, plans_identifier(request, size))
    if target == source:
        raise UsageError(
            "new plans under the name of those that they are made from",
            got=f"--name {request.name}",
            expected=f"another name than {request.plans}",
            remedy="Choose another name with --name; the data that nnU-Net has preprocessed is used all the same.",
        )
    if not source.is_file():
        plan_with_nnunet(dataset_name, request.plans, num_processes=request.num_processes)
    planned = load_plans(source)
    if chosen is not None:
        planned = apply_preset(planned, chosen)
    configurations, transfer = request.configurations, None
    if weights is not None:
        configurations = configurations or fine_tuning_configurations(planned, weights)
    rewritten = rewrite_plans(
        planned, size=size, plans_name=target.stem, configurations=configurations, settings=settings
    )
    if weights is not None and configurations:
        dataset_json = json.loads((target.parent / "dataset.json").read_text(encoding="utf-8"))
        transfer = preview_transfer(weights, rewritten, configurations, dataset_json)
    written = write_plans(rewritten, target, overwrite=request.overwrite)
    return MadePlans(dataset_name, target, rewritten, written, transfer)


def plans_identifier(request: PlanRequest, size: STUNetSize) -> str:
    """The name given, or that of size and preset, with ``_ft`` and the strategy where weights are started from."""
    if request.name is not None:
        return request.name
    parts = ["STUNetPlans", size.name]
    if request.preset is not None:
        parts.append(request.preset)
    if request.source is not None:
        parts.append("ft")
    if request.strategy not in (None, "full"):
        parts.append(str(request.strategy))
    return "_".join(parts)


def _choose_size(request: PlanRequest, weights: SourceWeights | None) -> STUNetSize:
    if weights is None:
        return choose_size(request.size, request.depth, request.width)
    size = weights.architecture.size
    if (request.size, request.depth, request.width) != (None, None, None):
        asked = choose_size(request.size, request.depth, request.width)
        if asked != size:
            raise UsageError(
                "a size that is not that of the weights",
                got=f"{asked.name}, and {weights.path} of size {size.name}",
                expected=f"size {size.name}",
                remedy="Leave the size out: the weights decide it.",
            )
    return size


def _settings(request: PlanRequest, size: STUNetSize, weights: SourceWeights | None) -> dict[str, Any]:
    given = parse_settings(request.settings)
    preset = load_preset(size.name).settings if size.name in list_presets() else {}
    if weights is None:
        if request.strategy is not None:
            raise UsageError(
                "a strategy for fine-tuning without weights to start from",
                got=f"--strategy {request.strategy}",
                expected="--from with the weights",
                remedy="Give the weights, or leave --strategy out.",
            )
        return {**preset, **given}
    strategy = request.strategy or given.get("fine_tune", "full")
    return {**preset, **fine_tuning_settings(weights, cast(Strategy, strategy)), **given, "fine_tune": strategy}


def print_transfer(report: TransferReport) -> None:
    """Show what a training will take from the weights."""
    table = PlainTable(title=f"From {report.source}")
    for row in report.rows():
        table.add_row(*row)
    stdout.print(table)
