"""Reading, checking and renaming of checkpoints. Never runs code out of one."""
