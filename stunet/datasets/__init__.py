"""Datasets in nnU-Net's raw layout that stunet makes or imports."""

from stunet.datasets.import_state import REPORT_NAME, dataset_folder
from stunet.datasets.labelled import read_test_dataset, read_validation_dataset
from stunet.datasets.mask_import import ImportReport, import_cases
from stunet.datasets.phantoms import (
    PHANTOM_LABELS,
    Contrast,
    Phantom,
    make_phantom,
    phantom_labels,
    write_phantom_dataset,
    write_phantom_masks,
)
from stunet.datasets.raw import (
    RawDataset,
    case_names,
    check_hold_out,
    exclusive_labels,
    hold_out,
    plane_names,
    read_image,
    read_plane_names,
    read_raw_dataset,
)
from stunet.datasets.side_files import SPLITS_NAME, carry_side_files, has_annotations, read_annotations
from stunet.datasets.totalsegmentator import (
    KNOWN_BAD_CASES,
    SourceCase,
    TotalSegmentatorSource,
    choose_structures,
    read_totalsegmentator,
)
from stunet.datasets.union_checks import check_sources
from stunet.datasets.union_import import UnionReport, import_union
from stunet.datasets.union_sources import (
    UnionSource,
    merge_sources,
    read_union_source,
    sampling_weights,
    sources_of_cases,
)

__all__ = [
    "KNOWN_BAD_CASES",
    "PHANTOM_LABELS",
    "REPORT_NAME",
    "SPLITS_NAME",
    "Contrast",
    "ImportReport",
    "Phantom",
    "RawDataset",
    "SourceCase",
    "TotalSegmentatorSource",
    "UnionReport",
    "UnionSource",
    "carry_side_files",
    "case_names",
    "check_hold_out",
    "check_sources",
    "choose_structures",
    "dataset_folder",
    "exclusive_labels",
    "has_annotations",
    "hold_out",
    "import_cases",
    "import_union",
    "make_phantom",
    "merge_sources",
    "phantom_labels",
    "plane_names",
    "read_annotations",
    "read_image",
    "read_plane_names",
    "read_raw_dataset",
    "read_test_dataset",
    "read_totalsegmentator",
    "read_union_source",
    "read_validation_dataset",
    "sampling_weights",
    "sources_of_cases",
    "write_phantom_dataset",
    "write_phantom_masks",
]
