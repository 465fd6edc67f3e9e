"""The ``stunet`` command: its subcommands, and how errors are shown.

Their help ends with these examples::

    stunet plan -d 4 --size base --set num_epochs=500 patch_size=96,160,160
    stunet plan -d 4 --from small_ep4k --strategy warmup
    stunet plan -d 900 --size base --pretext mae
    stunet info --size small base --patch 96,160,160 --gpu 24GB
    stunet train 4 3d_fullres 0 -p STUNetPlans_base
    stunet finetune -d 4 --from small_ep4k
    stunet finetune -d 4 --from small_ep4k --set num_epochs=100 --continue
    stunet rank -d 4 --checkpoints small_ep4k base_ep4k -o ranking
    stunet rank-eval ranking/ranking.json dice.json
    stunet evaluate -d 4 -m MODEL_FOLDER --label-map btcv
    stunet evaluate -d 4 --predictions PREDICTIONS --cases case_01,case_07
    stunet predict -i CT.nii.gz -o CT_labels.nii.gz -m small_ep4k
    stunet predict -i DICOM_FOLDER -o OUT -m small_ep4k --statistics --preview
    stunet predict -i IMAGES -o OUT -d 4 -f 0 --structures liver --continue
    stunet convert small_ep4k -o MODEL_FOLDER
    stunet list
    stunet list --of small_ep4k
    stunet list --of btcv --json
    eval "$(stunet env)"
    stunet demo
    stunet demo --data nnUNet_raw/Dataset004_Hippocampus
    stunet weights list
    stunet weights list --json
    stunet weights fetch small_ep4k
    stunet study plan study.yaml -o STUDY
    stunet study run STUDY --jobs 2
    stunet study run STUDY --slurm partition=gpu,timeout_min=600
    stunet study report STUDY
    stunet weights verify
    stunet weights verify small_ep4k small_ep4k.model
    stunet import totalsegmentator Totalsegmentator_v2 -d 101
    stunet import totalsegmentator Totalsegmentator_v2 -d 102 --group ribs
    stunet import images FOLDER -d 900
    stunet import union -d 110 --from 101 4 --dry-run > mapping.yaml
    stunet import union -d 110 --from 101 4 --mapping mapping.yaml
    stunet labels check -d 4
    stunet labels carry -d 4
"""

import errno
import io
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import stunet
from stunet.cli import import_datasets, labels, study, weights
from stunet.cli.console import Command, Group, print_error
from stunet.cli.demo import demo
from stunet.cli.env import env
from stunet.cli.evaluate import evaluate
from stunet.cli.finetune import finetune
from stunet.cli.info import info
from stunet.cli.plan import plan
from stunet.cli.predict import predict
from stunet.cli.rank import rank, rank_eval
from stunet.cli.train import train
from stunet.cli.weights import convert, list_names
from stunet.errors import STUNetError

app = typer.Typer(
    name="stunet",
    cls=Group,
    help="STU-Net for nnU-Net v2: plan a network of any size, then train and predict with nnU-Net's own commands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --disable-tta and --disable_tta are one option
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
_command: Callable[..., object]
for _command in (plan, info, train, finetune, rank, rank_eval, evaluate, predict, convert, list_names, env, demo):
    app.command(_command.__name__.removesuffix("_names").replace("_", "-"))(_command)
_groups = {"weights": weights.app, "import": import_datasets.app, "labels": labels.app, "study": study.app}
for _name, _group in {"": app, **_groups}.items():
    if _name:
        app.add_typer(_group, name=_name)
    for _info in _group.registered_commands:
        _typed = re.compile(rf"\bstunet {_name} ?{_info.name}(?![\w-])")
        _lines = [f"$ {line.strip()}" for line in (__doc__ or "").splitlines() if _typed.search(line)]
        _info.cls, _info.epilog = Command, "\n\n".join(["Examples:" if _lines[1:] else "Example:", *_lines])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stunet {stunet.__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")


@app.callback()
def _options(version: Annotated[bool, _VERSION] = False) -> None:
    """Take the options of ``stunet`` itself."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}


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
        if error.errno not in _FULL | _CLOSED:
            raise
        said, remedy = "a file or folder cannot be used", "correct the path or its permissions"
        if error.errno in _FULL:
            said, remedy = "no room on the disk", "make room"
        file = error.filename2 or error.filename
        where = f"{file}: {error.strerror}" if file else error.strerror
        rest = "finished files are complete, and the same command does the rest"
        print_error(f"{said}: {where}: {remedy}, or choose another place; {rest}")
        sys.exit(2)
