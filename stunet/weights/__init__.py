"""Weights: published ones fetched and verified; checkpoints read, converted and transferred, without running code."""
