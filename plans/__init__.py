"""Presets as JSON files, read by ``stunet.planning.presets``."""
