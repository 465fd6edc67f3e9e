"""``stunet info``: what each size costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stunet.cli.options import choose_size, complete_sizes
from stunet.settings import ActivationCheckpointing, MomentumDtype
from stunet.sizes import SIZES

if TYPE_CHECKING:
    from stunet.sizes import STUNetSize

__all__ = ["info"]


def info(
    size: Annotated[
        list[str] | None, typer.Option(help="Sizes; all published ones by default.", autocompletion=complete_sizes)
    ] = None,
    patch: Annotated[str, typer.Option(help="Voxels along each axis, for example 128,128,128.")] = "128,128,128",
    batch: Annotated[int, typer.Option(help="Patches in a training batch.", min=1)] = 2,
    classes: Annotated[int, typer.Option(help="Outputs, background included.", min=1)] = 105,
    channels: Annotated[int, typer.Option(help="Channels of the image.", min=1)] = 1,
    precision: Annotated[
        Literal["amp", "fp32"], typer.Option(help="amp (nnU-Net on CUDA) or fp32 (on a CPU).")
    ] = "amp",
    activation_checkpointing: Annotated[
        ActivationCheckpointing, typer.Option(help="Blocks that compute activations again.")
    ] = "none",
    ranks: Annotated[int, typer.Option(help="Processes, each with a GPU, that share the batch.", min=1)] = 1,
    parallel: Annotated[
        Literal["none", "ddp", "fsdp"] | None, typer.Option(help="ddp by default where there are several processes.")
    ] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Pieces of each process's share of the batch.", min=1)] = 1,
    momentum_dtype: Annotated[MomentumDtype, typer.Option(help="Precision of the momentum.")] = "fp32",
    fused_optimizer: Annotated[bool, typer.Option("--fused-optimizer", help="The optimizer's step in one kernel.")] = (
        False
    ),
    batch_dice: Annotated[
        bool, typer.Option("--batch-dice", help="With --gpu: the plans have batch_dice, so pieces take more time.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of each GPU, for example 24GB: say which settings to train with.")
    ] = None,
    loss: Annotated[
        Literal["stunet", "nnunet"], typer.Option(help="That of STUNetTrainer, or of nnU-Net's own trainer.")
    ] = "stunet",
    depth: Annotated[str | None, typer.Option(help="Blocks of six stages, for a size of your own.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, for a size of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters, multiply-accumulates and estimated memory of each size."""
    patch_size = _parse_patch(patch)
    if depth is None and width is None:
        sizes = [choose_size(name, None, None) for name in size or SIZES]
    else:
        sizes = [choose_size(size[0] if size else None, depth, width)]
    from stunet.cli.advice import advise
    from stunet.network import default_strides

    settings: dict[str, Any] = {
        "patch_size": patch_size,
        "batch_size": batch,
        "num_classes": classes,
        "input_channels": channels,
        "precision": precision,
        "loss": loss,
        "ranks": ranks,
    }
    chosen = {
        "parallel": parallel or ("none" if ranks == 1 else "ddp"),
        "activation_checkpointing": activation_checkpointing,
        "gradient_accumulation": gradient_accumulation,
        "momentum_dtype": momentum_dtype,
        "fused_optimizer": fused_optimizer,
    }
    rows = [_row(s, {**settings, **chosen}) for s in sizes]
    advice = None if gpu is None else [advise(s, gpu, parallel, batch_dice, settings) for s in sizes]
    if as_json:
        if advice is not None:
            rows = [{**row, "recommendation": one.as_dict()} for row, one in zip(rows, advice, strict=True)]
        strides = default_strides(patch_size)
        typer.echo(json.dumps({"settings": {**settings, **chosen, "strides": strides}, "sizes": rows}, indent=2))
        return
    _print_table(rows, {**settings, **chosen})
    _warn_of_strides(patch_size)
    for one in advice or ():
        one.print()


_TRAINERS = {"stunet": "STUNetTrainer", "nnunet": "nnUNetTrainer"}


def _row(size: STUNetSize, settings: dict[str, Any]) -> dict[str, Any]:
    from stunet.memory import estimate

    return {
        "name": size.name,
        "depth": list(size.depth),
        "width": size.width,
        "features": list(size.features),
        **asdict(estimate(size, **settings)),
    }


def _print_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from stunet.cli.console import human_bytes, human_count, stdout

    patch = " x ".join(map(str, settings["patch_size"]))
    table = Table(
        title=f"patch {patch}, batch {settings['batch_size']}, {settings['num_classes']} outputs, "
        f"{settings['precision']}{_deviations(settings)}",
        caption="MACs: forward pass of one patch.\n"
        f"Training: all tensors of a step{'' if settings['ranks'] == 1 else ' in one process'} with "
        f"{_TRAINERS[settings['loss']]}'s loss "
        "and nnU-Net's optimizer.\n"
        "Inference: all tensors of the forward pass of one patch.\n"
        "Not counted: CUDA context, workspaces, fragmentation, and the logits of a whole image.",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("size", "blocks", "channels", "parameters", "MACs", "training", "inference"):
        text = column in ("size", "blocks", "channels")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            " ".join(map(str, row["depth"])),
            f"{row['features'][0]} to {row['features'][-1]}",
            f"{row['parameters'] / 1e6:.1f}M",
            human_count(row["macs"]),
            human_bytes(row["training_bytes"]),
            human_bytes(row["inference_bytes"]),
        )
    stdout.print(table)


def _warn_of_strides(patch_size: list[int]) -> None:
    """Say which axes the stages cannot halve: those after work at full size there, which costs many operations."""
    from stunet.cli.console import stdout
    from stunet.network import default_strides, total_stride

    for n, got in zip(patch_size, total_stride(default_strides(patch_size)), strict=True):
        wanted = next(step for step in (32, 16, 8, 4, 2, 1) if n // step >= 4 or step == 1)
        if got < wanted:
            stdout.print(
                f"warning: {n} voxels are not divisible by {wanted}, so this axis is halved to {n // got} and no "
                f"further: more operations than a patch of {n // wanted * wanted} or {-(-n // wanted) * wanted} takes.",
                highlight=False,
            )
            return


def _deviations(settings: dict[str, Any]) -> str:
    """What is not as it is by default."""
    said = {
        "activation_checkpointing": ("none", "activation checkpointing {}"),
        "gradient_accumulation": (1, "batch in {} pieces"),
        "momentum_dtype": ("fp32", "momentum in {}"),
        "fused_optimizer": (False, "fused optimizer"),
    }
    texts = [text.format(settings[key]) for key, (default, text) in said.items() if settings[key] != default]
    if settings["ranks"] > 1:
        texts.append(f"{settings['parallel']} over {settings['ranks']} processes")
    return "".join(f", {text}" for text in texts)


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
