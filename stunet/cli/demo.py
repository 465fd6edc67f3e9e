"""``stunet demo``: pre-train, pick, fine-tune and predict, through the commands that a user types."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from stunet.cli.options import Device, complete_sizes

__all__ = ["demo"]


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything; must not exist.")] = Path(
        "stunet_demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Train on an nnU-Net raw dataset of your own instead, and predict unseen cases.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="small, base, large or huge; a narrow network by default, for speed.", autocompletion=complete_sizes
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of 40 iterations of the first training.", min=1)] = 24,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of all that is random; the same figures on one machine.", min=0)] = 0,
) -> None:
    """Pre-train a STU-Net, pick the best checkpoint for another dataset, fine-tune it and predict unseen cases.

    On generated phantoms: in the first dataset a third of the masks is missing, not annotated and not background; the
    second one has three labelled cases, another contrast and new structures. Fine-tuning is compared with training
    from scratch. Every step is a command of nnU-Net or of this package, printed as you would type it, and one page
    shows the results.
    """
    from stunet.cli.console import stdout
    from stunet.cli.demo_story import tell_story
    from stunet.cli.demo_training import train_on_data
    from stunet.cli.demo_workspace import Workspace
    from stunet.cli.options import choose_device, choose_size

    started = time.monotonic()
    if size is not None:
        choose_size(size, None, None)
    network = ["--size", size] if size else ["--depth", "1", "--width", "8"]
    chosen_device = choose_device(device)
    if data is None:
        workspace = Workspace.make(output)
        tell_story(workspace, network=network, epochs=epochs, device=chosen_device, seed=seed)
    else:
        workspace = train_on_data(data, output, network=network, epochs=epochs, device=chosen_device, seed=seed)
    stdout.print(f"Whole output: {workspace.log}", highlight=False, soft_wrap=True)
    stdout.print(f"Finished in {time.monotonic() - started:.0f} s.", highlight=False)
