"""Dice and cross-entropy where each case annotates only some structures."""

from stunet.loss.annotation import label_members
from stunet.loss.dice_ce import PartialDiceCELoss, partial_dice_ce_loss
from stunet.loss.whole_batch import WholeBatch

__all__ = ["PartialDiceCELoss", "WholeBatch", "label_members", "partial_dice_ce_loss"]
