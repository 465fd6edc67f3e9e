"""Datasets in nnU-Net's raw layout that stunet makes or imports."""

from stunet.datasets.imports import ImportReport, dataset_folder
from stunet.datasets.phantoms import PHANTOM_LABELS, make_phantom, write_phantom_dataset, write_phantom_masks
from stunet.datasets.raw import (
    RawDataset,
    case_names,
    check_hold_out,
    has_annotations,
    hold_out,
    plane_names,
    read_annotations,
    read_image,
    read_plane_names,
    read_raw_dataset,
    read_test_dataset,
    read_validation_dataset,
    sync_to_preprocessed,
)
from stunet.datasets.totalsegmentator import (
    KNOWN_BAD_CASES,
    OnCase,
    SourceCase,
    TotalSegmentatorSource,
    choose_structures,
    import_cases,
    read_totalsegmentator,
)
from stunet.datasets.unions import (
    UnionReport,
    UnionSource,
    check_sources,
    import_union,
    merge_sources,
    read_union_source,
    sampling_weights,
    sources_of_cases,
)
