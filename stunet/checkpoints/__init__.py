"""Reading, checking, renaming and converting of checkpoints. Never runs code out of one."""

from stunet.checkpoints.inspection import Architecture, infer_architecture
from stunet.checkpoints.key_map import from_published_key, to_published_key
from stunet.checkpoints.loading import check_weights, read_checkpoint
from stunet.checkpoints.networks import check_network
from stunet.checkpoints.pickles import read_pickle
from stunet.checkpoints.published import write_published
from stunet.checkpoints.sources import SourceWeights, open_weights
from stunet.checkpoints.states import locate_checkpoint
from stunet.checkpoints.transfer import (
    HeadPolicy,
    StemPolicy,
    TransferReport,
    adapt_stem,
    source_outputs,
    transfer_weights,
)
from stunet.checkpoints.unets import UNetArchitecture, UNetWeights, open_any_weights

__all__ = [
    "Architecture",
    "HeadPolicy",
    "SourceWeights",
    "StemPolicy",
    "TransferReport",
    "UNetArchitecture",
    "UNetWeights",
    "adapt_stem",
    "check_network",
    "check_weights",
    "from_published_key",
    "infer_architecture",
    "locate_checkpoint",
    "open_any_weights",
    "open_weights",
    "read_checkpoint",
    "read_pickle",
    "source_outputs",
    "to_published_key",
    "transfer_weights",
    "write_published",
]
