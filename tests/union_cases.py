"""Two small datasets and their union."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raw_datasets import write_raw

from stunet.datasets.imports import ImportReport
from stunet.datasets.unions import UnionSource, import_union, merge_sources, read_union_source
from stunet.labels.annotations import read_manifest
from stunet.labels.mappings import UnionMapping

A_LABELS = {"background": 0, "liver": 1, "Left Kidney": 2, "right kidney": 3}
B_LABELS = {"background": 0, "kidneys": 1, "Spleen": 2, "liver tumour": 3}
NAMES = ("Dataset007_A", "Dataset123_B")


def write_sources(raw: Path) -> Path:
    write_raw(raw / NAMES[0], A_LABELS, [f"a{i}" for i in range(4)])
    write_raw(raw / NAMES[1], B_LABELS, ["x"])
    return raw


def run(
    raw: Path,
    folder: str = "Dataset700_U",
    mapping: UnionMapping | None = None,
    sources: Sequence[UnionSource] = (),
    **options: Any,
) -> ImportReport:
    sources = sources or [read_union_source(raw / name) for name in NAMES]
    return import_union(sources, merge_sources(sources, mapping), raw / folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def dataset_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "dataset.json").read_text()))


def annotated(folder: Path) -> dict[str, list[str]]:
    dataset = dataset_json(folder)
    manifest = read_manifest(
        folder / "annotated_labels.json", labels=dataset["labels"], cases=dataset["dataset"]
    )  # fmt: skip
    names = {value: name for name, value in manifest.structures.items()}
    return {case: [names[value] for value in manifest.annotated(case)] for case in sorted(dataset["dataset"])}
