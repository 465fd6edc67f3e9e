"""``stunet plan``: plans files with a STU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["plan"]


def plan(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    size: Annotated[str | None, typer.Option(help="small, base, large or huge; base by default.")] = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configurations", help="Configurations to rewrite; all by default. Takes several."),
    ] = None,
    plans: Annotated[str, typer.Option("--plans", "-p", help="The plans to start from.")] = "nnUNetPlans",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings, name=value. Takes several. See --list-settings.")
    ] = None,
    depth: Annotated[str | None, typer.Option(help="Blocks of six stages, for example 1,1,2,2,2,2.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, for example 24.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Weights to start from, file or fetched name; they decide the size."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="With --from: full (default), warmup, layerwise, frozen-encoder or head-only."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A pre-training recipe in the place of nnU-Net's planning: totalsegmentator."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the new plans; STUNetPlans_SIZE by default, with --from …_SIZE_ft.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace plans that differ.")] = False,
    trust: Annotated[
        list[str] | None, typer.Option("--trust", help="A network class of others' that may be imported. Repeatable.")
    ] = None,
    num_processes: Annotated[int, typer.Option("-np", help="Processes for nnU-Net's fingerprint.", min=1)] = 8,
    list_settings: Annotated[
        bool,
        typer.Option(
            "--list-settings",
            callback=lambda wanted: _print_settings(wanted),
            is_eager=True,
            help="Show the settings that --set takes and leave.",
        ),
    ] = False,
) -> None:
    """Write plans with a STU-Net beside nnU-Net's, which they are made from; preprocessed data is used again.

    Where nnU-Net has not planned the dataset yet, its own planner runs first.
    """
    from stunet.cli.plan_steps import PlanRequest, make_plans_file, print_transfer

    made = make_plans_file(
        PlanRequest(
            dataset=dataset,
            size=size,
            depth=depth,
            width=width,
            configurations=configurations,
            plans=plans,
            settings=settings or [],
            source=source,
            strategy=strategy,
            preset=preset,
            name=name,
            overwrite=overwrite,
            num_processes=num_processes,
            trust=trust or [],
        )
    )
    _report(made.plans, made.path, written=made.written)
    if made.transfer is not None:
        print_transfer(made.transfer)


def _report(plans: dict[str, Any], path: Path, *, written: bool) -> None:
    from rich.table import Table

    from stunet.cli.console import stdout
    from stunet.errors import PlansError
    from stunet.planning import SETTINGS_KEY, is_stunet, plans_size, resolve_configuration

    table = Table("configuration", "network", "patch", "batch", "strides")
    trainable: list[str] = []
    settings: dict[str, list[str]] = {}
    for name in plans["configurations"]:
        try:
            resolved = resolve_configuration(plans, name)
        except PlansError:  # of a kind that we leave alone
            table.add_row(name, "no STU-Net", "", "", "")
            continue
        network = f"{resolved['architecture']['network_class_name'].rsplit('.')[-1]}, no STU-Net"
        if is_stunet(resolved):
            network = f"STU-Net {plans_size(resolved).name}"
            trainable.append(name)
            line = " ".join(f"{key}={value}" for key, value in resolved.get(SETTINGS_KEY, {}).items())
            settings.setdefault(line, []).append(name)
        strides = resolved["architecture"]["arch_kwargs"]["strides"]
        table.add_row(
            name,
            network,
            "x".join(map(str, resolved["patch_size"])),
            str(resolved["batch_size"]),
            " ".join("".join(map(str, stride)) for stride in strides),
        )
    stdout.print(f"{'Wrote' if written else 'Already there, unchanged:'} {path}", soft_wrap=True, highlight=False)
    stdout.print(table)
    for line, names in settings.items():
        if line:
            stdout.print(f"Settings of {', '.join(names)}: {line}", soft_wrap=True, highlight=False)
    for line in _next_commands(plans, path, "3d_fullres" if "3d_fullres" in trainable else trainable[0]):
        stdout.print(line, soft_wrap=True, highlight=False, markup=False)


def _next_commands(plans: dict[str, Any], path: Path, configuration: str) -> list[str]:
    from stunet.planning import SETTINGS_KEY, resolve_configuration

    dataset_id, plans_name = int(plans["dataset_name"][7:10]), plans["plans_name"]
    lines = ["Next:"]
    if not (path.parent / resolve_configuration(plans, configuration)["data_identifier"]).is_dir():
        lines.append(f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c {configuration}")
    train = f"nnUNetv2_train {dataset_id} {configuration} 0 -p {plans_name}"
    lines.append(f'  eval "$(stunet env)"; {train} -tr STUNetTrainer')
    if not resolve_configuration(plans, configuration).get(SETTINGS_KEY):  # which nnU-Net's own trainer does not read
        lines.append(f"or, with nnU-Net's own trainer:\n  {train}")
    return lines


def _print_settings(wanted: bool) -> None:
    if not wanted:
        return
    from rich.table import Table

    from stunet.cli.console import stdout
    from stunet.planning import SETTINGS

    table = Table()
    for column in ("setting", "value", "what it does", "counts with"):
        table.add_column(column, no_wrap=column == "setting", overflow="fold")
    for name, setting in SETTINGS.items():
        trainers = "STUNetTrainer" if setting.place == "training" else "any trainer, given with --set"
        table.add_row(name, setting.expected, setting.help, trainers)
    stdout.print(table)
    raise typer.Exit
