"""``stunet info``: what each size costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stunet.network import STUNetSize

__all__ = ["info"]


def info(
    size: Annotated[list[str] | None, typer.Option(help="Sizes; all published ones by default.")] = None,
    patch: Annotated[str, typer.Option(help="Voxels along each axis, for example 128,128,128.")] = "128,128,128",
    batch: Annotated[int, typer.Option(help="Patches in a training batch.", min=1)] = 2,
    classes: Annotated[int, typer.Option(help="Outputs, background included.", min=1)] = 105,
    channels: Annotated[int, typer.Option(help="Channels of the image.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="amp (nnU-Net on CUDA) or fp32 (on a CPU).")] = "amp",
    activation_checkpointing: Annotated[str, typer.Option(help="none, encoder or all.")] = "none",
    loss: Annotated[str, typer.Option(help="stunet (STUNetTrainer) or nnunet (nnU-Net's own trainer).")] = "stunet",
    depth: Annotated[str | None, typer.Option(help="Blocks of six stages, for a size of your own.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, for a size of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters, multiply-accumulates and estimated memory of each size."""
    from stunet.cli.sizes import choose_size
    from stunet.network import SIZES

    patch_size = _parse_patch(patch)
    _check_choice("precision", precision, ("fp32", "amp"))
    _check_choice("loss", loss, ("stunet", "nnunet"))
    if depth is None and width is None:
        sizes = [choose_size(name, None, None) for name in size or SIZES]
    else:
        sizes = [choose_size(size[0] if size else None, depth, width)]
    settings: dict[str, Any] = {
        "patch_size": patch_size,
        "batch_size": batch,
        "num_classes": classes,
        "input_channels": channels,
        "precision": precision,
        "activation_checkpointing": activation_checkpointing,
        "loss": loss,
    }
    rows = [_row(s, settings) for s in sizes]
    if as_json:
        typer.echo(json.dumps({"settings": settings, "sizes": rows}, indent=2))
    else:
        _print_table(rows, settings)


_TRAINERS = {"stunet": "STUNetTrainer", "nnunet": "nnUNetTrainer"}


def _row(size: STUNetSize, settings: dict[str, Any]) -> dict[str, Any]:
    from stunet.network import estimate

    return {
        "name": size.name,
        "depth": list(size.depth),
        "width": size.width,
        "features": list(size.features),
        **asdict(estimate(size, **settings)),
    }


def _print_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    from rich.table import Table

    from stunet.cli.console import human_bytes, human_count, stdout

    patch = " x ".join(map(str, settings["patch_size"]))
    table = Table(
        title=f"patch {patch}, batch {settings['batch_size']}, {settings['num_classes']} outputs, "
        f"{settings['precision']}, activation checkpointing {settings['activation_checkpointing']}",
        caption="MACs: forward pass of one patch.\n"
        f"Training: all tensors of a step with {_TRAINERS[settings['loss']]}'s loss "
        "and nnU-Net's optimizer.\n"
        "Inference: all tensors of the forward pass of one patch.\n"
        "Not counted: CUDA context, workspaces, fragmentation, and the logits of a whole image.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("size", "blocks", "channels", "parameters", "MACs", "training", "inference"):
        text = column in ("size", "blocks", "channels")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            " ".join(map(str, row["depth"])),
            " ".join(map(str, row["features"])),
            f"{row['parameters'] / 1e6:.1f}M",
            human_count(row["macs"]),
            human_bytes(row["training_bytes"]),
            human_bytes(row["inference_bytes"]),
        )
    stdout.print(table)


def _parse_patch(text: str) -> list[int]:
    from stunet.errors import ArchitectureError

    try:
        patch_size = [int(n) for n in text.replace("x", ",").split(",")]
    except ValueError:
        patch_size = []
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ArchitectureError(
            "impossible patch",
            got=text,
            expected="2 or 3 positive whole numbers, for example 128,128,128",
            remedy="Correct --patch.",
        )
    return patch_size


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    from stunet.errors import UsageError

    if value not in choices:
        raise UsageError(
            f"unknown {name}",
            got=value,
            expected=f"one of {', '.join(choices)}",
            remedy=f"Correct --{name}.",
        )
