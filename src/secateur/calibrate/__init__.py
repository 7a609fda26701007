"""Calibration: the model runs block by block over windows of tokens, and sums over its activations are collected."""
