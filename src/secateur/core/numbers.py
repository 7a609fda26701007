"""Precision of numbers, and the blocks of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; a float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def diagonal_blocks(matrix_II: Tensor, width: int) -> Tensor:
    """The square blocks on the diagonal of a matrix, [I / width, width, width], as a view."""
    count = len(matrix_II) // width
    return matrix_II.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
