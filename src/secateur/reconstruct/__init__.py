"""Reconstruction: train a pruned model block by block, so that each block gives what the dense model gives there.

    tokens -> dense block 0 -> dense block 1 -> ...        the targets
    tokens -> pruned block 0 -> pruned block 1 -> ...      the inputs: each block sees what the blocks before it left

The dense and the pruned residual stream are one buffer each. A block is in memory alone, with its gradients and the two
moments of Adam. Zeros stay zero and shapes stay as they are (arXiv:2510.14444; `fit.py`). What the dense model gives is
brought into the coordinates of a residual stream that was rotated or narrowed (`targets.py`).
"""
