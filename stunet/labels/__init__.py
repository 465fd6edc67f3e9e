"""Which output is which structure: the orders of published weights, and lists that users bring."""

from stunet.labels.vocabularies import (
    Vocabulary,
    list_vocabularies,
    load_vocabulary,
    read_label_file,
    vocabulary_for,
)

__all__ = ["Vocabulary", "list_vocabularies", "load_vocabulary", "read_label_file", "vocabulary_for"]
