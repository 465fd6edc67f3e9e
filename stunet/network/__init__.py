"""STU-Net and what is known of its size: blocks, network, sizes, estimates. Needs torch alone."""

from stunet.network.sizes import N_STAGES, SIZES, STUNetSize, find_size, size_of
from stunet.network.architecture import ActivationCheckpointing, STUNet, build_stunet

__all__ = [
    "N_STAGES",
    "SIZES",
    "ActivationCheckpointing",
    "STUNet",
    "STUNetSize",
    "build_stunet",
    "find_size",
    "size_of",
]
