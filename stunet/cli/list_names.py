"""``stunet list``: published models, their structures, and label systems; without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["list_names"]


def list_names(
    of: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Show the structures of a model, a label system, or a model folder."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the published models, the label systems of datasets, and the structures of each with --of."""
    content: dict[str, Any] = _everything() if of is None else {"name": of, "structures": _structures(of)}
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    elif of is None:
        _print_everything(content)
    else:
        _print_structures(of, content["structures"])


def _everything() -> dict[str, Any]:
    from stunet.cli.weights import weights_row
    from stunet.labels import list_label_systems, list_vocabularies, load_label_system, load_vocabulary
    from stunet.weights import load_registry

    systems = {name: len(load_label_system(name).entries) for name in list_label_systems()}
    orders = {name: len(load_vocabulary(name).labels) - 1 for name in list_vocabularies()}
    return {
        "models": [weights_row(entry) for entry in load_registry().values()],
        "label_systems": [{"name": name, "structures": n} for name, n in sorted({**systems, **orders}.items())],
    }


def _structures(name: str) -> list[dict[str, Any]]:
    """Label values and name of each structure."""
    from stunet.environment import did_you_mean
    from stunet.errors import LabelError, UsageError
    from stunet.labels import list_label_systems, list_vocabularies, load_label_system, load_vocabulary
    from stunet.weights import load_registry

    models = load_registry()
    if (Path(name) / "dataset.json").is_file():
        return _structures_of_folder(Path(name) / "dataset.json")
    order = models[name].labels if name in models else name
    if order in list_vocabularies():
        return [{"labels": [i], "name": each} for i, each in enumerate(load_vocabulary(order).labels) if i]
    if name in models:
        raise LabelError(
            "weights whose structures are not named",
            got=f"{name}: {models[name].outputs - 1} structures",
            expected='"labels" in the registry',
            remedy=f"Name them: stunet convert {name} --labels FILE.json -o MODEL_FOLDER.",
        )
    known = [*models, *list_vocabularies(), *list_label_systems()]
    if name not in known:
        raise UsageError(
            "unknown model or label system",
            got=name,
            expected="a name that `stunet list` shows, or a folder with dataset.json",
            remedy=f"{did_you_mean(name, known)}Correct --of.",
        )
    return [{"labels": list(entry.target), "name": entry.name} for entry in load_label_system(name).entries]


def _structures_of_folder(path: Path) -> list[dict[str, Any]]:
    from stunet.errors import LabelError

    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"].items()
        values = {name: [int(v) for v in (value if isinstance(value, list) else [value])] for name, value in labels}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabelError(
            "a dataset description that cannot be read",
            got=f"{path}: {type(error).__name__}: {error}",
            expected='JSON with "labels": {"background": 0, "liver": 1, …}',
            remedy="Correct it.",
        ) from error
    return [{"labels": v, "name": name} for name, v in values.items() if v != [0] and name != "ignore"]


def _print_everything(content: dict[str, Any]) -> None:
    from stunet.cli.console import PlainTable, stdout

    models = PlainTable("name", "size", "structures", "licence", "state", title="Models", numbers=["structures"])
    for row in content["models"]:
        licence = row["licence"] or "not stated"
        models.add_row(row["name"], row["size"], str(row["outputs"] - 1), licence, row["state"])
    systems = PlainTable("name", "structures", title="Label systems", numbers=["structures"])
    for row in content["label_systems"]:
        systems.add_row(row["name"], str(row["structures"]))
    stdout.print(models, "", systems, "", sep="\n")
    stdout.print("Structures of one: stunet list --of NAME", highlight=False)
    stdout.print("Predict with a model: stunet predict -i CT.nii.gz -o OUT -m NAME", highlight=False)


def _print_structures(of: str, structures: list[dict[str, Any]]) -> None:
    from rich.columns import Columns
    from rich.text import Text

    from stunet.cli.console import stdout

    lines = [f"{','.join(map(str, row['labels'])):>3} {row['name']}" for row in structures]
    stdout.print(Text(f"{of}: {len(lines)} structures"))
    stdout.print(Columns([Text(line) for line in lines], column_first=True, equal=True))
