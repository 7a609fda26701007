"""From a sparsity to whole numbers: how many weights, units or blocks it removes.

Some methods count what they remove in their own way: SliceGPT rounds widths (`methods/slicegpt.width_after`), and
LLM-Pruner, head pruning, LLM Surgeon and DISP-LLM remove units one after the other until a count is reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockDims


def removed_weights(rate: float, weights: int) -> int:
    """The number of `weights`, of a row or of a matrix, that a sparsity removes: floor(weights * rate)."""
    return math.floor(weights * rate)


def removed_from_matrix(rate: float, outputs: int, inputs: int, *, by_rows: bool) -> int:
    """The number of weights that a sparsity removes from a matrix, rounded down in each row or in the whole matrix."""
    return outputs * removed_weights(rate, inputs) if by_rows else removed_weights(rate, outputs * inputs)


def removed_units(rate: float, units: int) -> int:
    """The number of `units` that a sparsity removes: floor(units * rate)."""
    return math.floor(units * rate)


def removed_blocks(sparsity: float, blocks: int) -> int:
    """The number of `blocks` that a sparsity removes: the nearest whole number, with halves rounded up."""
    return math.floor(sparsity * blocks + 0.5)


def units_left(dims: BlockDims, rate: Mapping[str, float]) -> BlockDims:
    """The sizes of a block after whole units are removed at these rates."""
    groups = dims.groups - removed_units(rate.get(MEMBERS["groups"].reader, 0.0), dims.groups)
    ffn = dims.ffn - removed_units(rate.get(MEMBERS["ffn"].reader, 0.0), dims.ffn)
    return dims.with_units(groups, ffn)
