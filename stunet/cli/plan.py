"""``stunet plan``: plans files with a STU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stunet.cli.console import PlainTable, stdout
from stunet.cli.convert import find_fetched
from stunet.cli.options import Settings, StrategyOption, choose_size, complete_presets, complete_sizes, complete_weights
from stunet.environment import find_dataset, nnunet_folder
from stunet.settings import SETTINGS, SETTINGS_KEY, parse_settings

__all__ = ["plan"]


def plan(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    size: Annotated[
        str | None, typer.Option(help="small, base, large or huge; base by default.", autocompletion=complete_sizes)
    ] = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", "--configurations", help="Configurations to rewrite; all by default. Takes several."),
    ] = None,
    plans: Annotated[str, typer.Option("--plans", "-p", help="The plans to start from.")] = "nnUNetPlans",
    settings: Settings = None,
    depth: Annotated[str | None, typer.Option(help="Blocks of six stages, for example 1,1,2,2,2,2.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, for example 24.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Weights to start from, file or fetched name; they decide the size.",
            autocompletion=complete_weights,
        ),
    ] = None,
    strategy: StrategyOption = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A pre-training preset in place of nnU-Net's planning: totalsegmentator.",
            autocompletion=complete_presets,
        ),
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
    # What needs no PyTorch is checked before it is imported.
    choose_size(size, depth, width)
    parse_settings(settings or [])
    find_dataset(dataset)
    if source is not None:
        find_fetched([source])
    from stunet.cli.preflight import preflight

    preflight(dataset, plans=plans, writes=nnunet_folder("nnUNet_preprocessed"))
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
    _report(made.plans, made.path, preset, written=made.written)
    if made.transfer is not None:
        print_transfer(made.transfer)


def _report(plans: dict[str, Any], path: Path, preset: str | None, *, written: bool) -> None:
    from stunet.errors import PlansError
    from stunet.planning import is_stunet, plans_size, resolve_configuration

    table = PlainTable("configuration", "network", "patch", "batch", "strides", numbers=("batch",))
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
    for line in _next_commands(plans, path, "3d_fullres" if "3d_fullres" in trainable else trainable[0], preset):
        stdout.print(line, soft_wrap=True, highlight=False, markup=False)


def _next_commands(plans: dict[str, Any], path: Path, configuration: str, preset: str | None) -> list[str]:
    from stunet.planning import plans_size, resolve_configuration
    from stunet.sizes import SIZES

    trainer = "STUNetTrainer"
    if preset is not None:
        size = plans_size(resolve_configuration(plans, configuration)).name
        trainer = f"STUNetTrainer_{size}_pretrain" if size in SIZES else "STUNetTrainer_pretrain"
    dataset_id, plans_name = int(plans["dataset_name"][7:10]), plans["plans_name"]
    lines = ["Next:"]
    if not (path.parent / resolve_configuration(plans, configuration)["data_identifier"]).is_dir():
        lines.append(f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c {configuration}")
    train = f"nnUNetv2_train {dataset_id} {configuration} 0 -p {plans_name}"
    lines.append(f'  eval "$(stunet env)"; {train} -tr {trainer}')
    if not resolve_configuration(plans, configuration).get(SETTINGS_KEY):  # which nnU-Net's own trainer does not read
        lines.append(f"or, with nnU-Net's own trainer:\n  {train}")
    return lines


def _print_settings(wanted: bool) -> None:
    if not wanted:
        return
    titles = {True: "Read by STUNetTrainer", False: "For any trainer; by default the values of nnU-Net's plans"}
    for of_training, title in titles.items():
        table = PlainTable("setting", "default", "what it does", title=title)
        for name, setting in SETTINGS.items():
            if (setting.place == "training") is of_training:
                values = f": {', '.join(setting.choices)}" if setting.choices[2:] else ""
                default = "" if setting.default is None else f"{setting.default}".lower()
                table.add_row(name, default, setting.help + values)
        stdout.print(table)
        stdout.print()
    stdout.print("Type them as --set num_epochs=500 patch_size=96,160,160; booleans are true or false.")
    raise typer.Exit
