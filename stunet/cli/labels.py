"""``stunet labels``: which structures the cases of a dataset annotate."""

from typing import Any

import typer

from stunet.cli.console import Group, case_bar, exit_with_failures, print_json, print_line, print_table, say
from stunet.cli.options import Dataset, Json, Processes
from stunet.environment import find_dataset, nnunet_folder

app = typer.Typer(cls=Group, help="Check and carry annotated_labels.json.", no_args_is_help=True)


@app.command("check")
def check(dataset: Dataset, as_json: Json = False, num_processes: Processes = 8) -> None:
    """Compare what the training cases annotate (annotated_labels.json) with what their label maps hold.

    Of a union, a second table says what each of its datasets contributes.

    Exit status: 0 where training can go ahead, be it that a structure occurs nowhere; 1 where a structure is annotated
    nowhere, a label occurs in a case that does not annotate it, or a value is not in dataset.json; 2 where the
    label values have a gap, or a file is missing, malformed or unreadable.

    Options:
        as_json: Print JSON, with what each case has.
        num_processes: Cases at a time.
    """
    from stunet.datasets.raw import case_names, read_raw_dataset
    from stunet.datasets.unions import sources_of_cases
    from stunet.labels.annotations import MANIFEST_NAME, measure_coverage, read_manifest
    from stunet.labels.labels import Labels

    raw = read_raw_dataset(nnunet_folder("nnUNet_raw") / find_dataset(dataset))
    labels = raw.dataset_json["labels"]
    Labels(raw.dataset_json, raw.folder / "dataset.json").check()
    manifest = read_manifest(raw.folder / MANIFEST_NAME, labels=labels, cases=case_names(raw))
    files = {case: label for case, (_, label) in sorted(raw.cases.items())}
    with case_bar("Counting labels", len(files)) as on_case:
        coverage = measure_coverage(
            manifest,
            files,
            ignore=labels.get("ignore"),
            source_of=sources_of_cases(raw.folder, files),
            num_processes=num_processes,
            on_case=on_case,
        )
    if as_json:
        print_json({"dataset": raw.folder.name, **coverage})
    else:
        _print_coverage(coverage, raw.folder.name)
    for key, what in (("never_annotated", "never annotated"), ("never_present", "never present")):
        if names := coverage[key]:
            say(f"warning: {len(names)} {what}: {', '.join(names)}")
    for case, structures in coverage["occurs_without_annotation"].items():
        say(f"warning: {case} has {', '.join(structures)} and does not annotate it")
    for case, values in coverage["unknown_values"].items():
        say(f"warning: {case} has values that dataset.json does not list: {', '.join(map(str, values))}")
    exit_with_failures(coverage["unreadable"], "could not be read.")
    if coverage["never_annotated"] or coverage["occurs_without_annotation"] or coverage["unknown_values"]:
        raise typer.Exit(1)


def _print_coverage(coverage: dict[str, Any], dataset: str) -> None:
    structures, cases = coverage["structures"], coverage["cases"]
    columns = ("value", "structure", "annotated in", "present in", "voxels")
    rows = [[row[key] for key in ("value", "name", "annotated", "present", "voxels")] for row in structures]
    title = f"{dataset}, {len(cases)} training cases"
    print_table(rows, *columns, title=title, numbers=set(columns) - {"structure"})
    if coverage["sources"]:
        rows, numbers = [], ("cases", "annotated", "present")
        for source in coverage["sources"]:
            # Often a label that was mapped to the wrong structure.
            never_present = ", ".join(name for name in source["annotated"] if name not in source["present"])
            counts = source["cases"], len(source["annotated"]), len(source["present"])
            rows.append([source["name"], *counts, never_present])
        print_table(rows, "dataset", *numbers, "never present", title="Structures by source", numbers=numbers)
    annotated = sorted((len(case["annotated"]) for case in cases.values()), reverse=True)
    if annotated and annotated[-1] < len(structures):
        shown = ", ".join(map(str, annotated[:12])) + (" …" if len(annotated) > 12 else "")
        print_line(f"Structures annotated, by case: {shown} (of {len(structures)})")
    else:
        print_line("Every case annotates everything.")


@app.command("carry")
def carry(dataset: Dataset) -> None:
    """Copy annotated_labels.json and splits_final.json from nnUNet_raw to nnUNet_preprocessed, over what is there.

    Training reads them there. Importing and training do this by themselves while nothing differs; where the raw files
    have changed since, check that the preprocessed data is of after the change.
    """
    from stunet.datasets.raw import sync_to_preprocessed

    name = find_dataset(dataset)
    folder = nnunet_folder("nnUNet_preprocessed") / name
    sync_to_preprocessed(nnunet_folder("nnUNet_raw") / name, folder, overwrite=True)
    print_line(f"{folder} is up to date")
