"""The folder that nnU-Net's ``nnUNet_extTrainer`` points to."""
