"""Which output is which structure, and which case annotates what: vocabularies, manifests and label maps."""

from stunet.labels.coverage import Coverage, StructureCoverage, measure_coverage
from stunet.labels.label_maps import MergedMasks, count_labels, merge_masks
from stunet.labels.manifest import (
    MANIFEST_NAME,
    AnnotationManifest,
    bind_manifest,
    group_cases,
    read_manifest,
    structures_of,
    write_manifest,
)
from stunet.labels.manifest_format import manifest_schema
from stunet.labels.vocabularies import (
    Vocabulary,
    list_vocabularies,
    load_vocabulary,
    read_label_file,
    vocabulary_for,
)

__all__ = [
    "MANIFEST_NAME",
    "AnnotationManifest",
    "Coverage",
    "MergedMasks",
    "StructureCoverage",
    "Vocabulary",
    "bind_manifest",
    "count_labels",
    "group_cases",
    "list_vocabularies",
    "load_vocabulary",
    "manifest_schema",
    "measure_coverage",
    "merge_masks",
    "read_label_file",
    "read_manifest",
    "structures_of",
    "vocabulary_for",
    "write_manifest",
]
