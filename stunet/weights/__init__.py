"""Weights: published ones fetched and verified; checkpoints read, converted and transferred, without running code."""

from stunet.weights.cache import cached_weights, entry_folder
from stunet.weights.checks import Verified, describe_file, verify, verify_file
from stunet.weights.fetch import Listener, fetch
from stunet.weights.inspection import Architecture, infer_architecture
from stunet.weights.key_map import from_published_key, to_published_key
from stunet.weights.loading import check_weights, read_checkpoint
from stunet.weights.networks import check_network
from stunet.weights.pickles import read_pickle
from stunet.weights.published import write_published
from stunet.weights.registry import Place, WeightsEntry, WeightsFile, find_entry, load_registry
from stunet.weights.sources import SourceWeights, open_weights
from stunet.weights.states import locate_checkpoint
from stunet.weights.transfer import HeadPolicy, StemPolicy, TransferReport, adapt_stem, source_outputs, transfer_weights
from stunet.weights.unets import UNetArchitecture, UNetWeights, open_any_weights

__all__ = [
    "Architecture",
    "HeadPolicy",
    "Listener",
    "Place",
    "SourceWeights",
    "StemPolicy",
    "TransferReport",
    "UNetArchitecture",
    "UNetWeights",
    "Verified",
    "WeightsEntry",
    "WeightsFile",
    "adapt_stem",
    "cached_weights",
    "check_network",
    "check_weights",
    "describe_file",
    "entry_folder",
    "fetch",
    "find_entry",
    "from_published_key",
    "infer_architecture",
    "load_registry",
    "locate_checkpoint",
    "open_any_weights",
    "open_weights",
    "read_checkpoint",
    "read_pickle",
    "source_outputs",
    "to_published_key",
    "transfer_weights",
    "verify",
    "verify_file",
    "write_published",
]
