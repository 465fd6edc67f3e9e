"""Weights: published ones fetched and verified; checkpoints read, converted and transferred, without running code."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stunet.weights.convert import *  # noqa: F403
    from stunet.weights.networks import *  # noqa: F403
    from stunet.weights.published import *  # noqa: F403
    from stunet.weights.read import *  # noqa: F403
    from stunet.weights.transfer import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import PyTorch only for names that need it: listing published weights does not."""
    for module in ("published", "read", "networks", "convert", "transfer"):
        if not name.startswith("_") and hasattr(found := import_module(f"stunet.weights.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
