"""Datasets in nnU-Net's raw layout that stunet makes or imports."""

from stunet.datasets.phantoms import PHANTOM_LABELS, Phantom, make_phantom, write_phantom_dataset
from stunet.datasets.raw import (
    RawDataset,
    check_hold_out,
    exclusive_labels,
    hold_out,
    read_image,
    read_raw_dataset,
)

__all__ = [
    "PHANTOM_LABELS",
    "Phantom",
    "RawDataset",
    "check_hold_out",
    "exclusive_labels",
    "hold_out",
    "make_phantom",
    "read_image",
    "read_raw_dataset",
    "write_phantom_dataset",
]
