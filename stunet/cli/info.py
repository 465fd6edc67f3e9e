"""``stunet info``: what each size costs, and with which settings it can be trained on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from stunet.cli import options
from stunet.cli.console import human_bytes, human_count, print_json, print_line, print_table, stdout
from stunet.cli.options import choose_size
from stunet.errors import ArchitectureError
from stunet.settings import SETTINGS, ActivationCheckpointing, MomentumDtype
from stunet.sizes import SIZES

if TYPE_CHECKING:
    from stunet.memory import Recommendation


def info(
    size: Annotated[list[str] | None, Option(autocompletion=lambda: list(SIZES))] = None,
    patch: str = "128,128,128",
    batch: options.Positive = 2,
    classes: options.Positive = 105,
    channels: options.Positive = 1,
    precision: Literal["amp", "fp32"] = "amp",
    activation_checkpointing: ActivationCheckpointing = "none",
    ranks: options.Positive = 1,
    parallel: Literal["none", "ddp", "fsdp"] | None = None,
    gradient_accumulation: options.Positive = 1,
    momentum_dtype: MomentumDtype = "fp32",
    fused_optimizer: bool = False,
    batch_dice: bool = False,
    gpu: str | None = None,
    loss: Literal["stunet", "nnunet"] = "stunet",
    depth: str | None = None,
    width: int | None = None,
    as_json: options.Json = False,
) -> None:
    """Show parameters, multiply-accumulates and estimated memory of each size.

    Options:
        size: Sizes; all published ones by default.
        patch: Voxels along each axis, for example 128,128,128.
        batch: Patches in a training batch.
        classes: Outputs, background included.
        channels: Channels of the image.
        precision: amp (nnU-Net on CUDA) or fp32 (on a CPU).
        activation_checkpointing: Blocks that compute activations again.
        ranks: Processes, each with a GPU, that share the batch.
        parallel: ddp by default where there are several processes.
        gradient_accumulation: Micro-batches of each process's share of the batch.
        momentum_dtype: Precision of the momentum.
        fused_optimizer: The optimizer's step in one kernel.
        batch_dice: With --gpu: the plans have batch_dice, so micro-batches take more time.
        gpu: Memory of each GPU, for example 24GB: say which settings to train with.
        loss: That of STUNetTrainer, or of nnU-Net's own trainer.
        depth: Blocks of six stages, for a size of your own.
        width: Channels of the first stage, for a size of your own.
    """
    patch_size = _parse_patch(patch)
    names: Iterable[str | None] = size or (SIZES if depth is None and width is None else [None])
    sizes = [choose_size(name, depth, width) for name in names]
    from stunet.memory import estimate, recommend
    from stunet.network import default_strides

    settings: dict[str, Any] = {"patch_size": patch_size, "batch_size": batch, "num_classes": classes}
    settings |= {"input_channels": channels, "precision": precision, "loss": loss, "ranks": ranks}
    chosen = settings | {"activation_checkpointing": activation_checkpointing, "momentum_dtype": momentum_dtype}
    chosen |= {"gradient_accumulation": gradient_accumulation, "fused_optimizer": fused_optimizer}
    chosen["parallel"] = parallel or ("none" if ranks == 1 else "ddp")
    rows = [{**asdict(s), "features": s.features, **asdict(estimate(s, **chosen))} for s in sizes]
    gpu_bytes, found = 0, []
    if gpu is not None:
        from stunet.inference import parse_memory

        gpu_bytes = parse_memory(gpu, "--gpu")
        found = [recommend(s, gpu_bytes, parallel=parallel, batch_dice=batch_dice, **settings) for s in sizes]
    if as_json:
        for row, one in zip(rows, found, strict=False):
            # Where nothing fits, "least" are the settings that need least memory.
            given = {"settings": None, "least": None, "settings" if one.fits else "least": one.settings}
            needed = one.estimate.training_bytes
            row["recommendation"] = {"gpu_bytes": gpu_bytes, "fits": one.fits, **given, "training_bytes": needed}
        content = {"settings": {**chosen, "strides": default_strides(patch_size)}, "sizes": rows}
        print_json(content)
        return
    _print_table(rows, chosen)
    _warn_of_strides(patch_size)
    for s, one in zip(sizes, found, strict=False):
        _print_recommendation(s.name, one, gpu_bytes, ranks)


def _parse_patch(text: str) -> list[int]:
    patch_size = [int(n) if n.strip().isdecimal() else 0 for n in text.replace("x", ",").split(",")]
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ArchitectureError(f"impossible patch {text}: give 2 or 3 positive whole numbers, such as 128,128,128")
    return patch_size


def _print_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    patch = " x ".join(map(str, settings["patch_size"]))
    title = f"patch {patch}, batch {settings['batch_size']}, {settings['num_classes']} outputs, {settings['precision']}"
    tuned = ("activation_checkpointing", "momentum_dtype", "gradient_accumulation", "fused_optimizer")
    defaults = {name: SETTINGS[name].default for name in tuned} | {"ranks": 1, "parallel": "none"}
    title += "".join(f", {name} {settings[name]}" for name, value in defaults.items() if settings[name] != value)
    trainer = {"stunet": "STUNetTrainer", "nnunet": "nnUNetTrainer"}[settings["loss"]]
    where = "" if settings["ranks"] == 1 else " in one process"
    caption = (
        "MACs: forward pass of one patch.\n"
        f"Training: all tensors of a step{where} with {trainer}'s loss and nnU-Net's optimizer.\n"
        "Inference: all tensors of the forward pass of one patch.\n"
        "Not counted: CUDA context, workspaces, fragmentation, and the logits of a whole image."
    )
    numbers, shown = ("parameters", "MACs", "training", "inference"), []
    for row in rows:
        cells = [row["name"], " ".join(map(str, row["depth"])), f"{row['features'][0]} to {row['features'][-1]}"]
        cells += [f"{row['parameters'] / 1e6:.1f}M", human_count(row["macs"])]
        shown.append([*cells, human_bytes(row["training_bytes"]), human_bytes(row["inference_bytes"])])
    print_table(shown, "size", "blocks", "channels", *numbers, title=title, caption=caption, numbers=numbers)


def _warn_of_strides(patch_size: list[int]) -> None:
    """Say which axis the stages cannot halve: those after work at full size there, which costs many operations."""
    from stunet.network import default_strides, total_stride

    for n, got in zip(patch_size, total_stride(default_strides(patch_size)), strict=True):
        wanted = next(step for step in (32, 16, 8, 4, 2, 1) if n // step >= 4 or step == 1)
        if got < wanted:
            stdout.print(
                f"warning: {n} voxels are not divisible by {wanted}, so this axis is halved to {n // got} and no "
                f"further: more operations than a patch of {n // wanted * wanted} or {-(-n // wanted) * wanted} takes."
            )
            return


def _print_recommendation(size: str, found: Recommendation, gpu_bytes: int, ranks: int) -> None:
    from stunet.memory import USABLE_SHARE

    needed, usable = found.estimate.training_bytes, USABLE_SHARE * gpu_bytes
    assigned = " ".join(f"{name}={value}".replace("=True", "=true") for name, value in found.settings.items())
    typed = f"--set {assigned}" if assigned else "none needed"
    share = f"needs {human_bytes(needed)}, {human_bytes(usable)} usable"
    text = f"{typed}  ({share})"
    if not found.fits:
        more = "" if ranks > 1 else ", or several GPUs (--ranks)"
        text = f"does not fit, {human_bytes(needed - usable)} too little even with {typed} ({share})."
        text += f" Take a smaller patch or size{more}."
    print_line(f"{size} on {human_bytes(gpu_bytes)}: {text}")
