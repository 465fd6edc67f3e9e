"""Figures and tables of results."""

from stunet.reports.figures import draw_scores, side_by_side
from stunet.reports.story import StructureDice, conclude, draw_story, mean_dice, read_dice
