"""The ``stunet`` command: its subcommands, and how errors are shown."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import stunet
from stunet.cli import (
    convert,
    demo,
    env,
    evaluate,
    finetune,
    imports,
    info,
    labels,
    list_names,
    plan,
    predict,
    rank,
    rank_eval,
    train,
    weights,
)
from stunet.cli.console import Command, Group, examples, print_error
from stunet.errors import CommandError, STUNetError

__all__ = ["app", "main"]

app = typer.Typer(
    name="stunet",
    cls=Group,
    help="STU-Net for nnU-Net v2: plan a network of any size, then train and predict with nnU-Net's own commands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None], *lines: str) -> None:
    app.command(name, cls=Command, epilog=examples(*lines))(command)


_add(
    "plan",
    plan.plan,
    "stunet plan -d 4 --size base --set num_epochs=500 patch_size=96,160,160",
    "stunet plan -d 4 --from small_ep4k --strategy warmup",
)
_add("info", info.info, "stunet info --size small base --patch 96,160,160 --gpu 24GB")
_add("train", train.train, "stunet train 4 3d_fullres 0 -p STUNetPlans_base")
_add(
    "finetune",
    finetune.finetune,
    "stunet finetune -d 4 --from small_ep4k",
    "stunet finetune -d 4 --from small_ep4k --set num_epochs=100 --continue",
)
_add("rank", rank.rank, "stunet rank -d 4 --checkpoints small_ep4k base_ep4k -o ranking")
_add("rank-eval", rank_eval.rank_eval, "stunet rank-eval ranking/ranking.json dice.json")
_add(
    "evaluate",
    evaluate.evaluate,
    "stunet evaluate -d 4 -m MODEL_FOLDER --label-map btcv",
    "stunet evaluate -d 4 --predictions PREDICTIONS --cases case_01,case_07",
)
_add(
    "predict",
    predict.predict,
    "stunet predict -i CT.nii.gz -o CT_labels.nii.gz -m small_ep4k",
    "stunet predict -i DICOM_FOLDER -o OUT -m small_ep4k --statistics --preview",
    "stunet predict -i IMAGES -o OUT -d 4 -f 0 --structures liver --continue",
)
_add("convert", convert.convert, "stunet convert small_ep4k -o MODEL_FOLDER")
_add("list", list_names.list_names, "stunet list", "stunet list --of small_ep4k", "stunet list --of btcv --json")
_add("env", env.env, 'eval "$(stunet env)"')
_add("demo", demo.demo, "stunet demo", "stunet demo --data nnUNet_raw/Dataset004_Hippocampus")
app.add_typer(weights.app, name="weights")
app.add_typer(imports.app, name="import")
app.add_typer(labels.app, name="labels")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stunet {stunet.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of ``stunet`` itself."""


def main() -> None:
    """Run the command line. Our own errors are printed without a traceback, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a letter must not cost what was computed
    try:
        app()
    except STUNetError as error:
        print_error(error)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (*_FULL, *_CLOSED):
            raise
        print_error(_explain(error))
        sys.exit(2)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}


def _explain(error: OSError) -> CommandError:
    full, file = error.errno in _FULL, error.filename2 or error.filename
    return CommandError(
        "no room on the disk" if full else "a file or folder that cannot be used",
        got=f"{file}: {error.strerror}" if file else error.strerror,
        expected="room to write" if full else "a path that may be read and written",
        remedy=f"{'Make room' if full else 'Correct the path or its permissions'}, or choose another place. "
        "Finished files are whole; running the same command again does the rest.",
    )
