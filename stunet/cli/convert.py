"""``stunet convert``: weights of other formats as model folders, and back."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stunet.cli.options import complete_weights
from stunet.files import refuse_existing, remove_leftovers

if TYPE_CHECKING:
    from stunet.planning import ModelDescription
    from stunet.weights import SourceWeights, WeightsEntry

__all__ = ["convert", "find_fetched"]


def convert(
    weights: Annotated[
        list[Path],
        typer.Argument(
            help="A .model (with its .pkl files, in any order), .pth or .safetensors file, a model folder, "
            "or the name of weights that `stunet weights fetch` has fetched.",
            autocompletion=complete_weights,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model folder; a file with --to published.")],
    labels: Annotated[
        Path | None, typer.Option(help="JSON with the names of the outputs; known for the published weights.")
    ] = None,
    to: Annotated[
        Literal["nnunet", "published"], typer.Option(help="A model folder of nnU-Net, or a .model file as published.")
    ] = "nnunet",
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, for the model card.")] = None,
) -> None:
    """Turn published STU-Net weights into a model folder that nnUNetv2_predict_from_modelfolder runs.

    Size, channels and outputs are read off the tensors, preparation of images off the .pkl files. No code in any file
    is run.
    """
    # Before gigabytes are read for nothing; checked again when it is written.
    refuse_existing(output)
    remove_leftovers(output.parent, glob.escape(output.name), of_the_dead=True)
    entry, paths = find_fetched(weights)
    from stunet.planning import describe_model, write_model_folder
    from stunet.weights import open_weights, write_published

    source = open_weights(paths)
    if to == "published":
        write_published(source, output)
        _print_line(f"Wrote {output}: {len(source.tensors)} tensors by the published names")
        return
    description = describe_model(source, _choose_labels(source, labels, entry))
    card = write_model_folder(source, description, output, licence=licence or (entry.licence if entry else None))
    _report(source, description, card, output)


def find_fetched(weights: list[Path]) -> tuple[WeightsEntry | None, list[Path]]:
    """The registry's entry where one is named and no such file exists, and the paths with its own in place of it."""
    from stunet.environment import did_you_mean
    from stunet.errors import UsageError
    from stunet.weights import cached_weights, load_registry

    absent = [path for path in weights if not path.exists()]
    known = load_registry() if absent else {}
    named = [path for path in absent if str(path) in known]
    if wrong := [path for path in absent if path not in named]:
        close = did_you_mean(str(wrong[0]), known)
        raise UsageError("no such weights", got=", ".join(map(str, wrong)),
                         expected="a file, a model folder, or the name of published weights",
                         remedy=f"{close}`stunet weights list` shows the names.")  # fmt: skip
    paths = [cached_weights(str(path)) if path in named else path for path in weights]
    return (known[str(named[0])] if named else None), paths


def _choose_labels(source: SourceWeights, file: Path | None, entry: WeightsEntry | None) -> Any:
    from stunet.labels import load_vocabulary, read_label_file, vocabulary_for

    num_classes = source.architecture.num_classes
    if file is not None:
        return read_label_file(file, num_classes)
    if entry is not None and entry.labels is not None:
        return load_vocabulary(entry.labels)
    return None if source.init_args.get("dataset_json") else vocabulary_for(num_classes)


def _report(source: SourceWeights, description: ModelDescription, card: dict[str, Any], output: Path) -> None:
    from stunet.cli.console import PlainTable, human_bytes, human_count, stdout
    from stunet.planning import resolve_configuration

    configuration = resolve_configuration(description.plans, description.configuration)
    table = PlainTable()
    for name, value in (
        ("source", f"{source.path} ({source.kind}, {source.precision}, {human_bytes(card['sources'][0]['bytes'])})"),
        ("SHA-256", card["sources"][0]["sha256"]),
        ("network", f"STU-Net {card['size']}, {human_count(card['parameters'])} parameters"),
        ("inputs, outputs", f"{card['input_channels']}, {card['outputs']}"),
        ("labels", f"{', '.join(list(card['labels'].values())[:4])} … from {card['labels_from']}"),
        ("plans", f"from {card['plans_from']}"),
        ("spacing", " x ".join(f"{n:g}" for n in configuration["spacing"]) + " mm"),
        ("patch", " x ".join(map(str, configuration["patch_size"]))),
        ("normalization", ", ".join(configuration["normalization_schemes"])),
        ("licence", card["licence"] or "not known; ask where the weights come from"),
    ):
        table.add_row(name, value)
    stdout.print(table)
    _print_line(f"Wrote {output}: all {len(source.tensors)} parameters are accounted for")
    if card["plans_from"].endswith("pre-training preset"):
        _print_line("No .model.pkl was given: spacing, patch and strides are those of the published weights.")
    _print_line("Next, with images named CASE_0000.nii.gz in IMAGES:")
    _print_line(f"  nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {shlex.quote(str(output))} -f 0")


def _print_line(line: str) -> None:
    from stunet.cli.console import stdout

    stdout.print(line, soft_wrap=True, highlight=False, markup=False)
