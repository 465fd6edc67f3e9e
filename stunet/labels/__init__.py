"""Which output is which structure, under which names, and which case annotates what."""

from stunet.labels.aliases import canonical_name, match_names
from stunet.labels.annotations import (
    MANIFEST_NAME,
    AnnotationManifest,
    Coverage,
    bind_manifest,
    group_cases,
    manifest_schema,
    measure_coverage,
    read_manifest,
    write_manifest,
)
from stunet.labels.comparisons import (
    Comparison,
    LabelMap,
    LabelRelation,
    list_label_systems,
    load_label_system,
    observed_values,
    read_label_map,
    relate_labels,
    structure_values,
    suggest_label_map,
)
from stunet.labels.labels import (
    Labels,
    Outputs,
    Vocabulary,
    list_vocabularies,
    load_vocabulary,
    read_label_file,
    vocabulary_for,
)
from stunet.labels.unions import LabelUnion, UnionMapping, dump_mapping, merge_labels, read_mapping
