"""The ``stunet`` command: its subcommands, and how errors are shown."""

from __future__ import annotations

import errno
import io
import sys
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
from stunet.cli.console import ListOptionsCommand, print_error
from stunet.errors import CommandError, STUNetError

__all__ = ["app", "main"]

app = typer.Typer(
    name="stunet",
    help="STU-Net for nnU-Net v2: plan a network of any size, then train and predict with nnU-Net's own commands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan", cls=ListOptionsCommand)(plan.plan)
app.command("info", cls=ListOptionsCommand)(info.info)
app.command("train")(train.train)
app.command("finetune", cls=ListOptionsCommand)(finetune.finetune)
app.command("rank", cls=ListOptionsCommand)(rank.rank)
app.command("rank-eval")(rank_eval.rank_eval)
app.command("evaluate", cls=ListOptionsCommand)(evaluate.evaluate)
app.command("predict", cls=ListOptionsCommand, epilog=predict.EXAMPLES)(predict.predict)
app.command("convert")(convert.convert)
app.command("list", epilog=list_names.EXAMPLES)(list_names.list_names)
app.add_typer(weights.app, name="weights")
app.command("env")(env.env)
app.command("demo")(demo.demo)
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
