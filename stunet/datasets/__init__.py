"""Datasets in nnU-Net's raw layout that stunet makes or imports."""
