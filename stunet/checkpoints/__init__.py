"""Reading, checking and renaming of checkpoints. Never runs code out of one."""

from stunet.checkpoints.key_map import from_published_key, to_published_key
from stunet.checkpoints.loading import check_weights, read_checkpoint

__all__ = ["check_weights", "from_published_key", "read_checkpoint", "to_published_key"]
