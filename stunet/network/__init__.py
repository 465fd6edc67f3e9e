"""STU-Net and what is known of its size: blocks, network, sizes, estimates. Needs torch alone."""

from stunet.network.architecture import ActivationCheckpointing, STUNet, build_stunet, total_stride
from stunet.network.estimate import Estimate, default_strides, estimate, peak_forward_bytes
from stunet.network.recommendation import USABLE_SHARE, Recommendation, recommend
from stunet.network.sharding import shard
from stunet.network.training_memory import Loss, Parallel, Precision
from stunet.sizes import N_STAGES, SIZES, STUNetSize, find_size, size_of

__all__ = [
    "N_STAGES",
    "SIZES",
    "USABLE_SHARE",
    "ActivationCheckpointing",
    "Estimate",
    "Loss",
    "Parallel",
    "Precision",
    "Recommendation",
    "STUNet",
    "STUNetSize",
    "build_stunet",
    "default_strides",
    "estimate",
    "find_size",
    "peak_forward_bytes",
    "recommend",
    "shard",
    "size_of",
    "total_stride",
]
