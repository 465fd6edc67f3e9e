"""Figures and tables of results."""

from stunet.reports.dice import StructureDice, read_dice
from stunet.reports.figures import side_by_side

__all__ = ["StructureDice", "read_dice", "side_by_side"]
