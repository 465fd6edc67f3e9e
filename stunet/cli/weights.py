"""``stunet weights``, ``list`` and ``convert``: weights listed, fetched, verified and turned into model folders."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.columns import Columns
from rich.filesize import decimal
from rich.text import Text
from typer import Argument, Option

from stunet.cli.console import Group, human_bytes, human_count, print_json, print_line, print_table, say, stdout
from stunet.cli.options import Json, Positive, complete_weights
from stunet.environment import did_you_mean
from stunet.errors import LabelError, UsageError, reading
from stunet.files import file_sha256, read_json, refuse_existing, remove_leftovers
from stunet.weights import published

if TYPE_CHECKING:
    from stunet.weights.convert import SourceWeights

app = typer.Typer(cls=Group, help="List, fetch and verify published STU-Net weights.", no_args_is_help=True)


@app.command("list")
def list_weights(as_json: Annotated[bool, Option("--json", help="Print JSON, with all sources.")] = False) -> None:
    """Show the published weights that are known, and which of them are in the cache."""
    rows = _weights_rows()
    if as_json:
        print_json({"weights": rows})
        return
    cells, described = [], dict[str, list[str]]()
    for row in rows:
        weights = next(file for file in row["files"] if not file["file"].endswith(".pkl"))
        exact, about = weights["bytes"], weights["approximate_bytes"]
        length = decimal(exact) if exact else f"~ {decimal(about)}" if about else "not known"
        cells.append((row["name"], row["size"], row["outputs"], length, row["download"], row["state"]))
        text = f"{row['title'] or 'training data not known'}; licence: {row['licence'] or 'not known'}"
        described.setdefault(text, []).append(row["name"])
    print_table(cells, "name", "network", "outputs", "size", "download", "state", numbers=("outputs", "size"))
    stdout.print()
    for text, names in described.items():
        stdout.print(f"{', '.join(names)}: {text}")
    print_line("Next: stunet weights fetch NAME. Files and addresses: stunet weights list --json")


def _weights_rows() -> list[dict[str, Any]]:
    """Describe all published weights, and what of them is in the cache."""
    rows = []
    for entry in published.load_registry().values():
        row, folder, main = msgspec.to_builtins(entry), published.entry_folder(entry.name), entry.weights_file
        for file in row["files"]:
            file["url"] = None if file["url"] is None else published.clean_url(file["url"])  # without a password
        missing = len(published.missing_files(entry, folder))
        row["download"] = "automatic" if main.url or main.hub else "by hand"
        row["state"] = "fetched" if not missing else "incomplete" if missing < len(entry.files) else "not fetched"
        rows.append({**row, "folder": str(folder)})
    return rows


@app.command("fetch")
def fetch_weights(
    name: Annotated[str, Argument(autocompletion=complete_weights)],
    url: list[str] | None = None,
    hf: str | None = None,
    to: Path | None = None,
    force: bool = False,
    attempts: Positive = 5,
) -> None:
    """Download published weights and the pickles that belong to them.

    They are put into STUNET_CACHE, else into the platform's folder for caches.

    Options:
        name: A name that `stunet weights list` shows.
        url: Another address; once for each file, whose name it ends with, else for the weights.
        hf: Hugging Face repository: OWNER/NAME or OWNER/NAME@REVISION.
        to: Folder to put the files into; the cache by default.
        force: Download files again that are there already.
        attempts: Connections before it gives up.
    """
    entry = published.find_entry(name)
    try:
        path = published.fetch(entry, folder=to, urls=url or [], hub=hf, force=force, attempts=attempts, say=say)
    except KeyboardInterrupt:
        say("Stopped. Files that have arrived are kept; the same command fetches the others.")
        raise typer.Exit(130) from None
    print_line(f"{entry.name}: {path}")
    print_line(f"Licence: {entry.licence or 'not known; ask those who published them'}")
    print_line(f"Next: stunet convert {entry.name if to is None else path} -o MODEL_FOLDER")


@app.command("verify")
def verify_weights(what: Annotated[list[str] | None, Argument(autocompletion=complete_weights)] = None) -> None:
    """Check weights: length and SHA-256 where they are known, and always that the file opens safely as that network.

    Without names, all that is in the cache.

    Options:
        what: Names; or one file, after the name of what it should be.
    """
    known = published.load_registry()
    names = [word for word in what or [] if word in known]
    files = [Path(word) for word in what or [] if word not in known]
    if absent := [file for file in files if not file.exists()]:
        raise UsageError(f"{absent[0]} is neither weights nor a file: give names ({', '.join(known)}) or a file")
    if len(files) > 1 or (files and len(names) > 1):
        raise UsageError(f"{' '.join(what or [])}: give names, or one name and one file (see stunet weights list)")
    if not what:
        names = [n for n, e in known.items() if any((published.entry_folder(n) / f.file).exists() for f in e.files)]
        if not names:
            print_line("Nothing has been fetched yet.")
    if files and not names:
        words, sha256 = published.describe_file(files[0]), file_sha256(files[0])
        same = [entry.name for entry in known.values() for file in entry.files if file.sha256 == sha256]
        print_line(f"fine  {files[0]}  SHA-256 {sha256}")
        print_line(f"      {words}; {'published as ' + ', '.join(same) if same else 'its checksum is in no registry'}")
    for name in names:
        for verified in [published.verify_file(files[0], known[name])] if files else published.verify(known[name]):
            compared = f"as {verified.compared_with}" if verified.compared_with else "not known before"
            print_line(f"fine  {verified.path}  SHA-256 {verified.sha256} ({compared})")


def list_names(of: Annotated[str | None, Option(metavar="NAME")] = None, as_json: Json = False) -> None:
    """Show the published models, the label systems of datasets, and the structures of each with --of.

    Options:
        of: Show the structures of a model, a label system, or a model folder.
    """
    from stunet.labels.labels import list_vocabularies, load_vocabulary
    from stunet.labels.mappings import list_label_systems, load_label_system

    if of is not None:
        content: dict[str, Any] = {"name": of, "structures": _structures(of)}
    else:
        sizes = {name: len(load_label_system(name).entries) for name in list_label_systems()}
        sizes |= {name: len(load_vocabulary(name).labels) - 1 for name in list_vocabularies()}
        listed = [{"name": name, "structures": n} for name, n in sorted(sizes.items())]
        content = {"models": _weights_rows(), "label_systems": listed}
    if as_json:
        print_json(content)
    elif of is not None:
        lines = [f"{','.join(map(str, row['labels'])):>3} {row['name']}" for row in content["structures"]]
        stdout.print(Text(f"{of}: {len(lines)} structures"))
        stdout.print(Columns([Text(line) for line in lines], column_first=True, equal=True))
    else:
        models = [
            (row["name"], row["size"], row["outputs"] - 1, row["licence"] or "not stated", row["state"])
            for row in content["models"]
        ]
        systems = [list(row.values()) for row in content["label_systems"]]
        print_table(models, "name", "size", "structures", "licence", "state", title="Models", numbers=["structures"])
        stdout.print()
        print_table(systems, "name", "structures", title="Label systems", numbers=["structures"])
        stdout.print("\nStructures of one: stunet list --of NAME")
        stdout.print("Predict with a model: stunet predict -i CT.nii.gz -o OUT -m NAME")


def _structures(name: str) -> list[dict[str, Any]]:
    """List label values and name of each structure."""
    from stunet.labels.labels import Labels, list_vocabularies, load_vocabulary
    from stunet.labels.mappings import list_label_systems, load_label_system

    models = published.load_registry()
    order = models[name].labels if name in models else name
    if (path := Path(name) / "dataset.json").is_file():
        with reading(path, "a dataset description that cannot be read", LabelError):
            structures = Labels(read_json(path), path).structures
        return [{"labels": list(values), "name": name} for name, values in structures.items()]
    if order in list_vocabularies():
        return [{"labels": [i], "name": each} for i, each in enumerate(load_vocabulary(order).labels) if i]
    if name in models:
        raise LabelError(
            f"the {models[name].outputs - 1} structures of {name} are not named in the registry: name them with "
            f"stunet convert {name} --labels FILE.json -o MODEL_FOLDER"
        )
    if name not in list_label_systems():
        hint = did_you_mean(name, [*models, *list_vocabularies(), *list_label_systems()])
        raise UsageError(f"unknown model or label system {name}. {hint}`stunet list` shows those that there are.")
    return [{"labels": list(entry.target), "name": entry.name} for entry in load_label_system(name).entries]


def convert(
    weights: Annotated[list[Path], Argument(autocompletion=complete_weights)],
    output: Annotated[Path, Option("-o", "--output")],
    labels: Path | None = None,
    to: Literal["nnunet", "published"] = "nnunet",
    licence: str | None = None,
) -> None:
    """Turn published STU-Net weights into a model folder that nnUNetv2_predict_from_modelfolder runs.

    Size, channels and outputs are read off the tensors, preparation of images off the .pkl files. No code in any file
    is run.

    Options:
        weights: A .model (with its .pkl files, in any order), .pth or .safetensors file, a model folder, or the name of
            weights that `stunet weights fetch` has fetched.
        output: The new model folder; a file with --to published.
        labels: JSON with the names of the outputs; known for the published weights.
        to: A model folder of nnU-Net, or a .model file as published.
        licence: Licence of the weights, for the model card.
    """
    refuse_existing(output)  # before gigabytes are read for nothing; checked again when it is written
    remove_leftovers(output.parent, glob.escape(output.name), of_the_dead=True)
    named = [str(path) for path in weights if not path.exists()]
    entry = published.find_entry(named[0]) if named else None
    paths = [published.cached_weights(path) for path in weights]
    from stunet.labels.labels import load_vocabulary, read_label_file, vocabulary_for
    from stunet.planning.model_folder import write_model_folder
    from stunet.weights.convert import open_weights, write_published

    source = open_weights(paths)
    if to == "published":
        write_published(source, output)
        print_line(f"Wrote {output}: {len(source.tensors)} tensors by the published names")
        return
    names: Any = None
    if labels is not None:
        names = read_label_file(labels, source.architecture.num_classes)
    elif entry is not None and entry.labels is not None:
        names = load_vocabulary(entry.labels)
    elif not source.init_args.get("dataset_json"):
        names = vocabulary_for(source.architecture.num_classes)
    card = write_model_folder(source, names, output, licence=licence or (entry.licence if entry else None))
    _report(source, card, output)


def _report(source: SourceWeights, card: dict[str, Any], output: Path) -> None:
    from stunet.planning.plans import load_plans, resolve_configuration

    plans = load_plans(output / "plans.json")
    configuration = resolve_configuration(plans, *plans["configurations"])
    size = human_bytes(card["sources"][0]["bytes"])
    rows = {
        "source": f"{source.path} ({source.kind}, {source.precision}, {size})",
        "SHA-256": card["sources"][0]["sha256"],
        "network": f"STU-Net {card['size']}, {human_count(card['parameters'])} parameters",
        "inputs, outputs": f"{card['input_channels']}, {card['outputs']}",
        "labels": f"{', '.join(list(card['labels'].values())[:4])} … from {card['labels_from']}",
        "plans": f"from {card['plans_from']}",
        "spacing": " x ".join(f"{n:g}" for n in configuration["spacing"]) + " mm",
        "patch": " x ".join(map(str, configuration["patch_size"])),
        "normalization": ", ".join(configuration["normalization_schemes"]),
        "licence": card["licence"] or "not known; ask where the weights come from",
    }
    print_table(rows.items())
    print_line(f"Wrote {output}: all {len(source.tensors)} parameters are accounted for")
    if card["plans_from"].endswith("pre-training preset"):
        print_line("No .model.pkl was given: spacing, patch and strides are those of the published weights.")
    print_line("Next, with images named CASE_0000.nii.gz in IMAGES:")
    print_line(f"  nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {shlex.quote(str(output))} -f 0")
