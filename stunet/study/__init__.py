"""Studies of transfer: which checkpoint is worth what on which dataset, and which score would have told."""
