"""stunet: pretrain, pick and fine-tune STU-Net with nnU-Net v2."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("stunet")
