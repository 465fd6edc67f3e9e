"""Which output is which structure: the orders of published weights, lists that users bring, and usual spellings."""

from stunet.labels.aliases import canonical_name, match_names
from stunet.labels.outputs import Outputs, outputs_of
from stunet.labels.vocabularies import (
    Vocabulary,
    list_vocabularies,
    load_vocabulary,
    read_label_file,
    vocabulary_for,
)

__all__ = [
    "Outputs",
    "Vocabulary",
    "canonical_name",
    "list_vocabularies",
    "load_vocabulary",
    "match_names",
    "outputs_of",
    "read_label_file",
    "vocabulary_for",
]
