"""Names of parameters: the published STU-Net code's and ours."""

from __future__ import annotations

import re

from stunet.errors import CheckpointError

__all__ = ["from_published_key", "to_published_key"]

# (published, ours); braces stand for one index each. Both sides name the same index at the same place, so that either
# side determines the other.
_MODULES = (
    ("conv_blocks_context.{}.{}", "encoder.stages.{}.{}"),
    ("conv_blocks_localization.{}.{}", "decoder.stages.{}.{}"),
    ("upsample_layers.{}.conv", "decoder.upsamplings.{}.conv"),
    ("seg_outputs.{}", "decoder.seg_layers.{}"),
)
_BLOCK_LAYERS = {"conv1": "conv1", "norm1": "norm1", "conv2": "conv2", "norm2": "norm2", "conv3": "projection"}


def _templates() -> list[tuple[str, str]]:
    pairs = []
    for published, ours in _MODULES:
        has_layers = published.count("{}") == 2  # a residual block
        layers = [(f".{p}", f".{o}") for p, o in _BLOCK_LAYERS.items()] if has_layers else [("", "")]
        for published_layer, our_layer in layers:
            for kind in (".weight", ".bias"):
                pairs.append((published + published_layer + kind, ours + our_layer + kind))
    return pairs


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


_FROM_PUBLISHED = [(_compile(published), ours) for published, ours in _templates()]
_TO_PUBLISHED = [(_compile(ours), published) for published, ours in _templates()]


def from_published_key(key: str) -> str:
    """The name in :class:`stunet.network.STUNet` of a parameter of the published network code.

    Args:
        key: For example ``conv_blocks_context.0.0.conv3.weight``.

    Returns:
        For example ``encoder.stages.0.0.projection.weight``.

    Raises:
        CheckpointError: The published code has no such parameter.
    """
    return _translate(key, _FROM_PUBLISHED, "the published STU-Net code")


def to_published_key(key: str) -> str:
    """The inverse of :func:`from_published_key`.

    Raises:
        CheckpointError: :class:`stunet.network.STUNet` has no such parameter.
    """
    return _translate(key, _TO_PUBLISHED, "stunet.network.STUNet")


def _translate(key: str, table: list[tuple[re.Pattern[str], str]], owner: str) -> str:
    for pattern, template in table:
        if match := pattern.fullmatch(key):
            return template.format(*match.groups())
    raise CheckpointError("a parameter that has no counterpart", got=key, expected=f"a parameter of {owner}",
                          remedy="Check that the checkpoint holds a STU-Net and not another network.")  # fmt: skip
