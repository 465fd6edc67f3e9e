"""Which output is which structure, under which names, and which case annotates what."""

from stunet.labels.aliases import canonical_name, match_names
from stunet.labels.coverage import Coverage, SourceCoverage, StructureCoverage, measure_coverage
from stunet.labels.direct_maps import (
    LabelMap,
    MapEntry,
    list_label_systems,
    load_label_system,
    read_label_map,
    suggest_label_map,
)
from stunet.labels.label_maps import MergedMasks, count_labels, merge_masks
from stunet.labels.manifest import (
    MANIFEST_NAME,
    AnnotationManifest,
    bind_manifest,
    group_cases,
    read_manifest,
    structures_of,
)
from stunet.labels.manifest_format import manifest_schema, write_manifest
from stunet.labels.outputs import Outputs, declared_values, outputs_of
from stunet.labels.relations import Comparison, LabelRelation, observed_values, relate_labels, structure_values
from stunet.labels.union_mapping import UnionMapping, dump_mapping, read_mapping
from stunet.labels.unions import LabelUnion, merge_labels
from stunet.labels.vocabularies import Vocabulary, list_vocabularies, load_vocabulary, read_label_file, vocabulary_for

__all__ = [
    "MANIFEST_NAME",
    "AnnotationManifest",
    "Comparison",
    "Coverage",
    "LabelMap",
    "LabelRelation",
    "LabelUnion",
    "MapEntry",
    "MergedMasks",
    "Outputs",
    "SourceCoverage",
    "StructureCoverage",
    "UnionMapping",
    "Vocabulary",
    "bind_manifest",
    "canonical_name",
    "count_labels",
    "declared_values",
    "dump_mapping",
    "group_cases",
    "list_label_systems",
    "list_vocabularies",
    "load_label_system",
    "load_vocabulary",
    "manifest_schema",
    "match_names",
    "measure_coverage",
    "merge_labels",
    "merge_masks",
    "observed_values",
    "outputs_of",
    "read_label_file",
    "read_label_map",
    "read_manifest",
    "read_mapping",
    "relate_labels",
    "structure_values",
    "structures_of",
    "suggest_label_map",
    "vocabulary_for",
    "write_manifest",
]
