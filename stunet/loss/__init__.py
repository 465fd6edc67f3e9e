"""Dice and cross-entropy where each case annotates only some structures."""

from stunet.loss.loss import PartialDiceCELoss, WholeBatch, partial_dice_ce_loss
from stunet.loss.partition import label_members
