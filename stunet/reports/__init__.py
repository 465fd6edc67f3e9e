"""Figures and tables of results."""

from stunet.reports.dice import StructureDice, mean_dice, read_dice
from stunet.reports.figures import side_by_side
from stunet.reports.scores import draw_scores

__all__ = ["StructureDice", "draw_scores", "mean_dice", "read_dice", "side_by_side"]
