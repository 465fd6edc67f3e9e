"""Published weights: which exist, and how they are fetched, kept and checked."""

from stunet.weights.cache import cached_weights, entry_folder
from stunet.weights.checks import Verified, describe_file, verify, verify_file
from stunet.weights.fetch import Listener, fetch
from stunet.weights.registry import Place, WeightsEntry, WeightsFile, find_entry, load_registry

__all__ = [
    "Listener",
    "Place",
    "Verified",
    "WeightsEntry",
    "WeightsFile",
    "cached_weights",
    "describe_file",
    "entry_folder",
    "fetch",
    "find_entry",
    "load_registry",
    "verify",
    "verify_file",
]
