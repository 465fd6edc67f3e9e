"""``stunet plan``: plans files with a STU-Net."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Context, Option

from stunet.cli import options
from stunet.cli.console import print_line, print_table, stdout
from stunet.environment import find_plans, nnunet_folder
from stunet.errors import DatasetError, PlansError, UsageError, reading
from stunet.files import read_json
from stunet.settings import SETTINGS, SETTINGS_KEY, PretextName, parse_settings
from stunet.sizes import SIZES
from stunet.weights.published import cached_weights


def _print_settings(wanted: bool) -> None:
    if not wanted:
        return
    titles = {True: "Read by STUNetTrainer", False: "For any trainer; by default the values of nnU-Net's plans"}
    for of_training, title in titles.items():
        rows = []
        for name, setting in SETTINGS.items():
            if (setting.place == "training") is of_training:
                values = f": {', '.join(setting.choices)}" if setting.choices[2:] else ""
                default = "" if setting.default is None else f"{setting.default}".lower()
                rows.append((name, default, setting.help + values))
        print_table(rows, "setting", "default", "what it does", title=title)
        stdout.print()
    stdout.print("Type them as --set num_epochs=500 patch_size=96,160,160; booleans are true or false.")
    raise typer.Exit


def _print_pretexts(wanted: bool) -> None:
    if not wanted:
        return
    from stunet.pretexts import PRETEXTS

    rows = [(name, task.family, ", ".join(task.trains), task.source) for name, task in PRETEXTS.items()]
    print_table(rows, "pretext", "family", "trains", "source")
    stdout.print("Their settings, which --list-settings shows, are typed as --set mask_ratio=0.6.")
    raise typer.Exit


def plan(
    context: Context,
    dataset: options.Dataset,
    size: options.Size = None,
    configurations: Annotated[list[str] | None, Option("-c", "--configurations")] = None,
    plans: options.Plans = "nnUNetPlans",
    settings: options.Settings = None,
    depth: str | None = None,
    width: int | None = None,
    source: Annotated[Path | None, Option("--from", autocompletion=options.complete_weights)] = None,
    strategy: options.StrategyOption = None,
    preset: Annotated[str | None, Option(autocompletion=options.complete_presets)] = None,
    pretext: Annotated[PretextName | None, Option()] = None,
    name: str | None = None,
    overwrite: bool = False,
    trust: options.Trust = None,
    num_processes: options.Processes = 8,
    list_settings: Annotated[bool, Option(callback=_print_settings, is_eager=True)] = False,
    list_pretexts: Annotated[bool, Option(callback=_print_pretexts, is_eager=True)] = False,
) -> Path:
    """Write plans with a STU-Net beside nnU-Net's, which they are made from; preprocessed data is used again.

    Where nnU-Net has not planned the dataset yet, its own planner runs first.

    Options:
        size: small, base, large or huge; base by default.
        configurations: Configurations to rewrite; all by default. Takes several.
        depth: Blocks of six stages, for example 1,1,2,2,2,2.
        width: Channels of the first stage, for example 24.
        source: Weights to start from, file or fetched name; they decide the size.
        preset: A pre-training preset in place of nnU-Net's planning: totalsegmentator.
        pretext: Task to pre-train by without labels, see --list-pretexts.
        name: Name of the new plans; STUNetPlans_SIZE by default, with --from …_SIZE_ft.
        overwrite: Replace plans that differ.
        num_processes: Processes for nnU-Net's fingerprint.
        list_settings: Show the settings that --set takes and leave.
        list_pretexts: Show the tasks that --pretext takes and leave.
    """
    # What needs no PyTorch is checked before it is imported.
    if preset is not None and preset not in (presets := options.complete_presets()):
        raise UsageError(f"--preset {preset} is none that prepares images: choose one of {', '.join(presets)}")
    asked = options.choose_size(size, depth, width)
    given = parse_settings(settings or []) | ({"pretext": pretext} if pretext else {})
    path_of_weights = None if source is None else cached_weights(source)
    if strategy is not None and source is None:
        raise UsageError(f"--strategy {strategy} without weights to start from: give them with --from, or leave it out")
    dataset_name = options.preflight(dataset, plans)
    options.check_disk(nnunet_folder("nnUNet_preprocessed"))
    from stunet.planning import plans as planning
    from stunet.weights.convert import open_weights

    weights = None if path_of_weights is None else open_weights([path_of_weights], trust=trust or [])
    if weights is not None and (size, depth, width) != (None, None, None) and asked != weights.architecture.size:
        theirs = f"{weights.architecture.size.name} of {weights.path}"
        raise UsageError(f"a size that is not that of the weights: {asked.name} for {theirs}; leave it out")
    network = weights.architecture.size if weights else asked
    chosen: dict[str, Any] = {} if preset is None else planning.load_preset(preset)["settings"]
    if network.name in SIZES:
        chosen |= planning.load_preset(network.name)["settings"]
    if weights is not None:
        chosen |= planning.fine_tuning_settings(weights, strategy or given.get("fine_tune", "full"))
        given |= {"fine_tune": strategy} if strategy else {}
    parts = [
        "STUNetPlans",
        network.name,
        preset,
        pretext,
        "ft" if weights else None,
        strategy if strategy != "full" else None,
    ]
    path = find_plans(dataset_name, name or "_".join(part for part in parts if part))
    nnunets = find_plans(dataset_name, plans)
    if path == nnunets:
        raise UsageError(f"--name {name} is that of the plans they are made from: give another name than {plans}")
    if not nnunets.is_file():
        planning.plan_with_nnunet(dataset_name, plans, num_processes=num_processes)
    planned = planning.load_plans(nnunets)
    if preset is not None:
        planned = planning.apply_preset(planned, preset)
    if weights is not None:
        configurations = configurations or planning.fine_tuning_configurations(planned, weights)
    content = planning.rewrite_plans(
        planned, size=network, plans_name=path.stem, configurations=configurations, settings=chosen | given
    )
    report = None
    if weights is not None and configurations:
        described = path.parent / "dataset.json"
        with reading(described, "a description that cannot be read", DatasetError, "preprocess the dataset again"):
            dataset_json = read_json(described)
        report = planning.preview_transfer(weights, content, configurations, dataset_json)
    written = planning.write_plans(content, path, overwrite=overwrite)
    print_line(f"{'Wrote' if written else 'Already there, unchanged:'} {path}")
    trainable = _print_configurations(content)
    if context.info_name == "plan":  # stunet finetune does what comes next
        _print_next(path, trainable, pretraining=preset is not None)
    if report is not None:
        print_table(report.rows(), title=f"From {report.source}")
    return path


def _print_configurations(plans: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Show all configurations and their settings, and return those with a STU-Net."""
    from stunet.planning.plans import is_stunet, plans_size, resolve_configuration

    rows: list[tuple[object, ...]] = []
    trainable: dict[str, dict[str, Any]] = {}
    settings: dict[str, list[str]] = {}
    for name in plans["configurations"]:
        try:
            resolved = resolve_configuration(plans, name)
        except PlansError:  # of a kind that we leave alone
            rows.append((name, "no STU-Net", "", "", ""))
            continue
        network = f"{resolved['architecture']['network_class_name'].rsplit('.')[-1]}, no STU-Net"
        if is_stunet(resolved):
            network = f"STU-Net {plans_size(resolved).name}"
            trainable[name] = resolved
            line = " ".join(f"{key}={value}" for key, value in resolved.get(SETTINGS_KEY, {}).items())
            settings.setdefault(line, []).append(name)
        patch = "x".join(map(str, resolved["patch_size"]))
        strides = ("".join(map(str, stride)) for stride in resolved["architecture"]["arch_kwargs"]["strides"])
        rows.append((name, network, patch, resolved["batch_size"], " ".join(strides)))
    print_table(rows, "configuration", "network", "patch", "batch", "strides", numbers=["batch"])
    for line, names in settings.items():
        if line:
            print_line(f"Settings of {', '.join(names)}: {line}")
    return trainable


def _print_next(path: Path, trainable: dict[str, dict[str, Any]], *, pretraining: bool) -> None:
    from stunet.planning.plans import plans_size

    name = "3d_fullres" if "3d_fullres" in trainable else next(iter(trainable))
    size, trainer = plans_size(trainable[name]).name, "STUNetTrainer"
    if trainable[name].get(SETTINGS_KEY, {}).get("pretext"):
        trainer = "STUNetTrainer_pretext"
    elif pretraining:
        trainer = f"STUNetTrainer_{size}_pretrain" if size in SIZES else "STUNetTrainer_pretrain"
    dataset_id, plans_name = int(path.parent.name[7:10]), path.stem
    print_line("Next:")
    if not (path.parent / trainable[name]["data_identifier"]).is_dir():
        print_line(f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c {name}")
    fold = "all" if trainer.endswith("_pretext") else "0"
    train = f"nnUNetv2_train {dataset_id} {name} {fold} -p {plans_name}"
    print_line(f'  eval "$(stunet env)"; {train} -tr {trainer}')
    if not trainable[name].get(SETTINGS_KEY):  # which nnU-Net's own trainer does not read
        print_line(f"or, with nnU-Net's own trainer:\n  {train}")
