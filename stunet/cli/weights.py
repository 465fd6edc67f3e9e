"""``stunet weights``: published weights listed, fetched and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stunet.cli.console import Command, Group, examples
from stunet.cli.options import complete_weights

if TYPE_CHECKING:
    from stunet.weights import Verified, WeightsEntry, WeightsFile

__all__ = ["app", "weights_row"]

app = typer.Typer(cls=Group, help="List, fetch and verify published STU-Net weights.", no_args_is_help=True)


@app.command("list", cls=Command, epilog=examples("stunet weights list", "stunet weights list --json"))
def list_weights(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all sources.")] = False,
) -> None:
    """Show the published weights that are known, and which of them are in the cache."""
    from stunet.weights import load_registry

    rows = [weights_row(entry) for entry in load_registry().values()]
    if as_json:
        typer.echo(json.dumps({"weights": rows}, indent=2))
    else:
        _print_table(rows)


@app.command("fetch", cls=Command, epilog=examples("stunet weights fetch small_ep4k"))
def fetch_weights(
    name: Annotated[
        str, typer.Argument(help="A name that `stunet weights list` shows.", autocompletion=complete_weights)
    ],
    url: Annotated[
        list[str] | None,
        typer.Option(help="Another address; once for each file, whose name it ends with, else for the weights."),
    ] = None,
    hf: Annotated[str | None, typer.Option(help="Hugging Face repository: OWNER/NAME or OWNER/NAME@REVISION.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to put the files into; the cache by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Download files again that are there already.")] = False,
    attempts: Annotated[int, typer.Option(help="Connections before it gives up.", min=1)] = 5,
) -> None:
    """Download published weights and the pickles that belong to them.

    They are put into STUNET_CACHE, else into the platform's folder for caches.
    """
    from stunet.cli.console import say
    from stunet.weights import fetch, find_entry

    entry = find_entry(name)
    try:
        path = fetch(entry, folder=to, urls=url or [], hub=hf, force=force, attempts=attempts, say=say)
    except KeyboardInterrupt:
        say("Stopped. Files that have arrived are kept; the same command fetches the others.")
        raise typer.Exit(130) from None
    _print_line(f"{entry.name}: {path}")
    _print_line(f"Licence: {entry.licence or 'not known; ask those who published them'}")
    _print_line(f"Next: stunet convert {entry.name if to is None else path} -o MODEL_FOLDER")


@app.command(
    "verify", cls=Command, epilog=examples("stunet weights verify", "stunet weights verify small_ep4k small_ep4k.model")
)
def verify_weights(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names; or one file, after the name of what it should be.", autocompletion=complete_weights
        ),
    ] = None,
) -> None:
    """Check weights: length and SHA-256 where they are known, and always that the file opens safely as that network.

    Without names, all that is in the cache.
    """
    from stunet.weights import entry_folder, load_registry, verify, verify_file

    known = load_registry()
    names = [word for word in what or [] if word in known]
    files = [Path(word) for word in what or [] if word not in known]
    _check_words(names, files, known)
    if files:
        if names:
            _report(verify_file(files[0], known[names[0]]))
        else:
            _report_unknown(files[0])
        return
    if not names:
        names = [
            name for name, entry in known.items() if any((entry_folder(name) / f.file).exists() for f in entry.files)
        ]
        if not names:
            _print_line("Nothing has been fetched yet.")
    for name in names:
        for verified in verify(known[name]):
            _report(verified)


def _check_words(names: list[str], files: list[Path], known: dict[str, WeightsEntry]) -> None:
    from stunet.errors import UsageError

    absent = [str(file) for file in files if not file.exists()]
    if absent or len(files) > 1 or (files and len(names) > 1):
        raise UsageError(
            "neither weights nor a file" if absent else "more than one file, or more than one name for a file",
            got=absent[0] if absent else " ".join([*names, *map(str, files)]),
            expected=f"names ({', '.join(known)}), or one name and one file",
            remedy="`stunet weights list` shows the names.",
        )


def _report(verified: Verified) -> None:
    compared = f"as {verified.compared_with}" if verified.compared_with else "not known before"
    _print_line(f"fine  {verified.path}  SHA-256 {verified.sha256} ({compared})")


def _report_unknown(path: Path) -> None:
    from stunet.files import file_sha256
    from stunet.weights import describe_file, load_registry

    words = describe_file(path)
    sha256 = file_sha256(path)
    same = [entry.name for entry in load_registry().values() for file in entry.files if file.sha256 == sha256]
    _print_line(f"fine  {path}  SHA-256 {sha256}")
    _print_line(f"      {words}; {'published as ' + ', '.join(same) if same else 'its checksum is in no registry'}")


def weights_row(entry: WeightsEntry) -> dict[str, Any]:
    """What is known of published weights, and what of them is in the cache."""
    import msgspec

    from stunet.weights import clean_url, entry_folder, missing_files

    folder = entry_folder(entry.name)
    row = msgspec.to_builtins(entry)
    for file in row["files"]:
        file["url"] = None if file["url"] is None else clean_url(file["url"])  # without a password
    missing = missing_files(entry, folder)
    state = "fetched" if not missing else "incomplete" if len(missing) < len(entry.files) else "not fetched"
    return {**row, "download": _how(entry.weights_file), "state": state, "folder": str(folder)}


def _how(file: WeightsFile) -> str:
    if file.url or file.hub:
        return "automatic"
    return "by hand"


def _print_table(rows: list[dict[str, Any]]) -> None:
    from stunet.cli.console import PlainTable, stdout

    numbers = ("outputs", "size")
    table = PlainTable("name", "network", *numbers, "download", "state", numbers=numbers)
    described: dict[str, list[str]] = {}
    for row in rows:
        weights = next(file for file in row["files"] if not file["file"].endswith(".pkl"))
        table.add_row(
            row["name"], row["size"], str(row["outputs"]), _size_words(weights), row["download"], row["state"]
        )
        text = f"{row['title'] or 'training data not known'}; licence: {row['licence'] or 'not known'}"
        described.setdefault(text, []).append(row["name"])
    stdout.print(table)
    stdout.print()
    for text, names in described.items():
        stdout.print(f"{', '.join(names)}: {text}", highlight=False, markup=False)
    _print_line("Next: stunet weights fetch NAME. Files and addresses: stunet weights list --json")


def _size_words(file: dict[str, Any]) -> str:
    from rich.filesize import decimal

    exact, about = file["bytes"], file["approximate_bytes"]
    return decimal(exact) if exact else f"~ {decimal(about)}" if about else "not known"


def _print_line(line: str) -> None:
    from stunet.cli.console import stdout

    stdout.print(line, soft_wrap=True, highlight=False, markup=False)
