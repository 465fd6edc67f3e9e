"""``stunet convert``: weights of other formats as model folders, and back."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from stunet.cli.console import human_bytes, human_count, print_line, print_table
from stunet.cli.options import complete_weights
from stunet.files import refuse_existing, remove_leftovers
from stunet.labels.labels import load_vocabulary, read_label_file, vocabulary_for
from stunet.weights.published import cached_weights, find_entry

if TYPE_CHECKING:
    from stunet.planning import ModelDescription
    from stunet.weights.convert import SourceWeights


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
    entry = find_entry(named[0]) if named else None
    paths = [cached_weights(path) for path in weights]
    from stunet.planning import describe_model, write_model_folder
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
    description = describe_model(source, names)
    card = write_model_folder(source, description, output, licence=licence or (entry.licence if entry else None))
    _report(source, description, card, output)


def _report(source: SourceWeights, description: ModelDescription, card: dict[str, Any], output: Path) -> None:
    from stunet.planning import resolve_configuration

    configuration = resolve_configuration(description.plans, description.configuration)
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
