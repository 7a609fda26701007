"""From a sparsity to whole numbers: how many weights, units or blocks it removes.

The widths of a narrowed residual stream are rounded by their method (`methods/slicegpt.width_after`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockDims


def removed_weights(rate: float, weights: int) -> int:
    """The number of `weights`, of a row or of a matrix, that a sparsity removes: floor(weights * rate)."""
    return math.floor(weights * rate)


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
