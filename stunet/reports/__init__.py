"""Figures and tables of results."""

from stunet.reports.figures import draw_scores, side_by_side
from stunet.reports.story import StructureDice, mean_dice, read_dice
